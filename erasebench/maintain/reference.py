"""Update of results/reference from conf/reference.yaml: python -m erasebench reference

    python -m erasebench reference --dry-run       lists the missing runs, and about how long they take
    python -m erasebench reference                 makes them; stopped anywhere, it goes on from there
    python -m erasebench reference --sheets        also makes missing sheets of images, from the store or anew
    python -m erasebench reference --prune         also drops runs from rows.parquet that the list no longer asks for

A run is named after everything that decides its rows (method, values, versions, prompts, judges, base). A run whose
rows are in results/reference/rows.parquet or runs/ is not made again; if any of that changes, its name does too.
Runs that the list no longer asks for are named at the end. Finished rows are packed into rows.parquet; runs/, with
its sheets of images, and the pages are not in git.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .. import config
from ..analysis import compare
from ..contracts import ErasebenchError
from ..report import leaderboard, row_table
from ..report.runs import plain
from . import readme

if TYPE_CHECKING:
    from ..rows import Row
    from ..run.specification import Run

LIST = Path(str(resources.files("erasebench.conf"))) / "reference.yaml"
PLACE = Path("results/reference")


@dataclass(frozen=True)
class Line:
    """Line of the list: its words, and the runs that they compose to."""

    words: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def compares(self) -> bool:
        return self.words[0] == "compare"

    @property
    def made(self) -> bool:
        if self.compares:
            return compare.place(compare.pairs(self.runs)).is_file()
        return all(found(run) is not None for run in self.runs)


def listed(path: Path) -> list[list[str]]:
    """Return the arguments of each command in the list.

    They follow `python -m erasebench`; those of `compare ...` follow `python -m erasebench compare`.
    """
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [shlex.split(words.replace("${every}", ",".join(every_method()))) for words in given["runs"]]


def every_method() -> list[str]:
    """Return all methods with a configuration that does not leave them out."""
    said = readme.listed(LIST.parent / "method")
    return [method for method, notes in said.items() if not notes.get("reference", "").startswith(readme.LEFT_OUT)]


def composed(words: Sequence[str], place: Path) -> Line:
    runs: list[Run] = []
    collect = lambda every, uncounted, rate: runs.extend(every)
    if config.main(lambda run: [], [*typed(words, place), "dry_run=true"], collect) or not runs:
        raise ErasebenchError(f"conf/reference.yaml: {shlex.join(words)} makes no run")
    return Line(tuple(words), tuple(runs))


def typed(words: Sequence[str], place: Path) -> list[str]:
    said = ["-m", *words[1:]] if words[0] == "compare" else list(words)
    return [*said, f"results={json.dumps(str(place))}"]


def found(run: Run) -> list[Row] | None:
    """Return the run's rows, or None.

    They count only if all have today's schema and none failed.
    """
    try:
        there = row_table.read_place(row_table.place(run.results, run.id))
    except ErasebenchError:
        return None
    return there if there and all(row.status != "failed" for row in there) else None


def spent(place: Path) -> Callable[[Run], float | None]:
    """Return a function that estimates a run's seconds from earlier rows.

    It uses rows of the same method, task and attacks, or the nearest ones; it returns None if there are none.
    """
    known: dict[tuple, float] = {}
    for path in row_table.list_places(place):
        try:
            read = row_table.read_place(path)
        except ErasebenchError:
            continue
        attacks = {row.attack: (row.fit_seconds or 0) + (row.sample_seconds or 0) for row in read if row.attack}
        head = next((row for row in read if not row.attack and row.fit_seconds is not None), None)
        if head is not None:
            seconds = head.fit_seconds + (head.sample_seconds or 0)
            known[head.method, head.task, head.target or head.n_concepts] = known[head.method, head.task] = seconds
            known[(head.method,)] = seconds
            known |= {("attack", name): value for name, value in attacks.items()}

    def guess(run: Run) -> float | None:
        keys = (
            (run.method, run.plan.task, run.target or len(run.plan.concepts)),
            (run.method, run.plan.task),
            (run.method,),
        )
        alone = next((known[key] for key in keys if key in known), None)
        under = [known.get(("attack", name)) for name in run.attacks]
        return None if alone is None or None in under else alone + sum(under)

    return guess


def tell(lines: Sequence[Line], place: Path) -> None:
    """Print the missing runs and about how long they take."""
    guess, total, unknown, missing = spent(place), 0.0, 0, {}
    for line in lines:
        for run in line.runs:
            if not line.compares and found(run) is None:
                missing[run.id] = run
        if line.compares and not line.made:
            print(plain(f"missing: {shlex.join(line.words)}: {len(line.runs)} runs, and what they show compared"))
    for name, run in missing.items():
        seconds = guess(run)
        total, unknown = total + (seconds or 0), unknown + (seconds is None)
        print(plain(f"missing: {name}: " + ("no run like it yet" if seconds is None else f"about {seconds:.0f} s")))
    asked = {run.id: line.compares for line in reversed(lines) for run in line.runs}
    counted = sum(not compares for compares in asked.values())
    print(
        f"{counted - len(missing)} of {counted} runs are there; the others take about {total / 3600:.1f} hours of "
        f"this machine" + (f", and {unknown} of which no run tells" if unknown else "")
    )
    for run_id in find_unlisted(lines, place):
        path = row_table.place(place, run_id)
        print(plain(f"left over: {path if path.exists() else f'{run_id} in {place / row_table.TABLE}'}"))


def find_unlisted(lines: Sequence[Line], place: Path) -> list[str]:
    """Return the runs that no line of the list asks for."""
    asked = {run.id for line in lines for run in line.runs}
    return [path.stem for path in row_table.list_places(place) if path.stem not in asked]


def lacks_sheet(run: Run) -> bool:
    """Return whether the run's sheet of images is missing.

    Explicit tasks have no sheet.
    """
    return not run.plan.explicit and not row_table.place(run.results, run.id).with_suffix(".webp").is_file()


def make(lines: Sequence[Line], place: Path, without: Sequence[str] = (), sheets: bool = False) -> int:
    """Make all missing runs, line by line, and pack their rows.

    Returns 1 if any run failed.
    """
    from ..run.run import execute

    failed, kept = 0, lambda run: None if sheets and lacks_sheet(run) else found(run)
    for line in lines:
        if not line.made and line.compares:
            failed |= compare.report(line.runs)
        # an experiment's table is written from all of its rows
        elif not line.compares and (sheets or not line.made or "experiment=" in shlex.join(line.words)):
            failed |= config.main(lambda run: kept(run) or execute(run), typed(line.words, place))
    row_table.pack(place, without)
    leaderboard.build(place)
    return int(bool(failed))


def bring_up_to_date(
    dry_run: bool = False, prune: bool = False, sheets: bool = False, path: Path = LIST, place: Path = PLACE
) -> int:
    """Make the runs of a list that a place lacks.

    Returns an exit code.
    """
    try:
        lines = [composed(words, place) for words in listed(path)]
        tell(lines, place)
        return 0 if dry_run else make(lines, place, find_unlisted(lines, place) if prune else (), sheets)
    except ErasebenchError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
