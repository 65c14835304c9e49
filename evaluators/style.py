"""Artists' styles: CLIP score against the own prompt (MACE), and the share that a judge of artists recognises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench import stats
from erasebench.contracts import Judge, Metric, Prompt, Scored

from .clip import Clip


@dataclass(frozen=True)
class StyleScore:
    """CLIP_e, CLIP_s: mean cosine times 100 of images with their own prompt, erased and kept artists;
    H_a = CLIP_s - CLIP_e (MACE, Table 3)."""

    judge: Clip
    splits: tuple[str, ...] = ("target", "retain")

    def summarize(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Metric]:
        own = {split: 100 * scores[split].arrays["own"].astype(float) for split in self.splits}
        draws = {
            split: stats.resample(own[split], scores[split].concepts, np.random.default_rng(0)) for split in self.splits
        }
        metrics = [
            stats.mean_metric(name, split, own[split], scores[split].concepts, better, group, rate=False)
            for name, split, group, better in (("clip_e", "target", "forget", False), ("clip_s", "retain", "keep", True))
        ]
        gap = float(own["retain"].mean() - own["target"].mean())
        low, high = stats.interval(draws["retain"] - draws["target"], gap)
        n = sum(map(len, own.values()))
        return [*metrics, Metric("h_a", "target+retain", gap, low, high, "bootstrap", n, n, True, "overall")]


@dataclass(frozen=True)
class Artists:
    """The embedded world's judge of artists. Scores: `artists` [B, A + 1], probabilities, the last of nobody known."""

    name: str = "artists"
    version: ClassVar[int] = 1

    @property
    def classes(self) -> tuple[str, ...]:
        from erasebench.mini import nets

        return tuple(nets.classes()["artists"])

    def weights(self) -> dict[str, str]:
        from erasebench.mini import nets

        return nets.checksums("judge")

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        from erasebench.mini import nets

        return {"artists": nets.judged(images)["artists"].softmax(1).numpy()}


@dataclass(frozen=True)
class ArtistAccuracy:
    """acc_e, acc_s and their harmonic mean h_s: share of images whose first artist, nobody among them, is the
    prompt's; style_ratio and style_score as Dark Miner reads them (Table 4): argmax and mean probability."""

    judge: Artists
    splits: tuple[str, ...] = ("target", "retain")
