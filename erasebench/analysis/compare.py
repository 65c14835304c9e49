"""Paired comparison of two methods on one task: python -m erasebench compare method=uce,mace task=celebrity n=100

Both methods get the same prompts with the same seeds, so the difference is resampled in pairs: concepts first, then
images within them, the same draw for both. Runs that are not in the store are made.

Over several targets, pairs are formed by target: mean difference, bootstrap over targets, exact sign-flip test.

python -m erasebench compare method=ap method.search=random,gumbel target=cat,dog,horse,ship,truck

The result is written to <results>/comparisons/<first>-vs-<second>-<hash>.csv, and python -m erasebench leaderboard
shows it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import config, rows
from ..contracts import ErasebenchError, Metric, Undrawn
from ..report.runs import Run as Measured
from ..report.runs import told_apart
from ..run.produce import images
from ..run.run import execute
from ..run.scoring import score
from ..run.session import Session
from ..run.specification import Run, slug
from ..stats import interval, summarize
from ..store.local import Store, digest

PAIRS = 20  # with fewer, no interval is marked
LEGEND = f"↑ ↓ the better direction; * the interval excludes 0 (never marked below {PAIRS} pairs)"


class Compared(NamedTuple):
    """Rows of two runs, and metrics of the second against the first.

    `base_value` and the change of each metric refer to the first run.
    """

    first: Measured
    second: Measured
    metrics: list[Metric]


def compare(first: Run, second: Run) -> Compared:
    """Return both runs and the metrics that compare them.

    Runs that are not in the store are made. Raises ErasebenchError if the runs do not share prompts and sampler, or
    if a method failed.
    """
    if first.plan.prompts != second.plan.prompts or first.sampler != second.sampler:
        raise ErasebenchError("the two runs were not shown the same prompts: compare methods on one task")
    sides, measured = [], []
    for side in (first, second):
        sides.append(Measured(tuple(execute(side)), Path()))
        if any(row.status == "failed" for row in sides[-1].rows):
            raise ErasebenchError(f"method {side.method} failed: nothing to compare")
        session = Session(side, Store())
        originals, made = images(session)
        session.close()
        measures = []
        for evaluator in side.plan.evaluators.values():
            if not side.skips(evaluator):
                ours, base = (
                    {split: score(session, evaluator, shards, split) for split in evaluator.splits}
                    for shards in (made, originals)
                )
                with suppress(Undrawn):  # depends on the base alone, so it is alike for both sides
                    measures += evaluator.measure(ours, base)
        measured.append(measures)
    return Compared(*told_apart(sides), summarize(measured[1], measured[0]))


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair the two runs of each plan, in the order requested.

    Raises ErasebenchError if a plan does not have exactly two runs.
    """
    plans = {}
    for run in runs:
        plans.setdefault((run.plan.task, run.target, run.plan.prompts), []).append(run)
    for (_, target, _), some in plans.items():
        if len(some) != 2:
            of = f" of {target}" if len(plans) > 1 else ""
            raise ErasebenchError(f"two methods are compared, not {len(some)}{of}: method=uce,mace")
    return [tuple(some) for some in plans.values()]


def names(first: Run, second: Run) -> tuple[str, str]:
    """Return a label for each side of a comparison.

    A label is the method, or, if both runs share it, the hyperparameters that differ.
    """
    if first.method != second.method:
        return first.method, second.method
    ours, theirs = asdict(first.eraser), asdict(second.eraser)
    differ = [key for key in ours if ours[key] != theirs[key]]
    said = lambda given: ", ".join(f"{key}={given[key]}" for key in differ) or first.method
    return said(ours), said(theirs)


def over_targets(found: Sequence[Sequence[Metric]], resamples: int = 10000) -> list[Metric]:
    """Return one metric for each name that all targets have.

    Its values are the means of both sides over targets. The interval of the difference is a bootstrap over targets,
    p comes from flipping the signs of the targets' differences in every way (in 65,536 random ways if there are more
    than 16 targets), and n is the sum over all targets.
    """
    made = []
    for metric in found[0]:
        same = [m for some in found for m in some if (m.name, m.split) == (metric.name, metric.split)]
        if len(same) != len(found) or any(m.value is None or m.base_value is None for m in same):
            continue
        first, second = (np.array([getattr(m, side) for m in same], float) for side in ("base_value", "value"))
        gap = second - first
        means = np.random.default_rng(0).choice(gap, (resamples, len(gap))).mean(1)
        before, after = float(first.mean()), float(second.mean())
        low, high = interval(means, after - before)
        if len(gap) > 16:
            flips = np.random.default_rng(1).choice((-1, 1), (2**16, len(gap)))
        else:
            flips = np.array(list(itertools.product((-1, 1), repeat=len(gap))))
        p = float(np.mean(np.abs(flips @ gap) >= abs(gap.sum()) - 1e-12))
        n = sum(m.n for m in same) if None not in [m.n for m in same] else None
        ends = {"change_low": low, "change_high": high, "p_value": p, "low": None, "high": None, "n": n}
        made.append(replace(metric, value=after, base_value=before, **ends))
    return made


