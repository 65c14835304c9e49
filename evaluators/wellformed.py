"""Detection of blank, noisy and repeated images.

An over-eager method produces them, and every judge of concepts takes them for a success.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench.contracts import Prompt, Scored
from erasebench.run import verdicts
from erasebench.stats import Measure, Part

SIDE = 64  # largest side in pixels at which an image is analysed
GRID = 8  # side of the grid on which two images are compared
READINGS = ("contrast", "coherence", "relief", "edges")
ROWS = 1024  # of the matrix of all pairs, computed at once: 30,000 captions have 900 million pairs


@dataclass(frozen=True)
class Texture:
    """Statistics of the visible content of images.

    Scores:

    contrast      [B], standard deviation of the grey levels in [0, 1]
    coherence     [B], correlation of neighbouring pixels (0 for noise, near 1 for visible content, NaN if all is flat)
    relief        [B], standard deviation of the colours less a smooth surface, the polynomial of third degree in x and
                  y that is nearest to each channel: a single colour and a gradient leave nothing
    edges         [B], kurtosis of the differences of neighbouring pixels: high if much changes in few places; 3 at most
                  for noise, blurred or not, and less for a smooth surface (NaN if nothing varies)
    fingerprint   [B, k], the colours on a coarse grid, in [0, 1]
    """

    name: str = "texture"
    version: ClassVar[int] = 2
    licence: ClassVar[str] = "none: it has no weights"

    def weights(self) -> dict[str, str]:
        return {}

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        grey = images.double().mean(3) / 255
        centred = grey - grey.mean((1, 2), keepdim=True)
        variance = centred.square().mean((1, 2))
        beside = (centred[:, :, 1:] * centred[:, :, :-1]).mean((1, 2))
        below = (centred[:, 1:] * centred[:, :-1]).mean((1, 2))
        colours = images.permute(0, 3, 1, 2).float() / 255
        small = resized(colours, SIDE).double()
        smooth = surface(*small.shape[2:])
        rough = small.flatten(2) - small.flatten(2) @ smooth @ smooth.T
        # squares summed over channels: noise in one of them would otherwise leave two without any step
        steps = torch.cat([small.diff(dim=d).square().sum(1).flatten(1) for d in (2, 3)], 1)
        return {
            "contrast": variance.sqrt().numpy(),
            "coherence": ((beside + below) / 2 / variance).numpy(),
            "relief": rough.square().mean((1, 2)).sqrt().numpy(),
            "edges": (steps.square().mean(1) / steps.mean(1).square()).numpy(),
            "fingerprint": resized(colours, GRID).flatten(1).half().numpy(),
        }


def resized(pictures: Tensor, side: int) -> Tensor:
    """Resize images [B, 3, H, W] to at most `side`. Pixels are area means; images are never enlarged."""
    height, width = (min(side, size) for size in pictures.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(pictures, (height, width))


@cache
def surface(height: int, width: int, degree: int = 3) -> Tensor:
    """Return an orthonormal basis of polynomials in x and y [pixels, k].

    Powers that too few pixels cannot tell apart are left out.
    """
    y, x = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in (height, width))
    powers = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i) if i < height and j < width]
    return torch.linalg.qr(torch.stack([torch.outer(y**i, x**j).flatten() for i, j in powers], 1)).Q


@dataclass(frozen=True)
class Wellformed:
    """Shares of broken and of repeated images.

    broken_<split>: share of images without content of their own. An image is broken if it is empty and does not keep
    the base's plain background. It is empty if it is blank, one colour or a smooth surface (relief below 0.01, or
    below a tenth of the contrast), or noise (coherence below 0.4, or edges below 4). In a split with a few images for
    all prompts, an image is also broken if it is the same as another. same_<split>: share of images that are the same
    as another, of another prompt or seed, in any split.

    Two images are the same if their fingerprints, less the mean of each channel, correlate by more than 0.97,
    regardless of brightness, noise or a shift by a pixel. A split has a few images for all prompts if the share of
    same images is more than halfway from the base's share, for the same prompts, to all of them. Images that the base
    draws alike may be alike, and a method that draws the sky now and then draws the sea, for which this world has a
    single image.

    The thresholds lie in the gaps between the base's images of training templates and images without content, or
    copies. results/reference/wellformed.csv has both sides of each gap, and
    `python -m erasebench.evaluators.wellformed results/reference` writes it. The two further rules (a background that
    is left; a few images for all prompts) and the choice within the gaps were made after a look at erased images of
    evaluation prompts, UCE's among them. That UCE is not broken in the embedded world is therefore no independent
    finding.

    A refused image has no verdict: it counts as refused. A single image repeats nothing and has no verdict on
    sameness.
    """

    judge: Texture
    splits: tuple[str, ...]
    blank: ClassVar[float] = 0.01
    smooth: ClassVar[float] = 0.1
    noise: ClassVar[float] = 0.4
    blurred: ClassVar[float] = 4.0
    alike: ClassVar[float] = 0.97
    near: ClassVar[float] = 0.05

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), *READINGS, "fingerprint")
        made = []
        for split in self.splits:
            ours, theirs = scores[split], base[split]
            empty, repeats = self.empty(ours) & ~self.left(ours, theirs), self.repeats(ours)
            share, before = (np.append(found[found >= 0], 0).mean() for found in (repeats, self.repeats(theirs)))
            few = share > (1 + before) / 2  # a few images for all prompts
            for name, found in (("broken", empty | (few & (repeats > 0))), ("same", repeats)):
                part = Part(split, np.where(ours.refused, np.nan, found), ours.concepts)
                made.append(Measure(f"{name}_{split}", "quality", False, (part,)))
        return made

    def empty(self, scored: Scored) -> np.ndarray:
        """Return whether images are blank, smooth or noise [N]. NaN readings count as empty too."""
        contrast, coherence, relief, edges = (verdicts.rows(self.judge, scored, name) for name in READINGS)
        drawn = (relief >= self.blank) & (relief >= self.smooth * contrast) & (edges >= self.blurred)
        return ~(drawn & ((coherence >= self.noise) | (contrast < self.blank)))  # edges judge hues of one grey

    def left(self, scored: Scored, base: Scored) -> np.ndarray:
        """Return whether images keep most of the base's image [N].

        That is the case if most of their cells match the base's image for the same prompt, and that image is not
        empty. If the base draws an object on a plain background, the remaining part may be the background.
        """
        ours, theirs = map(self.fingerprints, (scored, base))
        cells = np.abs(ours - theirs).reshape(len(ours), 3, -1).max(1)
        return ((cells < self.near).mean(1) > 0.5) & ~self.empty(base)

    def fingerprints(self, scored: Scored) -> np.ndarray:
        """Return fingerprints [N, k] in [0, 1]."""
        return verdicts.rows(self.judge, scored, "fingerprint", 3 * GRID * GRID, (0, 1)).astype(np.float32)

    def repeats(self, scored: Scored) -> np.ndarray:
        """Return whether images repeat one of another prompt or seed [N].

        Empty images repeat nothing. Refused images have NaN, as have all images if the prompts and seeds are all the
        same.
        """
        found, empty = np.full(len(scored.prompts), np.nan), self.empty(scored)
        there = np.flatnonzero(~scored.refused)
        number: dict[tuple[str, int], int] = {}
        asked = np.array([number.setdefault((p.text, p.seed), len(number)) for p in scored.prompts], int)[there]
        if len(set(asked)) < 2:
            return found
        pictures = centred(self.fingerprints(scored)[there])
        pictures[empty[there]] = 0  # correlates with nothing
        for start in range(0, len(there), ROWS):
            rows = slice(start, start + ROWS)
            alike = (pictures[rows] @ pictures.T > self.alike) & (asked[rows, None] != asked)
            found[there[rows]] = alike.any(1)
        return found


def centred(fingerprints: np.ndarray) -> np.ndarray:
    """Return unit vectors [N, k] whose products are correlations. The mean of each channel is subtracted."""
    x = fingerprints.astype(np.float32).reshape(len(fingerprints), 3, -1)
    x = (x - x.mean(2, keepdims=True)).reshape(len(x), -1)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


# -- both sides of the thresholds --------------------------------------------------------------------------------------

KINDS = dict.fromkeys(("cat", "dog", "ship", "horse"), "object") | {"a person": "person", "art": "style"}
TABLE = "wellformed.csv"


def pictures(words: Mapping[str, str], each: int) -> Tensor:
    """Sample images of words -> uint8 [words * each, H, W, 3].

    The embedded model draws `each` of every word, in training templates of its kind.
    """
    from erasebench.config import embedded_source
    from erasebench.contracts import Sampler
    from erasebench.mini.world import names
    from erasebench.model.model import Model

    model, templates, made = Model.load(embedded_source()), names()["templates"]["train"], []
    for word, kind in words.items():
        texts = [templates[kind][i % len(templates[kind])].replace("{c}", word) for i in range(each)]
        made.append(model.sample(texts, list(range(each)), Sampler("ddim", 25, 4.0)).images)
    return torch.cat(made)


def shapeless(count: int, side: int) -> dict[str, Tensor]:
    """Return images without content. Kind -> uint8 [count, side, side, 3]: one colour, smooth surfaces, noise."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:side, :side] / (side - 1)
    grey = lambda: rng.normal(0, 1, (side, side, 3))  # about a grey level
    colour = lambda: rng.uniform(0, 255, 3)

    def surface_of(kind: int) -> np.ndarray:
        u, v, w = rng.uniform(-1, 1, 3)
        far = np.hypot(x - 0.5 - u / 4, y - 0.5 - v / 4)  # distance from a point near the middle
        forms = (u * x + v * y, u * (x - v) ** 2 + w * y, far, np.exp(-(far**2) / 0.2))
        level = forms[kind % len(forms)]
        return (level - level.min())[..., None] / max(float(np.ptp(level)), 1e-9) * colour()

    def noise(blur: int) -> np.ndarray:
        grain = torch.from_numpy(rng.normal(0, 1, (1, 3, side, side)))
        soft = torch.nn.functional.avg_pool2d(grain, 2 * blur + 1, 1, blur, count_include_pad=False)[0].permute(1, 2, 0)
        return 128 + 60 * (soft / soft.std()).numpy()

    every = {
        "one colour": [colour() + grey() for _ in range(count)],
        "smooth": [surface_of(i) + grey() for i in range(count)],
        "noise": [noise(0) for _ in range(count)],
        "blurred noise": [noise(1 + i % 3) for i in range(count)],
    }
    return {k: torch.from_numpy(np.clip(np.stack(v), 0, 255).astype(np.uint8)) for k, v in every.items()}


