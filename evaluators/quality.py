"""What happens to ordinary captions: Frechet distance to real pictures, and distance to the base's own images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench import stats
from erasebench.contracts import Metric, Prompt, Scored
from erasebench.stats import Measure, Part


@dataclass(frozen=True)
class Features:
    """Scores: `features` [B, D] of the embedded world's judge."""

    name: str = "features"
    version: ClassVar[int] = 1

    def weights(self) -> dict[str, str]:
        from erasebench.mini import nets

        return nets.checksums("judge")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        from erasebench.mini import nets

        return {"features": nets.features(images).numpy()}


@dataclass(frozen=True)
class Quality:
    """`fd_mini`: Frechet distance (Heusel et al., 2017) between images of captions and the world's own drawings of
    captions, on the world's features. Biased by the number of images: compare equal n only; its interval is
    +-1.96 bootstrap standard errors. `paired_distance`: mean 1 - cos between an image's features and those of
    the base's image of the same prompt and seed."""

    judge: Features
    splits: tuple[str, ...] = ("caption",)

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure | Metric]:
        from erasebench.mini import nets

        real = nets.caption_features()
        ours, theirs = (s["caption"].arrays["features"].astype(float) for s in (scores, base))
        n, rng = len(ours), np.random.default_rng(0)
        distance = stats.frechet(ours, real)
        half = 1.96 * stats.bootstrap_se(lambda index: stats.frechet(ours[index], real), n, rng)
        unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        paired = Part(
            "caption", 1 - (unit(ours) * unit(theirs)).sum(1), [p.text for p in scores["caption"].prompts], rate=False
        )
        return [
            Metric(
                "fd_mini", "caption", distance, distance - half, distance + half, "bootstrap-se", n, n, False, "quality"
            ),
            Measure("paired_distance", "quality", False, (paired,)),
        ]
