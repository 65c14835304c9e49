"""Fits: closed forms, adapters of many concepts, and what more concepts cost."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from erasebench.methods.mace import MACE
from erasebench.methods.uce import UCE
from measure import DEVICE, embedded, inside, linear, peak_memory, record, seconds, stable_diffusion_shape
from torch import Tensor, nn

from erasebench.contracts import Brief, Concept
from erasebench.mini.world import names
from erasebench.model.model import Model
from erasebench.toolbox import closed_form as closed_forms


def uce(model: Model, label: str, counts: tuple[int, ...]) -> None:
    """For so many concepts and as many preserved: fit (with and without text encoding) and apply."""
    took = []
    for count in counts:
        kinds = ("cat", "dog")
        erased, kept = ([f"{kind} {i}" for i in range(count)] for kind in kinds)
        brief = Brief(tuple(Concept(name, "object", "sky") for name in erased), tuple(kept))
        what, encoding = f"UCE, {count} concepts and {count} preserved, {label}", []
        with tempfile.TemporaryDirectory() as folder:
            with peak_memory(what, "fit"), inside(model.text_encoder, encoding), seconds() as fit:
                UCE().fit(model, brief, Path(folder), 0)
            with seconds() as apply, UCE().apply(model, Path(folder)):
                pass
        took += fit
        record(what, "text encoding", sum(encoding), "s")
        record(what, "fit without encoding", fit[0] - sum(encoding), "s")
        record(what, "apply", apply[0], "s")
    if len(counts) > 2:
        linear(f"UCE, concepts, {label}", counts, took)


def textbook(weights: dict[str, Tensor], sources: Tensor, targets: Tensor, ridge: float) -> dict[str, Tensor]:
    """The closed form as it is usually written: layer by layer, concept by concept, an fp32 inverse for each matrix."""
    made = {}
    for name, weight in weights.items():
        left, right = ridge * weight, ridge * torch.eye(weight.shape[1], device=weight.device)
        for c, target in zip(sources, targets, strict=True):
            left = left + (target @ weight.T).T @ c
            right = right + c.T @ c
        made[name] = left @ torch.inverse(right)
    return made


def one_matrix(weights: dict[str, Tensor], sources: Tensor, targets: Tensor, ridge: float) -> dict[str, Tensor]:
    system = closed_forms.System(sources.shape[-1], sources.device)
    edit, _ = system.map(sources.flatten(0, 1), targets.flatten(0, 1)).solve(ridge)
    return {name: (weight.double() @ edit).float() for name, weight in weights.items()}


def embeddings(count: int, rows: int, width: int) -> Tensor:
    """[count, rows, width] like those of CLIP: normalised, and alike from one position to the next, which is what
    makes the systems ill-conditioned. Drawn, since encoding 2,000 names takes minutes here and is no part of this."""
    draws = torch.Generator().manual_seed(count)
    shared, of_name = torch.randn(rows, width, generator=draws), torch.randn(count, 1, width, generator=draws)
    own = torch.randn(count, rows, width, generator=draws)
    return nn.functional.layer_norm(shared[:1] + 0.1 * shared + 0.3 * of_name + 0.02 * own, (width,)).to(DEVICE)


def closed_form(model: Model, counts: tuple[int, ...] = (1, 10, 100, 1000), ridge: float = 0.5) -> None:
    """UCE's system (75 rows a name of two tokens) as one matrix beside the textbook's loop; errors against fp64."""
    weights = {name: model.weight(name) for name in model.names(closed_forms.PROJECTIONS)}
    took: dict[str, list[float]] = {}
    for count in counts:
        sources = embeddings(count, 75, model.text_width)
        targets = embeddings(1, 75, model.text_width).expand_as(sources).contiguous()
        eye = ridge * torch.eye(model.text_width, dtype=torch.float64, device=DEVICE)
        flat, aims = sources.flatten(0, 1).double(), targets.flatten(0, 1).double()
        exact = torch.linalg.solve(eye + flat.T @ flat, (eye + aims.T @ flat).T).T
        what = f"closed form, {count} concepts, SD v1.4 shape"
        for way, edit in (("one matrix", one_matrix), ("textbook", textbook)):
            with peak_memory(what, way), seconds() as spent:
                made = edit(weights, sources, targets, ridge)
            took.setdefault(way, []).extend(spent)
            record(what, way, spent[0], "s")
            error = max((made[n].double() - w.double() @ exact).abs().max().item() for n, w in weights.items())
            record(what, f"{way}, largest error against fp64", 1e9 * error, "1e-9")
        record(what, "textbook / one matrix", took["textbook"][-1] / took["one matrix"][-1], "times")
    linear("closed form, concepts, one matrix", counts, took["one matrix"])


def mace(model: Model, count: int = 100) -> None:
    """Adapters of many people: trained as one batch, and one after the other."""
    people = tuple(Concept(name, "person", "a person") for name in names()["people"]["erase"][:count])
    brief = Brief(people, templates=("{c}",))
    eraser = MACE(masks="whole", images=1, image_sampler="ddim", image_steps=2, steps=10)
    latents, shown, _ = eraser.pictures(model, brief, 0)
    what = f"MACE, adapters of {count} people, 10 steps"
    for label, together in (("together", count), ("in turn", 1)):
        with peak_memory(what, label), seconds() as took:
            replace(eraser, together=together).adapters(model, brief, latents, shown, 0)
        record(what, label, took[0], "s")


def main() -> None:
    small = embedded()
    uce(small, "embedded", (1, 10, 100, 1000))
    mace(small)
    large = stable_diffusion_shape()
    uce(large, "SD v1.4 shape", (100,))
    closed_form(large)
