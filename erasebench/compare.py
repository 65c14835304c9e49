"""Two methods on the same task, paired: python -m erasebench.compare method=uce,mace task=celebrity n=100

Both were shown the same prompts with the same seeds, so the difference is resampled in pairs: concepts first, then
images within them, the same draw for both. Runs that are not in the store are made.
"""

from __future__ import annotations

import sys

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


def main() -> int:
    runs: list[Run] = []
    failed = config.main(lambda run: runs.append(run) or [], ["-m", *sys.argv[1:]])
    if failed:
        return failed
    if len(runs) != 2:
        print(f"error: two methods are compared, not {len(runs)}: method=uce,mace", file=sys.stderr)
        return 2
    try:
        found = compare(*runs)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    first, second = (run.method[:12] for run in runs)
    print(f"{'':18}{first:>12} {second:>12}   difference, 95 % interval (paired bootstrap), McNemar's p")
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
