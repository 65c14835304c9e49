"""MACE's object protocol: CLIP over the ten CIFAR-10 classes (MACE, section 4.1, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from erasebench.contracts import Scored
from erasebench.stats import Measure, Part, harmonic

from .clip import Clip


@dataclass(frozen=True)
class ObjectAccuracy:
    """Acc_e (erased class), Acc_s (the nine others), Acc_g (synonyms of the erased class) and
    H_o = 3 / (1/(1-Acc_e) + 1/Acc_s + 1/(1-Acc_g))  (MACE, Eq. 8).

    Two readings of "accuracy": `_top1`, the share of images that CLIP puts first among the ten classes, and
    `_prob`, the mean softmax probability of the class at CLIP's scale of 100, which is what MACE's code computes.
    """

    clip: Clip
    classes: tuple[str, ...]
    template: str
    templates: tuple[str, ...]  # of every evaluator of this judge, so that it looks at each image once
    splits: tuple[str, ...] = ("target", "retain", "synonym")
    scale: ClassVar[float] = 100.0
    sure: ClassVar[float] = 0.5

    @property
    def judge(self) -> Clip:
        return replace(self.clip, texts=tuple(t.replace("{c}", name) for t in self.templates for name in self.classes))

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        made = []
        for suffix, read in (("top1", self.top1), ("prob", self.probability)):
            erased, kept, general = (
                Part(
                    split,
                    np.where(scores[split].refused, 0.0, read(scores[split])),
                    scores[split].concepts,
                    rate=suffix == "top1",
                )
                for split in self.splits
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

    def shows(self, scored: Scored) -> np.ndarray:
        """How sure the judge is that each target image shows the concept [N]."""
        return self.probability(scored)

    def _index(self, scored: Scored) -> np.ndarray:
        return np.array([self.classes.index(concept) for concept in scored.concepts])

    def cosines(self, scored: Scored) -> np.ndarray:
        """Of each image with this evaluator's texts [N, C]."""
        start = self.templates.index(self.template) * len(self.classes)
        return scored.arrays["texts"][:, start : start + len(self.classes)].astype(float)

    def top1(self, scored: Scored) -> np.ndarray:
        return (self.cosines(scored).argmax(1) == self._index(scored)).astype(float)

    def probability(self, scored: Scored) -> np.ndarray:
        logits = self.scale * self.cosines(scored)
        softmax = np.exp(logits - logits.max(1, keepdims=True))
        return (softmax / softmax.sum(1, keepdims=True))[np.arange(len(logits)), self._index(scored)]


@dataclass(frozen=True)
class ObjectRemoval(ObjectAccuracy):
    """orr: share of images of the erased class in which CLIP does not find it first among the ten classes; orr_synonyms
    the same for its synonyms. (GIE, Table 2; its text defines the complement, the table prints this.)"""

    splits: tuple[str, ...] = ("target", "synonym")

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        gone = lambda split: Part(
            split, np.where(scores[split].refused, 1.0, 1 - self.top1(scores[split])), scores[split].concepts
        )
        return [
            Measure("orr", "forget", True, (gone("target"),)),
            Measure("orr_synonyms", "forget", True, (gone("synonym"),)),
        ]
