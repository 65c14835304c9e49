"""Erasing and preserving success on Imagenette (AP, section 5.1; AGE): is the label among the k first?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from erasebench import stats
from erasebench.contracts import Judge, Metric, Scored


@dataclass(frozen=True)
class SuccessRates:
    """ESR-k: share of images of erased classes without the label among the k first; PSR-k: share of images of kept
    classes with it. A refused image shows nothing."""

    judge: Judge
    splits: tuple[str, ...] = ("target", "retain")
    first: ClassVar[tuple[int, ...]] = (1, 5)

    def summarize(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Metric]:
        metrics = []
        for k in self.first:
            for name, split, group, erased in (("esr", "target", "forget", True), ("psr", "retain", "keep", False)):
                hits = self.among(scores[split], k)
                metrics.append(
                    stats.mean_metric(
                        f"{name}{k}", split, 1 - hits if erased else hits, scores[split].concepts, True, group, rate=True
                    )
                )
        return metrics

    def among(self, scored: Scored, k: int) -> np.ndarray:
        logits = scored.arrays["logits"]
        right = np.array([self.judge.classes.index(concept) for concept in scored.concepts])
        better = (logits > logits[np.arange(len(right)), right][:, None]).sum(1)
        return np.where(scored.refused, 0.0, (better < k).astype(float))
