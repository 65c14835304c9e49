"""Judges of a user-defined concept.

Judges that do not know the concept are left out; zero-shot CLIP or a folder of reference images replaces them, under
metrics with names of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..contracts import ErasebenchError, Evaluator, Missing, Plan
from ..evaluators.clip import Clip
from ..evaluators.references import FaceImages, References, ReferenceShare
from ..evaluators.spread import Neighbours, Presence
from ..evaluators.style import StyleShare
from ..evaluators.verification import ClipImages
from ..evaluators.wellformed import Wellformed
from ..evaluators.zero_shot import ZeroShotShare
from ..own_concept import Own
from ..tasks import OTHER_WORDS
from .scoring import watcher
from .specification import Run

LABELS = {  # kind of concept -> template of zero-shot CLIP
    "object": "a photo of the {c}",
    "person": "a photo of {c}",
    "style": "an image in the style of {c}",
    "explicit": "a photo of {c}",
}
ELSE = ("a photo of something else", "a photo")


def judged(run: Run, own: Own, clip: Clip | None, reference: References | None) -> Run:
    """Return the run with judges of the user-defined concept.

    They use reference images if there are any, and zero-shot CLIP if no other judge of the task decides whether an
    image shows the concept."""
    names = {split: of for split, of in run.concepts.items() if split in ("target", "retain", "synonym", *OTHER_WORDS)}
    if reference and "target" not in names:
        raise ErasebenchError(f"reference.path: task={run.plan.task} draws no pictures of {own.name!r}")
    evaluators = {name: fitted(e, own, names) for name, e in run.plan.evaluators.items()}
    run = replace(run, plan=replace(run.plan, evaluators=dict(evaluators)), second=None, own=identity(own, reference))
    if reference:
        evaluators["references"] = ReferenceShare(reference, own.name, tuple(names))
    if clip is not None and "target" in names and watcher(run) is None:  # references do not cover the retain set
        share = zero_shot(run.plan, own, names, clip)
        evaluators["zero_shot"] = share
        if len(share.kept) >= Neighbours.parts:
            evaluators["zero_shot_neighbours"] = Neighbours(share, "zero_shot_s", clip)
    return replace(run, plan=replace(run.plan, evaluators=evaluators))


def identity(own: Own, reference: References | None) -> dict[str, Any]:
    return {**asdict(own), "reference": reference.weights() if reference else None}


def fitted(evaluator: Evaluator | None, own: Own, names: Mapping[str, Sequence[str]]) -> Evaluator | None:
    """Adapt a task's evaluator to the splits of a user-defined concept.

    Returns None for an evaluator that needs more retained names than there are, or whose list of styles lacks the
    concept."""
    if isinstance(evaluator, Neighbours) and len(names.get("retain", ())) < Neighbours.parts:
        return None
    if isinstance(evaluator, StyleShare) and own.name not in evaluator.styles:
        return None
    if isinstance(evaluator, Wellformed | Presence) and "target" in evaluator.splits:
        splits = [split for split in evaluator.splits if split in names]
        return replace(evaluator, splits=tuple(dict.fromkeys([*splits, *(s for s in names if s == "synonym")])))
    return evaluator


def zero_shot(plan: Plan, own: Own, names: Mapping[str, Sequence[str]], clip: Clip) -> ZeroShotShare:
    """Return zero-shot CLIP over the concept, retained names, surrogates and anything else."""
    template = LABELS[own.kind]
    kept = tuple(dict.fromkeys([*plan.brief.preserved, *names.get("retain", ())]))
    instead = dict.fromkeys(template.replace("{c}", c.surrogate) for c in plan.brief.concepts if c.surrogate not in kept)
    return ZeroShotShare(clip, own.name, kept, (*instead, *ELSE), template, tuple(names))


def reference_of(path: str, by: str, kind: str, clip: Clip, identity: Any) -> References:
    """Return the judge by reference images.

    It compares faces for a person if the world's judge of identity is available, else CLIP embeddings. Raises
    ErasebenchError for an unsuitable folder, and for `by="face"` if faces cannot be encoded."""
    if by not in ("auto", "clip", "face"):
        raise ErasebenchError(f"reference.by={by}: choose from auto, clip, face")
    if by == "face" or (by == "auto" and kind == "person"):
        try:
            identity.weights()
        except Missing:
            if by == "face":
                raise
        else:
            judge = References.of(path, FaceImages(identity))
            judge.check()
            return judge
    return References.of(path, ClipImages(clip))
