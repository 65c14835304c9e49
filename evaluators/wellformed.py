"""Is there a picture at all, and another one for every prompt? Blank, noisy and repeated images are what an over-eager method
makes, and no judge of concepts sees them as anything but a success.

The thresholds were chosen on what the embedded model draws of training templates: of surrogates (sky, grass, ground, street,
sea, a room, a person, art), an airplane and a cat, 448 images. `python -m erasebench.evaluators.wellformed` draws them and
prints what the numbers below are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench.contracts import Prompt, Scored
from erasebench.stats import Measure, Part

SIDE = 64  # pixels at which a picture is looked at, at most
GRID = 8  # and at which two are compared


@dataclass(frozen=True)
class Texture:
    """What there is to see beside a smooth surface, the polynomial of third degree in x and y that is nearest to each
    channel: with it go a single colour and a gradient. Scores:

    contrast      [B], standard deviation of what is left, of a range of 1
    coherence     [B], correlation of its neighbouring pixels (0 for noise, near 1 for anything seen; NaN where nothing varies)
    edges         [B], kurtosis of the differences of neighbouring pixels of the picture itself: high where much changes in
                  few places; 3 for noise, blurred or not, less for a smooth surface (NaN where nothing varies)
    fingerprint   [B, k], the picture on a coarse grid, in [0, 1]
    """

    name: str = "texture"
    version: ClassVar[int] = 2
    licence: ClassVar[str] = "none: it has no weights"

    def weights(self) -> dict[str, str]:
        return {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        pictures = images.permute(0, 3, 1, 2).double() / 255
        small = resized(pictures, SIDE)
        smooth = surface(*small.shape[2:])
        left = small.flatten(2) - small.flatten(2) @ smooth @ smooth.T
        left = left.view_as(small)
        variance = left.square().mean((1, 2, 3))
        beside = (left[..., 1:] * left[..., :-1]).mean((1, 2, 3))
        below = (left[:, :, 1:] * left[:, :, :-1]).mean((1, 2, 3))
        steps = torch.cat([small.diff(dim=2).flatten(1), small.diff(dim=3).flatten(1)], 1)
        return {
            "contrast": variance.sqrt().numpy(),
            "coherence": ((beside + below) / 2 / variance).numpy(),
            "edges": (steps.pow(4).mean(1) / steps.square().mean(1).square()).numpy(),
            "fingerprint": resized(pictures, GRID).flatten(1).half().numpy(),
        }


def resized(pictures: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, H, W], none of them larger than `side`: means of areas."""
    height, width = (min(side, size) for size in pictures.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(pictures, (height, width))


@cache
def surface(height: int, width: int, degree: int = 3) -> Tensor:
    """An orthonormal basis [pixels, k] of polynomials in x and y, as far as so few pixels tell them apart."""
    y, x = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in (height, width))
    powers = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i) if i < height and j < width]
    return torch.linalg.qr(torch.stack([torch.outer(y**i, x**j).flatten() for i, j in powers], 1)).Q


@dataclass(frozen=True)
class Wellformed:
    """broken_<split>: share of images that are no pictures of their own: empty (blank, one colour, a smooth surface: contrast
    below 0.01 beside it; noise: coherence below 0.4, or edges below 3.5, for what was blurred), or the same as another
    image of the split, of another prompt or seed. same_<split>: share of the latter alone.

    Two images are the same where their fingerprints, less the mean of each channel, correlate by more than 0.97: whatever
    their brightness, with noise, or moved by a pixel. How often that is so of the base's own images of the same prompts
    is the row's `base_value`: what the base draws alike may be alike.

    Of training templates of the surrogates contrast is at least 0.028 where something is drawn (a few draw the plain
    background that their template names), coherence 0.48 (a night sky; else 0.8), edges 12; of noise and of blurred
    noise edges are below 3.3. Pictures of "sky" alone correlate by 0.91 at most, portraits by 0.89; copies moved by a pixel
    in both directions by 0.97 and more, with noise of 5 grey levels by 0.999. Words whose pictures the base itself
    cannot tell apart (a room, grass) correlate by 0.999: a method that draws nothing but those is not told from
    one that has a single picture.

    A refused image has no verdict: it is counted as refused. A single image repeats nothing, and has none of sameness.
    """

    judge: Texture
    splits: tuple[str, ...]
    blank: ClassVar[float] = 0.01
    noise: ClassVar[float] = 0.4
    blurred: ClassVar[float] = 3.5
    alike: ClassVar[float] = 0.97

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        made = []
        for split in self.splits:
            scored = scores[split]
            empty, same = self.empty(scored), self.same(scored)
            verdict = lambda found, scored=scored: np.where(scored.refused, np.nan, found)
            parts = {"broken": verdict(empty | (same > 0)), "same": verdict(same)}
            for name, values in parts.items():
                made.append(Measure(f"{name}_{split}", "quality", False, (Part(split, values, scored.concepts),)))
        return made

    def empty(self, scored: Scored) -> np.ndarray:
        """Which images are blank, smooth or noise [N]; what cannot be said (NaN) is no picture either."""
        arrays = scored.arrays
        seen = (arrays["contrast"] >= self.blank) & (arrays["coherence"] >= self.noise)
        return ~(seen & (arrays["edges"] >= self.blurred))

    def same(self, scored: Scored) -> np.ndarray:
        """Which images repeat one of another prompt or seed [N]: 1 or 0, NaN where there is none to compare with.

        An empty image repeats nothing, and neither does a refused one.
        """
        found = np.full(len(scored.prompts), np.nan)
        there = np.flatnonzero(~scored.refused)
        asked = [(scored.prompts[i].text, scored.prompts[i].seed) for i in there]
        numbers = np.array([list(dict.fromkeys(asked)).index(pair) for pair in asked], int)
        other = numbers[:, None] != numbers
        alike = (correlations(scored.arrays["fingerprint"][there]) > self.alike) & other
        seen = ~self.empty(scored)[there]
        verdict = (alike & seen).any(1) & seen
        found[there] = np.where(other.any(1), verdict, np.nan)
        return found


def correlations(fingerprints: np.ndarray) -> np.ndarray:
    """Of all pairs [N, N], after each channel has lost its mean; 0 where nothing varies."""
    x = fingerprints.astype(float).reshape(len(fingerprints), 3, -1)
    x = (x - x.mean(2, keepdims=True)).reshape(len(x), -1)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x @ x.T
