"""Claims of papers (conf/claims.yaml), judged by rows: holds, does not hold, or undecided.

python -m erasebench claims                                  # of results/runs
python -m erasebench claims --results results/reference
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ..rows import Row
from .runs import Run, plain

if TYPE_CHECKING:
    from .leaderboard import Comparison, Group


@dataclass(frozen=True)
class Finding:
    """Verdict of one group of runs, or one comparison, on a claim."""

    says: str
    paper: str
    where: str
    anchor: str
    measured: str
    verdict: str


@cache
def listed() -> list[dict[str, Any]]:
    path = resources.files("erasebench.conf") / "claims.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]


def findings(groups: Sequence[Group], compared: Sequence[Comparison]) -> list[Finding]:
    """Return the findings in the order of the claims.

    A claim without rows has none.
    """
    found = []
    for claim in listed():
        for comparison in compared if "sides" in claim else ():
            found += of_comparison(claim, comparison)
        for group in groups if "method" in claim else ():
            for method in several(claim["method"]):
                found += of_group(claim, method, group)
    return found


def of_comparison(claim: dict, comparison: Comparison) -> Iterator[Finding]:
    if not all(label.startswith(side) for label, side in zip(comparison.sides, claim["sides"], strict=True)):
        return
    for line in comparison.lines:
        if line.found.metric in several(claim["column"]):
            verdict = {"better": "holds", "worse": "does not hold"}.get(line.verdict, "undecided")
            measured = f"{line.metric} {line.first}, then {line.second}: {line.difference} {line.interval}"
            measured += f", p = {line.p}" if line.p else ""
            yield Finding(
                claim["says"], claim["paper"], comparison.facts[0], comparison.anchor, plain(measured), verdict
            )


def of_group(claim: dict, method: str, group: Group) -> Iterator[Finding]:
    cells = lambda name: next((c for c in map(merged, group.together) if c[0] == name and configured(c[1])), None)
    mine = cells(method)
    for column in several(claim["column"]) if mine else ():
        if (row := at(mine[2], column)) is None:
            continue
        if "fewer_than" in claim:
            others = {name: at(found[2], column) for name in claim["fewer_than"] if (found := cells(name))}
            if len(others) < len(claim["fewer_than"]) or None in others.values():
                continue
            verdict = judged(
                row.high < min(o.low for o in others.values()), any(row.low > o.high for o in others.values())
            )
            beside = "; " + ", ".join(f"{name} {said(other)}" for name, other in others.items())
        elif "above_fixed" in claim:
            if (level := interpolated(claim, mine, group)) is None:
                continue
            verdict, beside = judged(row.low > level, row.high < level), f"; fixed {level:.3f}"
        else:
            low, high = claim.get("at_least", -np.inf), claim.get("at_most", np.inf)
            verdict = judged(row.low >= low and row.high <= high, row.high < low or row.low > high)
            beside = ""
        says = claim["says"].format(method=method)
        measured = plain(f"{column} {said(row)}{beside}")
        yield Finding(says, claim["paper"], group.title, group.anchor, measured, verdict)


def interpolated(claim: dict, mine: tuple, group: Group) -> float | None:
    """Return a column's value for fixed parameters at the same forgetting.

    Interpolates between the runs with fixed values of the claim's parameter, at this run's value of the column
    `forgets`. Returns None outside of their range.
    """
    ends = [
        (at(cells, claim["forgets"]), at(cells, claim["column"]), run) for _, run, cells in map(merged, group.together)
    ]
    fixed = sorted(
        (forgets.value, keeps.value)
        for forgets, keeps, run in ends
        if run.head.method == mine[0] and None not in (forgets, keeps, run.params.get(claim["above_fixed"]))
    )
    here = at(mine[2], claim["forgets"])
    if len(fixed) < 2 or here is None or not fixed[0][0] <= here.value <= fixed[-1][0]:
        return None
    return float(np.interp(here.value, *zip(*fixed, strict=True)))


def merged(same: Sequence[Run]) -> tuple[str, Run, dict[tuple, Row]]:
    """Return (method, run, cells) of runs that differ only in their attacks."""
    return same[0].head.method, same[0], {key: row for run in same for key, row in run.cells.items()}


def configured(run: Run) -> bool:
    """Return whether a run has the hyperparameters of its configuration.

    Either `told` is empty, or its command line sets none of the method's parameters.
    """
    return not run.told or not any(word.lstrip("+").startswith("method.") for word in run.overrides)


def at(cells: dict[tuple, Row], column: str) -> Row | None:
    """Return the first row of a metric that has an interval.

    "asr cce" is the metric asr under the attack cce.
    """
    metric, _, attack = column.partition(" ")
    rows = (row for row in cells.values() if (row.metric, row.attack) == (metric, attack))
    return next((row for row in rows if None not in (row.low, row.high)), None)


def several(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def said(row: Row) -> str:
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def judged(better: bool, worse: bool) -> str:
    return "holds" if better else "does not hold" if worse else "undecided"


def report(results: Path) -> int:
    """Print each claim with evidence in the rows; returns an exit status.

    The status is 1 if a file cannot be used or no claim has evidence.
    """
    from .leaderboard import comparisons, load

    sys.stdout.reconfigure(errors="backslashreplace")
    groups, problems = load(results)
    compared, more = comparisons(results, groups)
    found = findings(groups, compared)
    for one in found:
        print(f"{one.verdict}: {one.says} ({one.paper}; {one.where}): {one.measured}")
    problems += more + [f"{results}: no rows of a method that a claim is about"] * (not found)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))
