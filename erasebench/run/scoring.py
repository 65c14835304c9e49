"""Scoring of shards into raw scores, in the store; measures of raw scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import provenance
from ..contracts import Calibrates, Decider, DecidesSuccess, ErasebenchError, Evaluator, Metric, Scored
from ..stats import Measure
from . import judging, verdicts
from .images import Shard
from .session import Session
from .specification import Run, score_identity


def watcher(run: Run) -> Decider | None:
    """Return the first evaluator that decides success, or None.

    Such an evaluator decides whether an image shows the concept."""
    every = (e for e in run.plan.evaluators.values() if isinstance(e, DecidesSuccess) and not run.skips(e))
    return next(every, None)


def calibrate(session: Session, evaluator: Decider, originals: Sequence[Shard]) -> Decider:
    """Calibrate an evaluator on the base's images, if it needs that. Raises Undrawn."""
    if not isinstance(evaluator, Calibrates):
        return evaluator
    return evaluator.calibrated({split: score(session, evaluator, originals, split) for split in evaluator.splits})


def ahead(run: Run) -> list[Evaluator]:
    """Return the evaluators to run while a GPU samples the next shard.

    There are none on the CPU, which has no time to spare."""
    return [] if run.device == "cpu" else [e for e in run.plan.evaluators.values() if not run.skips(e)]


def judge(session: Session, evaluator: Evaluator, shard: Shard) -> None:
    """Get or make a shard's raw scores.

    Judges run one at a time, and may keep loaded networks."""
    own = shard.of(session.store)

    def fill(folder: Path) -> None:
        made_by = provenance.sources(evaluator.judge)
        with judging.on(session.run.judges):
            found = evaluator.judge.score(own.images(), own.prompts)
        arrays = verdicts.check(evaluator.judge, found, len(own.prompts))
        np.savez_compressed(folder / "scores.npz", **arrays)
        provenance.write_sources(folder, made_by)

    with session.judging:
        session.store.get_or_make("scores", score_identity(evaluator.judge, shard.path.name), fill)


def score(session: Session, evaluator: Evaluator, made: Sequence[Shard], split: str) -> Scored:
    """Return the raw scores of one split, made or stored by shard."""
    entry = lambda shard: session.store.get("scores", score_identity(evaluator.judge, shard.path.name))
    members = [shard for shard in made if shard.prompts[0].split == split]
    if not members:
        raise ErasebenchError(f"the task has no {split} prompts")
    missing = [shard for shard in members if entry(shard) is None]
    label = f"{evaluator.judge.name} {split}"
    session.map(lambda here, shard, beside: judge(here, evaluator, shard), missing, label, alone=True)
    for shard in members:
        session.compare("judge", evaluator.judge.name, evaluator.judge, entry(shard))
    arrays = [stored_scores(evaluator, entry(shard), len(shard.prompts)) for shard in members]
    if len({tuple((key, part[key].shape[1:]) for key in sorted(part)) for part in arrays}) > 1:
        raise ErasebenchError(
            f"judge {evaluator.judge.name} gives arrays of other names or widths for some {split} images"
        )
    return Scored(
        prompts=tuple(prompt for shard in members for prompt in shard.prompts),
        arrays={key: np.concatenate([part[key] for part in arrays]) for key in arrays[0]},
        refused=np.concatenate([shard.meta()["refused"] for shard in members]),
    )


def stored_scores(evaluator: Evaluator, entry: Path, count: int) -> dict[str, np.ndarray]:
    """Load raw scores from the store.

    They are checked again, since an older entry may hold scores that are invalid now."""
    try:
        with np.load(entry / "scores.npz", allow_pickle=False) as file:
            return verdicts.check(evaluator.judge, dict(file), count)
    except ValueError as error:  # an array of objects
        raise ErasebenchError(f"judge {evaluator.judge.name}: {entry}/scores.npz holds no arrays of numbers") from error


def measure(
    session: Session, evaluator: Evaluator, ours: Sequence[Shard], originals: Sequence[Shard]
) -> tuple[list[Measure | Metric], list[Measure | Metric]]:
    """Return an evaluator's measures of the erased images and of the base's.

    If a guard refused some images, there are also variants that count refusals as forgetting."""
    scores = {split: score(session, evaluator, ours, split) for split in evaluator.splits}
    base = {split: score(session, evaluator, originals, split) for split in evaluator.splits}
    verdicts.check_varies(evaluator.judge, (scores, base))
    made, before = evaluator.measure(scores, base), evaluator.measure(base, base)
    for side, of in ((made, scores), (before, base)):
        verdicts.check_measures(side, of)
    guarded = any(scored.refused.any() for scored in scores.values())
    return verdicts.with_refusals(made, scores, guarded), verdicts.with_refusals(before, base, guarded)
