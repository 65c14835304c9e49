"""Agreement of measured rows with published tables: python -m erasebench agreement [ROWS ...]

ROWS are folders of runs, files of rows, or Parquet files that --keep wrote; version 1 of the embedded world, which
comes with the package, stands beside them. An experiment (conf/experiment) names the published table that is its
counterpart, and the names of methods, metrics and blocks there.

    column  one metric of one block. Its methods are ranked by the published and by the measured values, and Spearman's rho
            (Spearman, 1904) compares the ranks; ties share their mean rank, as in scipy.stats.spearmanr. Fewer than three
            methods in common, or one value for all of them, give no rank: the column is missing, and does not count as 0.
    table   the mean of its columns' rho.
    mean    of the tables that have a value, each counted once.

Intervals are percentile bootstraps over methods: each table draws its methods with replacement, one draw for all its
columns, and the mean's interval is that of the mean of such draws. With three methods such an interval says next to
nothing. The unerased base is not an erasure method and is left out; rho with it stands beside, and is higher, as the
base is easy to place. Broken runs count, as papers count all images of a method, and are named.
"""

from __future__ import annotations

import io
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from .. import rows
from ..contracts import ErasebenchError
from ..rows import Row
from ..stats import interval
from . import row_table, tables
from .runs import BROKEN, SAME, json_of, plain

LEAST = 3  # methods that a published column must share with the rows
RESAMPLES = 2000
BASE = "none"  # the method that erases nothing
ALSO = {"target", "n", "task.split"}  # further options that rows compared with a table may have


