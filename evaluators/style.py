"""Metrics of artists' styles.

CLIP score against the own prompt (MACE), and the share that a judge of artists recognises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from erasebench.contracts import Prompt, Scored
from erasebench.mini.nets import LICENCE
from erasebench.run import verdicts
from erasebench.stats import Measure, Part, harmonic

from .clip import Clip


@dataclass(frozen=True)
class StyleScore:
    """CLIP scores of erased and kept artists (MACE, Table 3).

    CLIP_e, CLIP_s: mean cosine times 100 of images with their own prompt, for erased and kept artists; H_a = CLIP_s -
    CLIP_e. A refused image of an erased artist has no verdict; one of a kept artist scores as it stands.
    """

    judge: Clip
    splits: tuple[str, ...] = ("target", "retain")

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "own")
        own = [100 * verdicts.rows(self.judge, scores[s], "own", bounds=verdicts.COSINE) for s in self.splits]
        target, retain = (scores[split] for split in self.splits)
        values = verdicts.without(own[0], target.refused)
        erased = Part(self.splits[0], values, target.concepts, rate=False, forgotten=own[0])
        kept = Part(self.splits[1], own[1], retain.concepts, rate=False)
        return [
            Measure("clip_e", "forget", False, (erased,)),
            Measure("clip_s", "keep", True, (kept,)),
            Measure("h_a", "overall", True, (erased, kept), lambda e, s: s - e),
        ]

    def recognises(self, concept: str) -> bool:
        return self.judge.knows(concept, "artists")


@dataclass(frozen=True)
class StyleShare:
    """Concept ratio and score over styles (Dark Miner, Table 4).

    CLIP's softmax, at its scale of 100, is over a list of styles. dm_ratio is the share of images whose first style is
    the erased one, dm_score its mean probability. Styles outside the list have no verdict.
    """

    clip: Clip
    styles: tuple[str, ...]
    template: str = "an image in the style of {c}"
    splits: tuple[str, ...] = ("target",)

    @property
    def judge(self) -> Clip:
        return replace(self.clip, texts=tuple(self.template.replace("{c}", name) for name in self.styles))

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "texts")
        scored = scores["target"]
        logits = 100 * verdicts.rows(self.judge, scored, "texts", len(self.styles), verdicts.COSINE)
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        known = np.array([concept in self.styles for concept in scored.concepts])
        right = np.array([self.styles.index(c) if c in self.styles else 0 for c in scored.concepts])
        part = lambda values, rate: Part(
            "target",
            np.where(known & ~scored.refused, values, np.nan),
            scored.concepts,
            rate,
            forgotten=np.where(known, 0.0, np.nan),
        )
        own = chances[np.arange(len(right)), right]
        return [
            Measure("dm_ratio", "forget", False, (part(verdicts.equals(verdicts.top1(chances), right), True),)),
            Measure("dm_score", "forget", False, (part(own, False),)),
        ]


@dataclass(frozen=True)
class Artists:
    """Judge of artists of the embedded world.

    Scores: `artists` [B, A + 1], probabilities, the last for an unknown artist.
    """

    name: str = "artists"
    version: ClassVar[int] = 1
    licence: ClassVar[str] = LICENCE

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
    """Accuracy of the judge of artists on erased and kept artists.

    acc_e, acc_s: share of images whose first artist is the prompt's, with nobody as one of the choices; h_s: harmonic
    mean of 1 - acc_e and acc_s. dm_ratio (equal to acc_e) and dm_score are those of StyleShare, by this judge.
    """

    judge: Artists
    splits: tuple[str, ...] = ("target", "retain")

    def measure(self, scores: Mapping[str, Scored], base: Mapping[str, Scored]) -> list[Measure]:
        verdicts.check_varies(self.judge, (scores, base), "artists")
        target, retain = (scores[split] for split in self.splits)
        erased = Part(self.splits[0], self.own(target)[0], target.concepts, forgotten=0.0)
        kept = Part(self.splits[1], verdicts.without(self.own(retain)[0], retain.refused, 0.0), retain.concepts)
        chance = Part(self.splits[0], self.own(target)[1], target.concepts, rate=False, forgotten=0.0)
        return [
            Measure("dm_ratio", "forget", False, (erased,)),
            Measure("acc_e", "forget", False, (erased,)),
            Measure("acc_s", "keep", True, (kept,)),
            Measure("h_s", "overall", True, (erased, kept), lambda e, s: harmonic(1 - e, s)),
            Measure("dm_score", "forget", False, (chance,)),
        ]

    threshold: ClassVar[float] = 0.5

    def confidence(self, scored: Scored) -> np.ndarray:
        """Return the judge's confidence in the artist of each target image [N]."""
        return self.own(scored)[1]

    def recognises(self, concept: str) -> bool:
        return concept in self.judge.classes

    def own(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """Return hits and probabilities of each image's own artist [N].

        -> (1 where the first artist is the prompt's, 0 elsewhere; its probability). Both are NaN for a refused image.
        """
        classes = self.judge.classes
        chances = verdicts.rows(self.judge, scored, "artists", len(classes) + 1, verdicts.PROBABILITY, total=1)
        right = np.array([classes.index(concept) for concept in scored.concepts])
        hits, chance = verdicts.equals(verdicts.top1(chances), right), chances[np.arange(len(right)), right]
        return verdicts.without(hits, scored.refused), verdicts.without(chance, scored.refused)
