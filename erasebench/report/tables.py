"""Tables and figures of experiments in a paper's layout, measured beside published.

An experiment (conf/experiment) sweeps runs, and `table` describes the presentation of their rows:

    title      title of the table
    across     field of a row that makes the column blocks (target, n_concepts), a hyperparameter (method.rank), or nothing
    metrics    metric of ours -> name in the published table; cce/asr is that of the attack cce
    labels     method -> its name in the published table
    published  file in results/published, or nothing; `setting` names its key or column that corresponds to `across`,
               `blocks` the names of its values
    concepts   number of concepts erased in the published table, if `across` does not give it
    stand_in   task whose rows stand in for agreement if there are none of its own task
    n          metric -> number of images required for comparison with the published one (Frechet distances)
    average    true adds a block with the mean and deviation over the others
    raw        metrics that are shown unscaled; others are percent
    split      split whose rows count if a metric has several; otherwise those of the first
    figure     metrics to draw against `across`
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..rows import Row, check_writable, replace_file, write_table
from .runs import breakage, json_of, plain

log = logging.getLogger("erasebench")
AVERAGE = "average"
PAPER = "paper, Stable Diffusion: not comparable"  # column of published values beside those of the embedded world
FRECHET = {"fd_mini": "fid_clean"}  # the embedded world's Frechet distance stands for that over Inception's features
BROKEN = "†"  # marks numbers of a broken run
SWEPT = {"n_concepts": "n", "base": "model"}  # field of a row -> the option that varies it in a sweep
UNITS = {"%": 100, "100*score": 100, "cos": 0.01}  # unit of a published table -> divisor to ours
# options that select a run of a protocol without changing its measurement
PROTOCOL = frozenset(("experiment", "part", "model", "task", "method", "seed", "attack", "other_words"))


def cells(spec: Mapping[str, Any], rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    """Return (method, block, metric) -> row, for measured metrics."""
    field, _, parameter = (spec.get("across") or "").partition(".")

    def block(row: Row) -> str:
        value = json.loads(row.params).get(parameter, "") if parameter else getattr(row, field) if field else ""
        return ", ".join(value) if isinstance(value, list) else str(value)

    wanted, found = set(spec["metrics"]), {}
    for row in rows:
        name = f"{row.attack}/{row.metric}" if row.attack else row.metric
        if row.status == "ok" and name in wanted:
            key = (row.method, block(row), name)
            first = found.setdefault(key, row)
            if row.run_id != first.run_id or row.split == spec.get("split"):
                found[key] = row
    return found


def published(spec: Mapping[str, Any]) -> dict[tuple[str, str, str], float]:
    """Return (method, block, metric) -> the paper's value as a fraction."""
    return {key: value for key, value, _ in published_lines(spec)} if spec.get("published") else {}


def rename(row: Row, labels: Mapping[str, str]) -> Row:
    """Return the row under the names of the table.

    A variant of a method has a name of its own if the labels list it; the embedded world's Frechet distance gets the
    published metric's name.
    """
    variant = f"{row.method} variant={json_of(row.params).get('variant')}"
    return replace(
        row,
        method=variant if variant in labels else row.method,
        metric=FRECHET.get(row.metric, row.metric),
    )


def published_lines(spec: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], float, dict[str, str]]]:
    """Yield the published values that a table has beside its own.

    Each is ((method, block, metric), value as a fraction, the line of results/published).
    """
    theirs = {name: ours for ours, name in spec["metrics"].items() if name}
    blocks = {theirs.lower(): str(ours) for ours, theirs in spec.get("blocks", {}).items()}
    for line in printed_lines(spec):
        setting = json.loads(line["setting"] or "{}")
        block = str(setting.get(spec.get("setting")) or line.get(spec.get("setting")) or "").lower()
        block = blocks.get(block, block)
        name = line["method"] or str(setting.get("config", ""))
        for method, label in spec.get("labels", {}).items():
            if label == name and line["metric"] in theirs and line["value"]:
                whole = block.startswith("average") or (spec.get("average") and not block)
                key = (method, AVERAGE if whole else block, theirs[line["metric"]])
                yield key, float(line["value"]) / UNITS.get(line["unit"], 1), line


