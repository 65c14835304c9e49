"""The concept graph: how far erasing each concept moves every other one.

python -m erasebench graph -m method=uce task=object target=airplane,bird,cat,dog,ship

A cell of the matrix is the change of one concept's noise predictions when another is erased (`moved.change`), in units
of that concept's own signal (the distance of its predictions from those without a prompt), over the same noise for all.
Two claims of the slides are tested, each with a number:

locality    near concepts move more: mean over the erased concepts of the rank correlation between distance (of whole
            text encodings) and change, with its 95 % interval over erased concepts (bootstrap); claimed negative
asymmetry   mean |a_ij - a_ji| / (a_ij + a_ji) over pairs that were erased both ways, beside the difference between two
            draws of the noise, mean |a_ij - b_ij| / (a_ij + b_ij); claimed far above it

Written to <results>/concept_graph_<method>.csv, and drawn if matplotlib is installed.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import config
from ..contracts import ErasebenchError
from ..model.model import Model
from ..report.runs import plain
from ..rows import Row, check_writable, write_table
from ..run.session import Session
from ..run.specification import Run
from ..store.local import Store
from ..toolbox import vocabulary
from .moved import change

log = logging.getLogger("erasebench")


class Edge(NamedTuple):
    """Effect of erasing `erased` on `other`.

    Holds the change of `other` over one draw of the noise and over another, and its distance from `erased`.
    """

    erased: str
    other: str
    change: float
    again: float
    distance: float


@torch.no_grad()
def edges(model: Model, erased: str, others: list[str], draws: int = 16) -> list[Edge]:
    """Return the edges from one erased concept to others. `model` is changed by the erasure."""
    far = vocabulary.distances(model, others, erased).tolist()
    changes = [_changes(model, others, seed, draws).tolist() for seed in (0, 1)]
    return [Edge(erased, *values) for values in zip(others, *changes, far, strict=True)]


def _changes(model: Model, texts: list[str], seed: int, draws: int) -> Tensor:
    """Return each text's change, in units of its own signal [N]."""
    generator = torch.Generator().manual_seed(seed)
    z = model.noise(torch.randint(2**31, (draws,), generator=generator).tolist())
    t = torch.randint(len(model.alphas_cumprod), (draws,), generator=generator).to(z.device)
    with model.teacher():
        empty = model.eps(z, t, model.unconditional().repeat(draws))
    far, said = torch.cat([change(model, texts[i : i + 4], z, t, empty) for i in range(0, len(texts), 4)], 1)
    return far / said


def correlation(x: list[float], y: list[float]) -> float:
    """Return Spearman's rank correlation of numbers without ties."""
    rank = lambda values: np.argsort(np.argsort(values))
    return float(np.corrcoef(rank(x), rank(y))[0, 1])


def locality(found: list[Edge], resamples: int = 2000) -> tuple[float, float, float]:
    """Return (mean rank correlation of distance and change, low, high)."""
    names = dict.fromkeys(edge.erased for edge in found)
    own = [[e for e in found if e.erased == name and e.other != name] for name in names]
    each = np.array([correlation([e.distance for e in some], [e.change for e in some]) for some in own])
    means = np.random.default_rng(0).choice(each, (resamples, len(each))).mean(1)
    return float(each.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def asymmetry(found: list[Edge]) -> tuple[float, float] | None:
    """Return (asymmetry of pairs, asymmetry of two noise draws).

    The pairs are concepts that were erased both ways. Returns None if there is no such pair.
    """
    cell = {(e.erased, e.other): e for e in found}
    pairs = [(e, cell[j, i]) for (i, j), e in cell.items() if i < j and (j, i) in cell]
    if not pairs:
        return None
    gap = lambda a, b: abs(a - b) / (a + b) if a + b else 0.0
    both = np.mean([gap(a.change, b.change) for a, b in pairs])
    return float(both), float(np.mean([gap(e.change, e.again) for pair in pairs for e in pair]))


def draw(found: list[Edge], path: Path) -> None:
    """Draw the matrix, and change against distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = (list(dict.fromkeys(getattr(e, part) for e in found)) for part in ("erased", "other"))
    matrix = np.full((len(rows), len(columns)), np.nan)
    for e in found:
        matrix[rows.index(e.erased), columns.index(e.other)] = e.change
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    left.figure.colorbar(left.imshow(matrix, aspect="auto"), ax=left)
    left.set_xticks(range(len(columns)), columns, rotation=90)
    left.set_yticks(range(len(rows)), rows)
    left.set(xlabel="moved", ylabel="erased")
    right.scatter(
        [e.distance for e in found if e.erased != e.other], [e.change for e in found if e.erased != e.other], s=8
    )
    right.set(xlabel="distance of the encodings", ylabel="change")
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)


def report(method: str, found: list[Edge], results: Path) -> str:
    """Write the edges and the drawing; returns the two claims in words."""
    check_writable(results)
    path = results / f"concept_graph_{method}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        write_table([Edge._fields, *found], file)
    try:
        draw(found, path.with_suffix(".png"))
    except ImportError:
        log.warning("no figure: matplotlib is not installed (pip install 'erasebench[plots]')")
    mean, low, high = locality(found)
    said = (
        f"{method}: locality {mean:.2f} [{low:.2f}, {high:.2f}] over {len({e.erased for e in found})} erased concepts"
    )
    if (both := asymmetry(found)) is not None:
        said += f"; asymmetry {both[0]:.2f}, of two draws {both[1]:.2f}"
    return f"{said}; {path}"


def main(arguments: list[str]) -> int:
    found: dict[tuple[str, Path], list[Edge]] = {}

    def job(run: Run) -> list[Row]:
        session = Session(run, Store())
        try:
            names = [concept.name for concept in run.plan.concepts]
            model, known = session.erased(), sorted({*names, *run.plan.brief.preserved})
            found.setdefault((run.method, run.results), []).extend(edges(model, names[0], known))
        finally:
            session.close()
        return []

    code = config.main(job, arguments)
    try:
        for (method, results), some in found.items():
            print(report(method, some, results))
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 1
    return code
