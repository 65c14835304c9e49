"""MACE's object protocol: CLIP over the ten CIFAR-10 classes (MACE, section 4.1, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from erasebench import stats
from erasebench.contracts import Metric, Scored

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
    splits: tuple[str, ...] = ("target", "retain", "synonym")
    scale: ClassVar[float] = 100.0

    @property
    def judge(self) -> Clip:
        return replace(self.clip, texts=tuple(self.template.replace("{c}", name) for name in self.classes))

    def summarize(self, scores: dict[str, Scored], base: dict[str, Scored]) -> list[Metric]:
        metrics = []
        for suffix, read in (("top1", self.top1), ("prob", self.probability)):
            parts, draws = {}, {}
            for name, split, group, better in (
                ("acc_e", "target", "forget", False),
                ("acc_g", "synonym", "forget", False),
                ("acc_s", "retain", "keep", True),
            ):
                values = np.where(scores[split].refused, 0.0, read(scores[split]))
                parts[name] = stats.mean_metric(
                    f"{name}_{suffix}", split, values, scores[split].concepts, better, group, rate=suffix == "top1"
                )
                # a fresh generator for each split: one split's draws do not depend on another's size
                resample = stats.resample_rate if suffix == "top1" else stats.resample
                draws[name] = resample(values, scores[split].concepts, np.random.default_rng(0))
            metrics += parts.values()
            metrics.append(
                stats.harmonic_metric(
                    f"h_o_{suffix}",
                    [parts["acc_e"], parts["acc_s"], parts["acc_g"]],
                    [1 - draws["acc_e"], draws["acc_s"], 1 - draws["acc_g"]],
                )
            )
        return metrics

    def values(self, scores: Mapping[str, Scored]) -> dict[str, list[stats.Part]]:
        """What each metric is a mean of, image by image: for paired comparisons."""
        made = {}
        for suffix, read in (("top1", self.top1), ("prob", self.probability)):
            erased, kept, general = (
                stats.Part(split, np.where(scores[split].refused, 0.0, read(scores[split])))
                for split in ("target", "retain", "synonym")
            )
            made |= {f"acc_e_{suffix}": [erased], f"acc_s_{suffix}": [kept], f"acc_g_{suffix}": [general]}
            made[f"h_o_{suffix}"] = [erased.complement, kept, general.complement]
        return made

    def _index(self, scored: Scored) -> np.ndarray:
        return np.array([self.classes.index(concept) for concept in scored.concepts])

    def top1(self, scored: Scored) -> np.ndarray:
        return (scored.arrays["texts"].argmax(1) == self._index(scored)).astype(float)

    def probability(self, scored: Scored) -> np.ndarray:
        logits = self.scale * scored.arrays["texts"].astype(float)
        softmax = np.exp(logits - logits.max(1, keepdims=True))
        return (softmax / softmax.sum(1, keepdims=True))[np.arange(len(logits)), self._index(scored)]