def printed_lines(spec: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the lines of the published table, as printed."""
    path = resources.files("erasebench.results") / "published" / f"{spec['published']}.csv"
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Protocol:
    """Experiment beside a published table: its task and number of concepts.

    `n` is None if the table has several numbers of concepts.
    """

    name: str
    task: str | None
    n: int | None
    spec: Mapping[str, Any]
    is_single: bool  # the published numbers are of single runs, not of the mean over several

    @cached_property
    def lines(self) -> dict[tuple[str, str, str], list[tuple[float, dict[str, str]]]]:
        """(method, block, metric) -> published values, each with its line."""
        found: dict[tuple[str, str, str], list[tuple[float, dict[str, str]]]] = {}
        for key, value, line in published_lines(self.spec):
            found.setdefault(key, []).append((value, line))
        return found


@cache
def published_tables() -> tuple[Protocol, ...]:
    """Return the experiments that have a published table, by name."""
    found = []
    for path in sorted(Path(str(resources.files("erasebench.conf"))).glob("experiment/*.yaml")):
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec = given.get("table") or {}
        task = next(
            (d["override /task"] for d in given["defaults"] if isinstance(d, dict) and "override /task" in d), None
        )
        field = SWEPT.get(spec.get("across"), spec.get("across"))
        swept = {*given.get("hydra", {}).get("sweeper", {}).get("params", {})}
        if spec.get("published"):
            single = swept <= {"method", field}
            found.append(Protocol(path.stem, task, spec.get("concepts", given.get("n")), spec, single))
    return tuple(found)


def protocols() -> tuple[Protocol, ...]:
    """Return the published tables that a single row can be compared with."""
    return tuple(one for one in published_tables() if one.task and one.is_single)


def options(row: Row) -> dict[str, str]:
    """Return option -> value on the row's command line."""
    words = json.loads(row.overrides or "[]")
    return {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in words}


def with_published(row: Row) -> Row:
    """Return the row with the published value, if a paper has one.

    The value is of the same world, task, method, number of concepts and metric.
    """
    if row.world != "photo" or (found := find_published(row)) is None:
        return row
    value, source = found
    return replace(row, published=value, published_source=source)


def find_published(row: Row) -> tuple[float, str] | None:
    """Return the published counterpart of a row, with its source.

    It has the same task, method, number of concepts and metric. On photographs the base and the number of images are
    the paper's too; on any other world nothing compares.
    """
    if row.status != "ok" or row.value is None or row.subset:
        return None
    said = options(row)
    # the row's own experiment first
    for protocol in sorted(protocols(), key=lambda one: one.name != said.get("experiment")):
        if (found := counterpart(protocol, row, said)) is not None:
            value, line = found
            return value, ", ".join(filter(None, [line["paper"], line["table"], line["base"] and f"of {line['base']}"]))
    return None


def counterpart(protocol: Protocol, row: Row, said: Mapping[str, str]) -> tuple[float, dict[str, str]] | None:
    """Return the published value of a row and its line.

    Returns None unless the row was measured by the protocol: its options are only those that select a run of it.
    """
    spec, metric = protocol.spec, FRECHET.get(row.metric, row.metric)
    if row.task != protocol.task or protocol.n not in (None, row.n_concepts):
        return None
    if (f"{row.attack}/{metric}" if row.attack else metric) not in spec["metrics"]:
        return None
    if (row := rename(row, spec["labels"])).method not in spec["labels"]:
        return None
    if not follows(protocol, said, {"n"} if protocol.n else set()):
        return None
    if spec.get("split") and row.split != spec["split"] and not row.attack and row.group != "quality":
        return None
    for key, found in cells(spec, [row]).items():
        wanted = spec.get("n", {}).get(key[2], row.n)
        for value, line in protocol.lines.get((key[0], key[1].lower(), key[2]), ()):
            if row.world != "photo" or (wanted == found.n and same_base(row.base, line["base"])):
                return value, line
    return None


def follows(protocol: Protocol, said: Iterable[str], also: Collection[str]) -> bool:
    """Return whether options only select a run of a protocol.

    The options in `also` are allowed too.
    """
    across = protocol.spec.get("across") or ""
    same = PROTOCOL | {across, SWEPT.get(across, across), *also}
    return all(key in same or key.startswith("model.") for key in said)


def same_base(ours: str, theirs: str) -> bool:
    """Return whether a base may be the paper's.

    SD v1.4 is sd14, and not sd21. A base that the configuration does not know may be any.
    """
    known = {f.name[:-5] for f in (resources.files("erasebench.conf") / "model").iterdir()}
    name = re.sub(r"[^a-z0-9]", "", theirs.lower().replace("v", ""))
    return ours not in known or not name or ours == name


def flaws(rows: Iterable[Row]) -> dict[str, str]:
    """Return run id -> reason why the run is broken; empty if it is not."""
    by_run: dict[str, list[Row]] = {}
    for row in rows:
        by_run.setdefault(row.run_id, []).append(row)
    return {run_id: "; ".join(breakage(own)) for run_id, own in by_run.items()}


def layout(spec: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a dictionary for each line and cell of the table.

    It has method, block, metric, value, low, high, n, the published value (under PAPER if it does not compare), and
    the reason why its run is broken.
    """
    broken = flaws(rows)
    measured, world = cells(spec, rows), rows[0].world if rows else ""
    paper = published(spec)
    methods, blocks = (list(dict.fromkeys(key[i] for key in measured)) for i in (0, 1))
    metrics = [metric for metric in spec["metrics"] if any(key[2] == metric for key in measured)]
    made = []
    for method in methods:
        for block in blocks:
            for metric in metrics:
                row = measured.get((method, block, metric))
                numbers = {name: getattr(row, name, None) for name in ("value", "low", "high", "n")}
                why = broken[row.run_id] if row else ""
                made.append({"method": method, "block": block, "metric": metric, **numbers, "broken": why})
        if spec.get("average") and len(blocks) > 1:
            for metric in metrics:
                own = [c for c in made if c["method"] == method and c["metric"] == metric]
                values, why = (
                    [c["value"] for c in own],
                    "; ".join(dict.fromkeys(filter(None, (c["broken"] for c in own)))),
                )
                nothing = dict.fromkeys(("value", "low", "high", "n", "deviation"))
                mean = {} if None in values else {"value": np.mean(values), "deviation": np.std(values)}
                made.append({"method": method, "block": AVERAGE, "metric": metric, **nothing, **mean, "broken": why})
    for cell in made:
        comparable = world == "photo" and spec.get("n", {}).get(cell["metric"], cell["n"]) == cell["n"]
        theirs = paper.get((cell["method"], cell["block"].lower(), cell["metric"]))
        cell["published"], cell[PAPER] = theirs if comparable else None, theirs if world != "photo" else None
        cell["raw"] = cell["metric"] in spec.get("raw", ())
    return made


def text(spec: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown.

    It has a block of lines for each value of `across`, with the metrics measured there: percent, intervals, and
    published values in brackets, or in a column of their own if they do not compare.
    """
    mark = " (published)" if any(cell["published"] is not None for cell in made) else ""
    lines = [f"# {spec['title']}", "", "Rates in percent; 95 % intervals, or the deviation over splits.", ""]
    for block in dict.fromkeys(cell["block"] for cell in made):
        lines += [f"## {spec['across'].replace('_', ' ')} {block}", ""] if block else []
        here = [cell for cell in made if cell["block"] == block]
        measured = {cell["metric"] for cell in here if cell["value"] is not None}
        metrics = [metric for metric in spec["metrics"] if metric in measured]
        beside = {cell["metric"] for cell in here if cell[PAPER] is not None}
        heads = [head for m in metrics for head in (m + mark, *[PAPER] * (m in beside))]
        lines += ["| method | " + " | ".join(heads) + " |", "| --- " * (len(heads) + 1) + "|"]
        for method in dict.fromkeys(cell["method"] for cell in here):
            own = [cell for cell in here if cell["method"] == method and cell["metric"] in metrics]
            shown = [part for cell in own for part in (said(cell), *[format_paper(cell)] * (cell["metric"] in beside))]
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
        lines.append("")
    why = dict.fromkeys((c["method"], c["block"], c["broken"]) for c in made if c["broken"] and c["value"] is not None)
    lines += [plain(f"{BROKEN} broken, no score: {' '.join(filter(None, said))}") + "\n" for said in why]
    return "\n".join(lines)


def said(cell: Mapping[str, Any]) -> str:
    if cell["value"] is None:
        return "not measured"
    show = partial(format_number, cell["raw"])
    number = show(cell["value"])
    if cell["low"] is not None:
        number += f" [{show(cell['low'])}, {show(cell['high'])}]"
    if cell.get("deviation") is not None:
        number += f" ± {show(cell['deviation'])}"
    number += f" {BROKEN}" if cell["broken"] else ""
    return number + (f" ({show(cell['published'])})" if cell["published"] is not None else "")


def format_paper(cell: Mapping[str, Any]) -> str:
    return "–" if cell[PAPER] is None else format_number(cell["raw"], cell[PAPER])


def format_number(is_raw: bool, value: float) -> str:
    return f"{value:.2f}" if is_raw else f"{100 * value:.1f}"


def figure(spec: Mapping[str, Any], made: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each metric of `figure` against `across`.

    Each method has a line, and intervals are bands; broken runs have no point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, len(spec["figure"]), figsize=(4 * len(spec["figure"]), 3.4), squeeze=False)
    for axis, metric in zip(axes[0], spec["figure"], strict=True):
        for method in dict.fromkeys(cell["method"] for cell in made):
            drawn = [c for c in made if c["value"] is not None and not c["broken"]]
            own = [c for c in drawn if c["method"] == method and c["metric"] == metric]
            own.sort(key=lambda c: float(c["block"]))
            x = [float(c["block"]) for c in own]
            axis.plot(x, [c["value"] for c in own], marker="o", markersize=3, label=method)
            axis.fill_between(
                x, *([c[k] if c[k] is not None else c["value"] for c in own] for k in ("low", "high")), alpha=0.15
            )
        axis.set(xscale="log", xlabel=spec["across"].replace("_", " "), title=metric, ylim=(-0.02, 1.02))
        axis.set_xticks(
            sorted({float(c["block"]) for c in made}), [f"{x:g}" for x in sorted({float(c["block"]) for c in made})]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][-1].legend(frameon=False, fontsize=8)
    drawing.tight_layout()
    drawing.savefig(buffer := io.BytesIO(), dpi=120)
    pyplot.close(drawing)
    replace_file(path, buffer.getvalue())


def before(path: Path) -> list[dict[str, str]]:
    """Return the cells of an earlier version of a table.

    Empty if there is none that can be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def _values(cells: Sequence[Mapping[str, Any]]) -> int:
    return sum(cell.get("value") not in (None, "") for cell in cells)


def show(name: str, spec: Mapping[str, Any], rows: Sequence[Row], results: Path) -> None:
    """Print the table, and write it as <results>/<name>.md and .csv.

    Its figure is drawn too, if it has one. The files stay as they were if runs failed and the table has fewer values
    than before.
    """
    made = layout(spec, rows)
    if not made:
        log.warning("table %s is empty: no run measured %s", name, ", ".join(spec["metrics"]))
    print(text(spec, made))
    buffer = io.StringIO()
    columns = ["method", "block", "metric", "value", "low", "high", "deviation", "n", "published", PAPER, "broken"]
    write_table([columns, *([cell.get(column) for column in columns] for cell in made)], buffer)
    if any(row.status == "failed" for row in rows) and _values(made) < _values(before(results / f"{name}.csv")):
        log.warning("table %s: some of its runs failed, and %s stays as it was", name, results / f"{name}.md")
        return
    check_writable(results)
    replace_file(results / f"{name}.csv", buffer.getvalue().encode())
    replace_file(results / f"{name}.md", text(spec, made).encode())
    if spec.get("figure") and made:
        try:
            figure(spec, made, results / f"{name}.png")
        except ImportError:
            log.warning("no figure: matplotlib is not installed (pip install 'erasebench[plots]')")
    log.info("table in %s", results / f"{name}.md")