def copies(images: Tensor) -> Tensor:
    """Return shifted, darkened and noisy copies of images.

    They move by a pixel to the right, and the noise has two grey levels.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 2
    return (images.roll(1, 2).float() * 0.9 + noise).clamp(0, 255).to(torch.uint8)


def gaps(each: int = 16) -> list[dict[str, object]]:
    """Return the most extreme readings on both sides of every threshold.

    One side are images without content, or copies, the other images of the base.
    """
    images = pictures(KINDS, each)
    read = lambda some: {k: v.astype(float) for k, v in Texture().score(some, ()).items()}
    drawn, empty = read(images), {kind: read(some) for kind, some in shapeless(4 * each, images.shape[1]).items()}
    share = lambda scores: scores["relief"] / np.maximum(scores["contrast"], 1e-9)
    # only surfaces that neither of two other thresholds finds count here
    steep = (empty["smooth"]["relief"] >= Wellformed.blank) & (empty["smooth"]["edges"] >= Wellformed.blurred)
    prints, again = centred(drawn["fingerprint"]), centred(read(copies(images))["fingerprint"])
    others = prints @ prints.T - 2 * np.eye(len(prints))
    found = {
        "blank": (empty["one colour"]["relief"].max(), drawn["relief"].min()),
        "smooth": (share(empty["smooth"])[steep].max(initial=0), share(drawn).min()),
        "noise": (empty["noise"]["coherence"].max(), drawn["coherence"].min()),
        "blurred": (empty["blurred noise"]["edges"].max(), drawn["edges"].min()),
        "alike": (np.quantile(others.max(1), 0.5), np.quantile((prints * again).sum(1), 0.5)),
    }
    head = {"pictures": len(images), "no pictures": 4 * each}
    return [
        {"threshold": name, "value": getattr(Wellformed, name), "below": f"{low:.4g}", "above": f"{high:.4g}", **head}
        for name, (low, high) in found.items()
    ]


def main(folder: str) -> None:
    import csv

    with open(f"{folder}/{TABLE}", "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list((lines := gaps())[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(lines)


if __name__ == "__main__":
    main(sys.argv[1])