def differences(paired: Sequence[tuple[Run, Run]], each: Sequence[Compared]) -> list[rows.Difference]:
    """Return the differences of metrics with a value on both sides.

    They are written to the comparison's file. `paired` and `each` have one entry for each target.
    """
    several = len(each) > 1
    head = each[0].first.head
    joined = lambda runs: " ".join(dict.fromkeys(run.head.run_id for run in runs))
    metrics = over_targets([compared.metrics for compared in each]) if several else each[0].metrics
    return [
        rows.Difference(
            schema=rows.SCHEMA,
            task=head.task,
            world=head.world,
            base=head.base,
            sampler=head.sampler,
            targets=", ".join(first.target or f"{len(first.plan.concepts)} concepts" for first, _ in paired),
            first_label=each[0].first.label,
            second_label=each[0].second.label,
            first_runs=joined(compared.first for compared in each),
            second_runs=joined(compared.second for compared in each),
            metric=metric.name,
            split=metric.split,
            group=metric.group,
            higher_is_better=metric.higher_is_better,
            first=metric.base_value,
            second=metric.value,
            difference=metric.value - metric.base_value,
            change_low=metric.change_low,
            change_high=metric.change_high,
            p_value=metric.p_value,
            n=metric.n,
            how=f"bootstrap over {len(each)} targets, sign-flip p" if several else "paired bootstrap, McNemar's p",
        )
        for metric in metrics
        if metric.value is not None and metric.base_value is not None
    ]


def place(paired: Sequence[tuple[Run, Run]]) -> Path:
    """Return the file of a comparison: the same for the same runs."""
    which = digest([[side.identity() for side in pair] for pair in paired])[:10]
    name = "-vs-".join(map(slug, names(*paired[0])))
    return paired[0][0].results / "comparisons" / f"{name}-{which}.csv"


def main(words: Sequence[str]) -> int:
    runs: list[Run] = []
    failed = config.main(lambda run: runs.append(run) or [], ["-m", *words])
    return failed if failed or not runs else report(runs)  # a dry run has none


def report(runs: Sequence[Run]) -> int:
    """Compare, write the comparison and print it; returns the exit status."""
    try:
        paired = pairs(runs)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        each = [compare(*pair) for pair in paired]
        found = differences(paired, each)
        if not found:
            raise ErasebenchError("no metric has a value on both sides: nothing to compare")
        rows.write(found, path := place(paired), rows.Difference)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first, second = (name[:12] for name in names(*paired[0]))
    print(f"{'':18}{first:>12} {second:>12} {'':1} {'n':>6}   difference, 95 % interval ({found[0].how})")
    print(*map(line, found), LEGEND, *flaws(each), path, sep="\n")
    return 0


def flaws(each: Sequence[Compared]) -> list[str]:
    """Return a line for each broken run: its differences are no evidence in its favour."""
    runs = {run.head.run_id: run for compared in each for run in (compared.first, compared.second)}
    return [f"broken, not ranked: {run.label}: {'; '.join(run.broken)}" for run in runs.values() if run.broken]


def line(found: rows.Difference) -> str:
    """Format one metric: both values, the better direction, n and the difference with its interval.

    A star marks an interval that does not contain 0, from PAIRS pairs on.
    """
    way = {True: "↑", False: "↓", None: " "}[found.higher_is_better]
    text = f"{found.metric:18}{found.first:12.3f} {found.second:12.3f} {way} {found.n or '':>6}   {found.difference:+.3f}"
    if found.change_low is not None:
        apart = not found.change_low <= 0 <= found.change_high and (found.n or 0) >= PAIRS
        text += f" [{found.change_low:+.3f}, {found.change_high:+.3f}]{' *' if apart else ''}"
    return text + (f"  p = {found.p_value:.2g}" if found.p_value is not None else "")
