"""Two methods on the same task, paired: python -m erasebench.compare method=uce,mace task=celebrity n=100

Both were shown the same prompts with the same seeds, so the difference is resampled in pairs: concepts first, then
images within them, the same draw for both (harmonic means are taken of the same draws). Runs that are not in the
store are made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import config, stats
from .contracts import ErasebenchError, Evaluator, Scored
from .run import Erased, Run, execute, images, score
from .store import Store


@dataclass(frozen=True)
class Difference:
    """second - first of one metric, with its 95 % interval."""

    metric: str
    first: float
    second: float
    low: float
    high: float

    def __str__(self) -> str:
        sure = "" if self.low <= 0 <= self.high else "  *"
        return (
            f"{self.metric:14} {self.first:7.3f} {self.second:7.3f}   {self.second - self.first:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}]{sure}"
        )


def draw(concepts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Indices [N'] of one bootstrap draw: concepts with replacement, then images within each."""
    labels = np.asarray(concepts)
    groups = [np.flatnonzero(labels == name) for name in dict.fromkeys(concepts)]
    chosen = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
    return np.concatenate([rng.choice(group, len(group)) for group in chosen])


def differences(
    evaluator: Evaluator, first: Mapping[str, Scored], second: Mapping[str, Scored], times: int = stats.RESAMPLES
) -> list[Difference]:
    """Every rate of an evaluator that gives its images' values (`values`), and the harmonic means of them."""
    ours, theirs = evaluator.values(first), evaluator.values(second)
    splits = {split: first[split].concepts for split in evaluator.splits}
    rng = np.random.default_rng(0)
    draws = [{split: draw(concepts, rng) for split, concepts in splits.items()} for _ in range(times)]
    made = []
    for name, parts in ours.items():
        pair = [[part.estimate() for part in side[name]] for side in (ours, theirs)]
        value = lambda rates: float(stats.harmonic(*rates)) if len(rates) > 1 else rates[0]
        change = [
            value([part.estimate(d[part.split]) for part in theirs[name]])
            - value([p.estimate(d[p.split]) for p in parts])
            for d in draws
        ]
        low, high = np.nanquantile(change, [0.025, 0.975])
        made.append(Difference(name, value(pair[0]), value(pair[1]), float(low), float(high)))
    return made


def compare(first: Run, second: Run) -> dict[str, list[Difference]]:
    """Evaluator -> differences. Raises ErasebenchError for runs that were not shown the same prompts."""
    if first.plan.prompts != second.plan.prompts or first.sampler != second.sampler:
        raise ErasebenchError("the two runs were not shown the same prompts: compare methods on one task")
    store, scored = Store(), {}
    for side in (first, second):
        if any(row.status == "failed" for row in execute(side)):
            raise ErasebenchError(f"method {side.method} failed: nothing to compare")
        erased = Erased(side, store)
        _, made = images(side, store, erased)
        erased.close()
        for name, evaluator in side.plan.evaluators.items():
            if hasattr(evaluator, "values") and not side.skips(evaluator):
                scored.setdefault(name, []).append(
                    {split: score(store, evaluator, made, split) for split in evaluator.splits}
                )
    return {name: differences(first.plan.evaluators[name], *pair) for name, pair in scored.items()}


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
    print(
        f"{'':14} {runs[0].method:>7} {runs[1].method:>7}   difference, 95 % interval (paired bootstrap over concepts)"
    )
    for lines in found.values():
        print("\n".join(map(str, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