@dataclass(frozen=True)
class Column:
    """Metric in one block of a published table.

    `published` and `measured` map method -> value.
    """

    block: str
    metric: str
    published: Mapping[str, float]
    measured: Mapping[str, float]

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.block, self.metric)))

    def common(self, with_base: bool) -> list[str]:
        """Return the methods that have both values."""
        return [m for m in self.published if m in self.measured and (with_base or m != BASE)]

    def values(self, methods: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return published and measured values of these methods [M], [M].

        A missing value is NaN.
        """
        known = self.common(with_base=True)
        return tuple(
            np.array([side[m] if m in known else math.nan for m in methods]) for side in (self.published, self.measured)
        )

    def flaw(self, with_base: bool) -> str:
        """Return why the column has no rank correlation; empty if it has one."""
        if sum(with_base or m != BASE for m in self.published) < LEAST:
            return "fewer than three methods published"
        methods = self.common(with_base)
        if len(methods) < LEAST:
            return f"only {', '.join(methods)} in common" if methods else "not measured"
        for name, side in (("published", self.published), ("measured", self.measured)):
            if len({side[m] for m in methods}) == 1:
                return f"constant: every {name} value is {side[methods[0]]:g}"
        return ""


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of one table, or the mean over tables.

    low, high: its interval; draws: its bootstrap draws [RESAMPLES]; sizes: number of methods in each column.
    """

    value: float
    low: float
    high: float
    draws: np.ndarray
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """Published table beside its counterpart in the rows."""

    name: str
    measured_on: str  # task and concepts of the rows; empty if there are none
    is_stand_in: bool  # measured on another task, concept or number of concepts than the published one
    columns: tuple[Column, ...]
    unlabelled: tuple[str, ...]  # published methods that have no name of ours
    broken: tuple[str, ...]  # methods of broken runs

    def usable(self, with_base: bool = False) -> list[Column]:
        return [column for column in self.columns if not column.flaw(with_base)]

    @cached_property
    def agreement(self) -> Agreement | None:
        return correlate(self, with_base=False)

    @cached_property
    def with_base(self) -> Agreement | None:
        return correlate(self, with_base=True)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rho along the last axis [..., M].

    Only pairs without NaN count. NaN if a side is constant.
    """
    known = np.isfinite(x) & np.isfinite(y)
    count = np.maximum(known.sum(-1, keepdims=True), 1)
    centred = []
    for side in (x, y):
        ranks = rankdata(np.where(known, side, np.inf), axis=-1)  # the unknown come last, and leave the others' ranks alone
        centred.append(np.where(known, ranks - np.where(known, ranks, 0).sum(-1, keepdims=True) / count, 0))
    a, b = centred
    spread = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), spread, out=np.full(spread.shape, np.nan), where=spread > 1e-9)


def average_known(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis [K, ...], ignoring NaN.

    NaN if no value is known.
    """
    known = np.isfinite(values)
    count = known.sum(0)
    total = np.where(known, values, 0).sum(0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def correlate(table: Table, with_base: bool, seed: int = 0) -> Agreement | None:
    """Return the mean of the columns' rho, with its bootstrap interval.

    The bootstrap is over methods. Returns None if no column has a rank correlation.
    """
    columns = table.usable(with_base)
    if not columns:
        return None
    methods = list(dict.fromkeys(m for column in columns for m in column.common(with_base)))
    sides = [column.values(methods) for column in columns]
    value = float(np.mean([spearman(x, y) for x, y in sides]))
    rng = np.random.default_rng([seed, zlib.crc32(table.name.encode())])
    drawn = rng.integers(len(methods), size=(RESAMPLES, len(methods)))
    # a draw of one single method has no ranks
    draws = average_known(np.stack([spearman(x[drawn], y[drawn]) for x, y in sides]))
    sizes = tuple(len(column.common(with_base)) for column in columns)
    return Agreement(value, *interval(draws, value), draws, sizes)


def average(found: Iterable[Agreement | None]) -> Agreement | None:
    """Return the mean over the tables that have a value.

    Their draws are independent of one another.
    """
    known = [one for one in found if one is not None]
    if not known:
        return None
    value, draws = float(np.mean([one.value for one in known])), average_known(np.stack([one.draws for one in known]))
    return Agreement(value, *interval(draws, value), draws)


def choose(protocol: tables.Protocol, some: Sequence[Row], blocks: set[str]) -> tuple[list[Row], bool]:
    """Return the rows to compare with a table, and their stand-in status.

    Rows stand in if they are of another concept or another number of concepts. Rows of the published concepts, and
    of the same number, are chosen if three methods have them; else the rows of the concepts that most methods share,
    ties go to the largest number of concepts.
    """
    across = protocol.spec.get("across") or ""
    if across not in ("", "target"):
        return list(some), False
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in some:
        groups.setdefault((row.n_concepts, row.target), []).append(row)
    methods = lambda key: len({row.method for row in groups[key]} - {BASE})
    best = lambda keys: max(keys, key=lambda key: (methods(key), key), default=None)
    whole = blocks == {tables.AVERAGE}
    right = [
        key
        for key in groups
        if protocol.n in (None, key[0]) and (not across or whole or key[1].lower() in blocks) and methods(key) >= LEAST
    ]
    if across and right and not (whole and len(right) == 1):
        return [row for key in right for row in groups[key]], False
    key = best(right if not across and right else groups)
    return (groups[key], key not in right or bool(across)) if key else ([], False)


def find_cells(protocol: tables.Protocol, some: Sequence[Row], blocks: set[str]) -> tuple[dict, str, bool, list[str]]:
    """Return (cells, measured on, whether they stand in, broken methods).

    cells: (block, metric) -> method -> value; measured on: task and concepts of the rows; broken methods: methods of
    broken runs.
    """
    spec, labels = protocol.spec, protocol.spec["labels"]
    # runs of the experiment itself take precedence, then lower seeds: the last row counts in a layout
    order = lambda row: (tables.options(row).get("experiment") == protocol.name, -(row.seed or 0), row.split == spec.get("split"))
    for task in filter(None, (protocol.task, spec.get("stand_in"))):
        own = [row for row in some if row.task == task and not row.subset]
        own = [tables.rename(row, labels) for row in own if tables.follows(protocol, tables.options(row), ALSO)]
        chosen, stands = choose(protocol, [row for row in own if row.method in labels], blocks)
        if len({row.method for row in chosen} - {BASE}) >= LEAST:
            break
    if not chosen:
        return {}, "", False, []
    laid = tables.layout(spec, sorted(chosen, key=order))
    found: dict[tuple[str, str], dict[str, float]] = {}
    broken = list(dict.fromkeys(cell["method"] for cell in laid if cell["broken"] and cell["value"] is not None))
    for cell in laid:
        if cell["value"] is not None and math.isfinite(cell["value"]):
            for block in blocks if stands else [cell["block"].lower()]:
                found.setdefault((block, cell["metric"]), {})[cell["method"]] = float(cell["value"])
    concepts = dict.fromkeys(row.target or f"{row.n_concepts} concepts" for row in chosen)
    return found, f"{task}: {', '.join(concepts)}", stands or task != protocol.task, broken


def compare(protocol: tables.Protocol, some: Sequence[Row]) -> Table:
    """Return a published table beside the rows.

    It has every published column, with the measured values.
    """
    published: dict[tuple[str, str], dict[str, float]] = {}
    for (method, block, metric), value in tables.published(protocol.spec).items():
        published.setdefault((block, metric), {})[method] = value
    cells, measured_on, stands, broken = find_cells(protocol, some, {block for block, _ in published})
    columns = [Column(*key, values, cells.get(key, {})) for key, values in published.items()]
    return Table(protocol.name, measured_on, stands, tuple(columns), find_unlabelled(protocol.spec), tuple(broken))


def find_unlabelled(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the methods of a published table that have no label."""
    names = dict.fromkeys(line["method"] for line in tables.printed_lines(spec))
    return tuple(name for name in names if name and name not in spec["labels"].values())


def compare_all(some: Sequence[Row]) -> list[Table]:
    """Return every published table with labels for its methods, beside these rows."""
    return [compare(protocol, some) for protocol in tables.published_tables() if protocol.spec.get("labels")]


# --- rows, as files


def select(some: Iterable[Row]) -> list[Row]:
    """Return the rows that a published table can be compared with.

    Includes the rows that show whether a run is broken.
    """
    names = {name for protocol in tables.published_tables() for name in protocol.spec["metrics"]}
    methods = {label.split()[0] for one in tables.published_tables() for label in one.spec.get("labels", {})}
    wanted = lambda row: (f"{row.attack}/{row.metric}" if row.attack else row.metric) in names
    flags = lambda row: row.metric.startswith((BROKEN, SAME))
    return [row for row in some if row.status == "ok" and row.method in methods and (wanted(row) or flags(row))]


def read(path: Path) -> list[Row]:
    """Return the rows of a folder, a CSV or a Parquet file.

    Raises ErasebenchError in one line if there are none.
    """
    if path.is_dir():
        results = (path / "runs").is_dir() or (path / row_table.TABLE).is_file()
        found = row_table.read_all(path) if results else rows.read_all(path)
    else:
        found = row_table.read(path) if path.suffix == ".parquet" else rows.read(path)
    if not found:
        raise ErasebenchError(f"{path}: no rows")
    for row in found:
        words = json_of(row.overrides, list)
        is_list = all(isinstance(word, str) for word in words) and (words or row.overrides in ("", "[]"))
        if not is_list or not (json_of(row.params) or row.params in ("", "{}")):
            raise ErasebenchError(f"{path}: run {plain(row.run_id)[:60]}: params or overrides are no JSON of ours")
    return found


def split_by_base(name: str, some: Sequence[Row]) -> dict[str, list[Row]]:
    """Return name -> rows of one base.

    Several bases, or revisions of one, are several models.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in some:
        found.setdefault((row.base, row.revision), []).append(row)
    if len(found) == 1:
        return {name: list(some)}
    return {plain(f"{name} {base} {revision[:8]}".rstrip()): own for (base, revision), own in found.items()}


# --- output


def show(found: Agreement | None) -> str:
    return "none" if found is None else f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def show_sizes(sizes: Sequence[int]) -> str:
    if not sizes:
        return ""
    low, high = min(sizes), max(sizes)
    return f"{low}" if low == high else f"{low} to {high}"


def render(sets: Mapping[str, Sequence[Table]]) -> str:
    """Return the agreement as Markdown: one table, then details.

    Each set of rows has its number of methods, its rho and its rho with the base; columns and missing values follow.
    """
    lines = ["# Agreement with published tables", "", *NOTE, ""]
    head = ["table", *(f"{name}: {what}" for name in sets for what in ("methods", "rho", "with the base"))]
    lines += ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    names = [table.name for table in next(iter(sets.values()))]
    each = {name: {table.name: table for table in found} for name, found in sets.items()}
    for name in names:
        found = [each[one][name] for one in sets]
        if any(table.agreement or table.with_base for table in found):
            cells = [cell for table in found for cell in summarize(table)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = [cell for found in sets.values() for cell in summarize_mean(found)]
    lines += [f"| mean | {' | '.join(means)} |", ""]
    for name, found in sets.items():
        lines += [f"## {name}: columns", "", *list_columns(found), "", f"## {name}: missing", "", *list_missing(found), ""]
    return "\n".join(lines)


NOTE = (
    "Spearman's rank correlation of methods, published against measured: a table is the mean of its columns, a column one metric",
    "of one block; the mean is over tables. Brackets: 95 % percentile bootstrap over methods, drawn within each table; of three",
    "methods (‡) it says next to nothing. Without the unerased base, which is easy to place; with it, beside. † measured on another",
    "task, concept or number of concepts than the published one. A column with fewer than three methods in common, or with one",
    "value for all of them, has no rank: it is missing, and does not count. Broken runs count, and are named at the end.",
)


def summarize(table: Table) -> list[str]:
    sizes = table.agreement.sizes if table.agreement else ()
    few = " ‡" if sizes and max(sizes) == LEAST else ""
    mark = " †" if table.is_stand_in and sizes else ""
    return [show_sizes(sizes) + mark, show(table.agreement) + few, show(table.with_base)]


def summarize_mean(found: Sequence[Table]) -> list[str]:
    count = sum(table.agreement is not None for table in found)
    return [f"{count} tables", show(average(t.agreement for t in found)), show(average(t.with_base for t in found))]


def rho(column: Column, with_base: bool = False) -> float | None:
    """Return Spearman's rho of one column, or None without one."""
    return None if column.flaw(with_base) else float(spearman(*column.values(column.common(with_base))))


def list_columns(found: Sequence[Table]) -> list[str]:
    """Return a line for each table that has a value.

    It names the task and concepts of the rows, and each column's rho with its number of methods.
    """
    lines = []
    for table in found:
        each = [
            f"{column.name} {rho(column):+.2f} ({len(column.common(with_base=False))})" for column in table.usable()
        ]
        if each:
            lines.append(plain(f"- {table.name} (measured on {table.measured_on}): {', '.join(each)}"))
    return lines


def list_missing(found: Sequence[Table]) -> list[str]:
    """Return a line for each table that lacks something.

    It names columns without a rank, methods without a value, and methods that are not ours.
    """
    lines = []
    for table in found:
        reasons: dict[str, list[Column]] = {}
        for column in table.columns:
            absent = [method for method in column.published if method not in column.measured]
            why = column.flaw(with_base=False) or (f"without {', '.join(absent)}" if absent else "")
            reasons.setdefault(why, []).append(column)
        said = [f"{name_all(some, table.columns)}: {why}" for why, some in reasons.items() if why]
        said += [f"broken: {', '.join(table.broken)}"] * bool(table.broken)
        said += [f"published, but no method of ours: {', '.join(table.unlabelled)}"] * bool(table.unlabelled)
        if said:
            lines.append(plain(f"- {table.name}: {'; '.join(said)}"))
    return lines


def name_all(some: Sequence[Column], every: Sequence[Column]) -> str:
    """Return the names of columns; those with equal metrics share an entry."""
    if len(some) == len(every):
        return "every column"
    metrics: dict[str, list[str]] = {}
    for column in some:
        metrics.setdefault(column.block, []).append(column.metric)
    blocks: dict[tuple[str, ...], list[str]] = {}
    for block, names in metrics.items():
        blocks.setdefault(tuple(names), []).append(block)
    return ", ".join(
        ", ".join(names) + (f" of {' and '.join(where)}" if any(where) else "") for names, where in blocks.items()
    )


HEAD = ("rows", "table", "block", "metric", "methods", "n", "rho", "low", "high", "rho_with_base", "measured_on")
HEAD += ("stand_in", "missing", "why")


def list_lines(name: str, found: Sequence[Table]) -> list[list[Any]]:
    """Return the lines of the CSV.

    There is one for each column, each table (no block and metric), and the mean (table `mean`).
    """
    made: list[list[Any]] = []
    ends = lambda one: [one.value, one.low, one.high] if one else [None] * 3
    for table in found:
        for column in table.columns:
            methods = column.common(with_base=False)
            absent = ", ".join(m for m in column.published if m not in column.measured)
            own = [name, table.name, column.block, column.metric, ", ".join(methods), len(methods), rho(column), None, None]
            own += [rho(column, with_base=True), table.measured_on, table.is_stand_in]
            made.append([*own, absent, column.flaw(with_base=False)])
        beside = table.with_base.value if table.with_base else None
        size = max(table.agreement.sizes) if table.agreement else 0
        own = [name, table.name, "", "", "", size, *ends(table.agreement), beside]
        made.append([*own, table.measured_on, table.is_stand_in, "", "" if table.agreement else "no column with a rank"])
    whole, beside = average(t.agreement for t in found), average(t.with_base for t in found)
    made.append([name, "mean", *[""] * 3, None, *ends(whole), beside.value if beside else None, *[""] * 4])
    return made


def write(sets: Mapping[str, Sequence[Table]], folder: Path) -> list[Path]:
    """Write agreement.md and agreement.csv.

    Raises ErasebenchError if the folder cannot be written.
    """
    rows.write_table([HEAD, *(line for name, found in sets.items() for line in list_lines(name, found))], stream := io.StringIO())
    rows.check_writable(folder)
    paths = [folder / "agreement.md", folder / "agreement.csv"]
    for path, text in zip(paths, (render(sets), stream.getvalue()), strict=True):
        rows.replace_file(path, text.encode(), option="--folder")
    return paths


def report(rows: Sequence[Path], folder: Path, keep: Path | None) -> int:
    """Print and write the agreement, or keep rows.

    Returns 1 if a file cannot be used.
    """
    sys.stdout.reconfigure(errors="backslashreplace")
    first = Path(str(resources.files("erasebench.results") / "agreement" / "version1.parquet"))
    try:
        if keep:
            some = select(row for path in rows for row in read(path))
            if not some:
                raise ErasebenchError("no row that a published table can be held against: nothing to keep")
            row_table.write(some, keep, row_table.KEPT, option="--keep")
            print(keep)
            return 0
        sets: dict[str, list[Row]] = {}
        for path in dict.fromkeys([first, *rows]):
            name = path.stem if path.suffix and path.stem not in sets else str(path)
            sets |= split_by_base(name, read(path))
        found = {name: compare_all(own) for name, own in sets.items()}
        paths = write(found, folder)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render(found), *paths, sep="\n")
    return 0
