"""Two methods on the same task, paired: python -m erasebench.compare method=uce,mace task=celebrity n=100

Both were shown the same prompts with the same seeds, so the difference is resampled in pairs: concepts first, then
images within them, the same draw for both. Runs that are not in the store are made.

Over several targets, python -m erasebench.compare method=ap method.search=random,gumbel target=cat,dog,horse,ship,truck,
the targets are what is paired: mean difference, bootstrap over targets, exact sign-flip test.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from . import config
from .contracts import ErasebenchError, Metric
from .run import Erased, Run, execute, images, score
from .stats import summarize
from .store import Store


def compare(first: Run, second: Run) -> list[Metric]:
    """Metrics of the second run, whose `base_value` and change are against the first.
    Raises ErasebenchError for runs that were not shown the same prompts."""
    if first.plan.prompts != second.plan.prompts or first.sampler != second.sampler:
        raise ErasebenchError("the two runs were not shown the same prompts: compare methods on one task")
    store, measured = Store(), []
    for side in (first, second):
        if any(row.status == "failed" for row in execute(side)):
            raise ErasebenchError(f"method {side.method} failed: nothing to compare")
        erased = Erased(side, store)
        originals, made = images(side, store, erased)
        erased.close()
        measures = []
        for evaluator in side.plan.evaluators.values():
            if not side.skips(evaluator):
                ours, base = (
                    {split: score(store, evaluator, shards, split) for split in evaluator.splits}
                    for shards in (made, originals)
                )
                measures += evaluator.measure(ours, base)
        measured.append(measures)
    return summarize(measured[1], measured[0])


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of one plan belong together, in the order in which they were asked for.
    Raises ErasebenchError where a plan has not exactly two."""
    plans = {}
    for run in runs:
        plans.setdefault((run.plan.task, run.target, run.plan.prompts), []).append(run)
    for (_, target, _), some in plans.items():
        if len(some) != 2:
            of = f" of {target}" if len(plans) > 1 else ""
            raise ErasebenchError(f"two methods are compared, not {len(some)}{of}: method=uce,mace")
    return [tuple(some) for some in plans.values()]


def names(first: Run, second: Run) -> tuple[str, str]:
    """What each is called: its method, or, of one method, what it was given otherwise."""
    if first.method != second.method:
        return first.method, second.method
    ours, theirs = asdict(first.eraser), asdict(second.eraser)
    differ = [key for key in ours if ours[key] != theirs[key]]
    said = lambda given: ", ".join(f"{key}={given[key]}" for key in differ) or first.method
    return said(ours), said(theirs)


def over_targets(found: Sequence[Sequence[Metric]], resamples: int = 10000) -> list[Metric]:
    """One metric for every name that all targets have: means of both sides over targets; the interval of the difference
    by a bootstrap over targets, and p by flipping the signs of their differences in
    every way (beyond 16 targets, in 65,536)."""
    made = []
    for metric in found[0]:
        same = [m for some in found for m in some if (m.name, m.split) == (metric.name, metric.split)]
        if len(same) != len(found) or any(m.value is None or m.base_value is None for m in same):
            continue
        first, second = (np.array([getattr(m, side) for m in same], float) for side in ("base_value", "value"))
        gap = second - first
        means = np.random.default_rng(0).choice(gap, (resamples, len(gap))).mean(1)
        low, high = (float(q) for q in np.quantile(means, (0.025, 0.975)))
        if len(gap) > 16:
            flips = np.random.default_rng(1).choice((-1, 1), (2**16, len(gap)))
        else:
            flips = np.array(list(itertools.product((-1, 1), repeat=len(gap))))
        p = float(np.mean(np.abs(flips @ gap) >= abs(gap.sum()) - 1e-12))
        ends = {"change_low": low, "change_high": high, "p_value": p, "low": None, "high": None}
        made.append(replace(metric, value=float(second.mean()), base_value=float(first.mean()), **ends))
    return made


def main() -> int:
    runs: list[Run] = []
    failed = config.main(lambda run: runs.append(run) or [], ["-m", *sys.argv[1:]])
    if failed or not runs:  # a dry run has none
        return failed
    try:
        paired = pairs(runs)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        each = [compare(*pair) for pair in paired]
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    several = len(each) > 1
    how = f"{len(each)} targets, bootstrap over them), sign-flip p" if several else "paired bootstrap), McNemar's p"
    first, second = (name[:12] for name in names(*paired[0]))
    print(f"{'':18}{first:>12} {second:>12}   difference, 95 % interval ({how}")
    found = over_targets(each) if several else each[0]
    print("\n".join(line(metric) for metric in found if metric.value is not None))
    return 0


def line(metric: Metric) -> str:
    """One metric: both values, the difference with its interval, a star where that does not hold 0."""
    text = f"{metric.name:18}{metric.base_value:12.3f} {metric.value:12.3f}   {metric.value - metric.base_value:+.3f}"
    if metric.change_low is not None:
        sure = "" if metric.change_low <= 0 <= metric.change_high else " *"
        text += f" [{metric.change_low:+.3f}, {metric.change_high:+.3f}]{sure}"
    return text + (f"  p = {metric.p_value:.2g}" if metric.p_value is not None else "")


if __name__ == "__main__":
    sys.exit(main())
