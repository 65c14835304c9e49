"""The answer of a run in some ten lines: forgetting, keeping, quality, broken images, attacks and cost."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..rows import Row
from .leaderboard import ARROWS, Column
from .runs import BROKEN, Run, plain

HEADLINES = {"overall": 1, "forget": 2, "keep": 1, "quality": 2}  # metrics of each group that are printed
HEAD = ["", "metric", "value", "95 %", "base", "", "n"]
SPENT = ("fit_seconds", "sample_seconds")
ATTACKS = "[cce,udatk,random_prefix]"  # suggested to who has attacked nothing yet: two gradients and a null attack
BAR = 8  # characters of a bar from 0 to 1
FIRST = ("clip_score", "fd_")  # of the metrics of quality, before those of composition


def choose(run: Run) -> Iterator[tuple[str, Row]]:
    """Yield pairs of a word and its row, at most a dozen."""
    cells = [row for row in run.cells.values() if not row.attack]
    for group, most in HEADLINES.items():
        some = [row for row in cells if row.group == group and not row.metric.startswith((BROKEN, "same_"))]
        some.sort(key=lambda row: (not row.metric.startswith(FIRST), not is_rate(row)))
        yield from ((group, row) for row in some[:most])
    if broken := [row for row in cells if row.metric.startswith(BROKEN)]:
        yield "broken", max(broken, key=lambda row: row.value)
    yield from (("attack", row) for row in run.cells.values() if row.metric == "asr" and row.group == "attack")
    yield from (("cost", row) for row in cells if row.metric in SPENT)


def is_rate(row: Row) -> bool:
    return row.ci_method.startswith("wilson") or row.metric.startswith(("h_", "acc_"))


def cells_of(word: str, row: Row) -> list[str]:
    """Words of a line: kind, metric, value, interval, the base's value, better direction, n."""
    column = Column(row.metric, {row.run_id: row}, {})
    name = f"{row.metric} {row.attack}".strip()
    base = "" if row.base_value is None else column.text(row.base_value)
    count = "" if row.n is None else str(row.n)
    return [word, plain(name), column.text(row.value), column.interval(row), base, ARROWS[row.higher_is_better], count]


def suggest(run: Run, file: Path) -> list[str]:
    """Two command lines to go on with."""
    again = [word for word in run.overrides if not word.startswith("attack=")]
    line = lambda *words: shlex.join(["erasebench", *words])
    if run.head.method == "none":
        first = line(*(word for word in again if not word.startswith("method=")), "method=uce")
    elif not run.attacks:
        first = line(*again, f"attack={ATTACKS}")
    else:
        other = "esd" if run.head.method == "uce" else "uce"
        words = (f"method={run.head.method},{other}" if word.startswith("method=") else word for word in again)
        first = line("compare", *words)
    results = file.parent.parent
    return [first, line("leaderboard", *([] if results == Path("results") else ["--results", str(results)]))]


def tell(rows: Sequence[Row], file: Path, stream: TextIO | None = None) -> None:
    """Print the answer of a run's rows, which lie in `file`: a table on a terminal, plain lines elsewhere."""
    stream = stream or sys.stdout
    run = Run(tuple(rows), file.with_suffix(".webp"))
    lines = [(cells_of(word, row), row) for word, row in choose(run)]
    about = [f"{run.method}, {run.head.task}: {plain(run.head.target or run.head.n_concepts)}, {run.head.base}"]
    about += [f"not ranked: {flaw}" for flaw in run.flaws]
    about += [f"a subset of {run.cut} images a split: too few to conclude from"] if run.cut else []
    after = [f"next: {command}" for command in suggest(run, file)]
    if stream.isatty():
        draw(about, lines, after)
        return
    table = [HEAD, *(cells for cells, _ in lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    body = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    print(*about, *body, *after, sep="\n", file=stream)


def draw(about: Sequence[str], lines: Sequence[tuple[list[str], Row]], after: Sequence[str]) -> None:
    """The same with colours and bars; rich leaves colours out under NO_COLOR."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=False, no_color="NO_COLOR" in os.environ or None)
    table = Table(box=None, pad_edge=False)
    for head in (*HEAD, ""):
        table.add_column(head, justify="right" if head in ("value", "base", "n") else "left", no_wrap=True)
    for cells, row in lines:
        share = row.value if is_rate(row) and 0 <= row.value <= 1 else None
        bar = "" if share is None else "█" * round(BAR * share) + "░" * (BAR - round(BAR * share))
        table.add_row(*cells, bar)
    console.print(about[0], style="bold")
    for line in about[1:]:
        console.print(line, style="yellow")
    console.print(table)
    for line in after:
        console.print(line, style="cyan")
