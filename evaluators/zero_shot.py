"""Zero-shot CLIP as the judge of concepts without a fixed judge.

It compares the concept with kept concepts and with other texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from erasebench.contracts import Scored
from erasebench.run import verdicts
from erasebench.stats import Measure, Part, harmonic

from .calibration import check_drawn
from .clip import Clip

LETTERS = {"target": "e", "retain": "s", "synonym": "g"}  # MACE's


@dataclass(frozen=True)
class ZeroShotShare:
    """CLIP's first choice among the concept, kept concepts and other texts.

    `kept` are the names of kept concepts, `others` whole texts that stand for anything else (zero-shot classification:
    Radford et al., 2021, section 3.1).

    zero_shot_e          share of target images whose first text is the concept's
    zero_shot_g          the same for images requested by its synonyms; zero_shot_<split> for other words
    zero_shot_s          share of images of kept concepts whose first text is their own
    zero_shot_h          harmonic mean of 1 - zero_shot_e, zero_shot_s and, if there are synonyms, 1 - zero_shot_g

    Undrawn is raised, and there are no such numbers, if the base's images of the concept do not get its name more
    often than its images of kept concepts do. A refused image has no verdict on forgetting and counts as not kept.
    """

    clip: Clip
    concept: str
    kept: tuple[str, ...]
    others: tuple[str, ...]
    template: str
    splits: tuple[str, ...] = ("target", "retain")
    scale: ClassVar[float] = 100.0
    threshold: ClassVar[float] = 0.5

    @property
    def names(self) -> tuple[str, ...]:
        return (self.concept, *self.kept)

    @property
    def judge(self) -> Clip:
        texts = (*(self.template.replace("{c}", name) for name in self.names), *self.others)
        return replace(self.clip, name="clip-zero-shot", texts=texts)

    def recognises(self, concept: str) -> bool:
        return concept in self.names

    def calibrated(self, base: Mapping[str, Scored]) -> ZeroShotShare:
        """Return this evaluator. Raises Undrawn if the base does not draw the concept."""
        named = lambda scored: verdicts.without(verdicts.equals(self.first(scored), 0), scored.refused)
        check_drawn(self.concept, self.judge.name, named(base["target"]), named(base["retain"]))
        return self

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "texts")
        self.calibrated(base)
        parts = {split: self.part(scores[split], split) for split in self.splits}
        made = []
        for split, part in parts.items():
            kind = ("keep", True) if split == "retain" else ("forget", False)
            made.append(Measure(f"zero_shot_{LETTERS.get(split, split)}", *kind, (part,)))
        whole = [parts[split] for split in LETTERS if split in parts]
        both = lambda e, s, *g: harmonic(1 - e, s, *(1 - mean for mean in g))
        return [*made, Measure("zero_shot_h", "overall", True, tuple(whole), both)]

    def part(self, scored: Scored, split: str) -> Part:
        """Build the Part of a split.

        Its values are 1 where the first text is the image's own and 0 where it is another.
        """
        kept = split == "retain"
        values = verdicts.without(self.top1(scored), scored.refused, 0.0 if kept else np.nan)
        return Part(split, values, scored.concepts, forgotten=None if kept else 0.0)

    def confidence(self, scored: Scored) -> np.ndarray:
        """Return the softmax probability of each image's own name [N].

        The softmax is over all texts; NaN without a verdict.
        """
        logits = self.scale * self.cosines(scored)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        own = (chances / chances.sum(1, keepdims=True))[np.arange(len(logits)), self.own(scored)]
        return np.where(self.first(scored) < 0, np.nan, own)

    def top1(self, scored: Scored) -> np.ndarray:
        """Return 1 where an image's first text is its own [N]. 0 where it is another, NaN without a verdict."""
        return verdicts.equals(self.first(scored), self.own(scored))

    def first(self, scored: Scored) -> np.ndarray:
        """Return the index of each image's first text [N]. -1 without a verdict."""
        return verdicts.top1(self.cosines(scored))

    def own(self, scored: Scored) -> np.ndarray:
        """Return the index of each image's own name [N]. Prompts without a name ask for the concept."""
        return np.array([self.names.index(concept or self.concept) for concept in scored.concepts])

    def cosines(self, scored: Scored) -> np.ndarray:
        return verdicts.rows(self.judge, scored, "texts", len(self.judge.texts), verdicts.COSINE)
