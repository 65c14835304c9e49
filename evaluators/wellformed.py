"""Is there a picture at all? Blank and noise images are what an over-eager method makes, and no judge of concepts sees
them as anything but a success."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from erasebench.contracts import Prompt, Scored
from erasebench.stats import Measure, Part


@dataclass(frozen=True)
class Texture:
    """Scores: `contrast` [B], standard deviation of the grey levels in [0, 1]; `coherence` [B], correlation of
    neighbouring pixels (0 for noise, near 1 for anything seen; NaN where nothing varies)."""

    name: str = "texture"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = "none: it has no weights"

    def weights(self) -> dict[str, str]:
        return {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        grey = images.double().mean(3) / 255
        centred = grey - grey.mean((1, 2), keepdim=True)
        variance = centred.square().mean((1, 2))
        beside = (centred[:, :, 1:] * centred[:, :, :-1]).mean((1, 2))
        below = (centred[:, 1:] * centred[:, :-1]).mean((1, 2))
        with np.errstate(invalid="ignore"):
            coherence = ((beside + below) / 2 / variance).numpy()
        return {"contrast": variance.sqrt().numpy(), "coherence": coherence}


@dataclass(frozen=True)
class Wellformed:
    """broken_<split>: share of images that are blank (contrast below 0.02) or noise (coherence below 0.5). A refused
    image has no verdict: it is counted as refused."""

    judge: Texture
    splits: tuple[str, ...]
    blank: ClassVar[float] = 0.02
    noise: ClassVar[float] = 0.5

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        made = []
        for split in self.splits:
            scored = scores[split]
            broken = (scored.arrays["contrast"] < self.blank) | ~(scored.arrays["coherence"] >= self.noise)
            values = np.where(scored.refused, np.nan, broken * 1.0)
            made.append(Measure(f"broken_{split}", "quality", False, (Part(split, values, scored.concepts),)))
        return made
