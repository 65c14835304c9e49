"""MACE's object protocol (MACE, section 4.1, Table 1). CLIP classifies images over the ten CIFAR-10 classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from erasebench.contracts import Scored
from erasebench.run import verdicts
from erasebench.stats import Measure, Part, harmonic

from .clip import Clip


@dataclass(frozen=True)
class ObjectAccuracy:
    """Accuracy of CLIP on the erased class, others and synonyms.

    Acc_e (erased class), Acc_s (the nine others), Acc_g (synonyms of the erased class) and
    H_o = 3 / (1/(1-Acc_e) + 1/Acc_s + 1/(1-Acc_g))  (MACE, Eq. 8).

    "Accuracy" has two readings: `_top1`, the share of images whose own class is CLIP's first of the ten, and `_prob`,
    the mean softmax probability of the class at CLIP's scale of 100, as MACE's code computes it. A refused image has
    no verdict on an erased class and counts as a miss for a kept one.
    """

    clip: Clip
    classes: tuple[str, ...]
    template: str
    splits: tuple[str, ...] = ("target", "retain", "synonym")
    scale: ClassVar[float] = 100.0
    threshold: ClassVar[float] = 0.5

    @property
    def judge(self) -> Clip:
        return replace(self.clip, texts=tuple(self.template.replace("{c}", name) for name in self.classes))

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "texts")
        made = []
        for suffix, read in (("top1", self.hits), ("prob", self.probability)):

            def part(split: str, refused: float, forgotten: float | None, suffix: str = suffix, read=read) -> Part:
                scored = scores[split]
                values = verdicts.without(read(scored), scored.refused, refused)
                return Part(split, values, scored.concepts, suffix == "top1", forgotten)

            erased, kept, general = (
                part(split, 0.0, None) if split == "retain" else part(split, np.nan, 0.0) for split in self.splits
            )
            made += [
                Measure(f"acc_e_{suffix}", "forget", False, (erased,)),
                Measure(f"acc_g_{suffix}", "forget", False, (general,)),
                Measure(f"acc_s_{suffix}", "keep", True, (kept,)),
                Measure(
                    f"h_o_{suffix}",
                    "overall",
                    True,
                    (erased, kept, general),
                    lambda e, s, g: harmonic(1 - e, s, 1 - g),
                ),
            ]
        return made

    def confidence(self, scored: Scored) -> np.ndarray:
        """Return the judge's confidence that each target image shows the concept [N]."""
        return self.probability(scored)

    def recognises(self, concept: str) -> bool:
        """Return whether the class is listed and known to CLIP.

        The embedded world's CLIP knows no other words than its own.
        """
        return concept in self.classes and self.clip.knows(concept)

    def _index(self, scored: Scored) -> np.ndarray:
        return np.array([self.classes.index(concept) for concept in scored.concepts])

    def _cosines(self, scored: Scored) -> np.ndarray:
        return verdicts.rows(self.judge, scored, "texts", len(self.classes), verdicts.COSINE)

    def hits(self, scored: Scored) -> np.ndarray:
        """Return 1 where an image's first class is its own [N]. 0 where it is another, NaN without a verdict."""
        return verdicts.equals(verdicts.top1(self._cosines(scored)), self._index(scored))

    def probability(self, scored: Scored) -> np.ndarray:
        logits = self.scale * self._cosines(scored)
        softmax = np.exp(logits - logits.max(1, keepdims=True))
        return (softmax / softmax.sum(1, keepdims=True))[np.arange(len(logits)), self._index(scored)]


@dataclass(frozen=True)
class ObjectRemoval(ObjectAccuracy):
    """Object removal rates of erased and kept objects (GIE, Table 2).

    orr: share of images, requested by a term of the erased object (its name or a synonym), in which CLIP does not rank
    the object first among the ten classes; orr_kept: the same for terms of other objects, where it should stay low;
    `orr_<term>`: the same for each term. GIE's text defines the complement; its table prints this.

    `terms`: class -> terms that prompts use for it.
    """

    terms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ("target", "retain")

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "texts")
        made = []
        for split, name, group in (("target", "orr", "forget"), ("retain", "orr_kept", "keep")):
            asked = np.array(scores[split].concepts)
            refused, forgotten = (np.nan, 1.0) if split == "target" else (1.0, None)
            gone = verdicts.without(1 - self.hits(scores[split]), scores[split].refused, refused)
            lenient = lambda own, forgotten=forgotten: None if forgotten is None else np.where(own, forgotten, np.nan)
            part = lambda values, own, split=split, lenient=lenient: Part(
                split, values, scores[split].concepts, forgotten=lenient(own)
            )
            made.append(Measure(name, group, group == "forget", (part(gone, np.ones(len(asked), bool)),)))
            for term in dict.fromkeys(scores[split].concepts):
                own = part(np.where(asked == term, gone, np.nan), asked == term)
                made.append(Measure(f"orr_{term}", group, group == "forget", (own,)))
        return made

    def recognises(self, concept: str) -> bool:
        return any(concept in terms and super(ObjectRemoval, self).recognises(name) for name, terms in self.terms.items())

    def _index(self, scored: Scored) -> np.ndarray:
        class_of = {term: name for name, terms in self.terms.items() for term in terms}
        return np.array([self.classes.index(class_of[concept]) for concept in scored.concepts])
