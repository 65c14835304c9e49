"""Safe Latent Diffusion (Schramowski et al., CVPR 2023): guidance away from the concept.

It acts where the prompt moves towards the concept:

    eps = eps(x_t) + w [ eps(x_t, p) - eps(x_t) - gamma ]
    gamma = mu (eps(x_t, S) - eps(x_t)) + s_m nu
    mu = min(1, |s (eps(x_t, p) - eps(x_t, S))|)   where eps(x_t, p) - eps(x_t, S) < lambda, or else 0
    nu <- beta nu + (1 - beta) gamma,   which starts at 0

S: the names of the concepts. During the warm-up gamma is omitted, but nu is updated. The paper prints max in place of
min; this is the formula of the released code. The momentum nu is part of the trajectory's state, one for each image.
The warm-up ends at the noise level at which `warmup` of fifty steps end: a sampler of fewer steps warms up over the
same part of the trajectory, and a caller with a single t (an attack) knows whether it has ended.

Departures from the released code: a list of names too long for the context is split and the encodings are averaged
(there it is truncated), and gamma acts at w = 1 too (there it does not). As there, eps is the U-Net's raw output: v on
a base with v-prediction.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from erasebench.methods.negative_prompt import listed
from torch import Tensor

from erasebench.contracts import Brief, FitCost
from erasebench.model.context import Context, join
from erasebench.model.guidance import ClassifierFree
from erasebench.model.model import Model
from erasebench.model.reuse import once

STRENGTHS = {  # the paper's configurations Hyp-Weak to Hyp-Max
    "weak": {"warmup": 15, "scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum": 0.0},
    "medium": {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum": 0.4},
    "strong": {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
    "max": {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum": 0.7},
}


@dataclass(frozen=True)
class SLD:
    """Safety guidance with the paper's strengths.

    variant sets every parameter that is not given. warmup: in steps of fifty. scale: s. threshold: lambda.
    momentum_scale: s_m. momentum: beta.
    """

    variant: Literal["weak", "medium", "strong", "max"] = "medium"
    warmup: float | None = None
    scale: float | None = None  # weak: 20, as released by its authors; others evaluate it with 200
    threshold: float | None = None
    momentum_scale: float | None = None
    momentum: float | None = None
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name, value in STRENGTHS.get(self.variant, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        return FitCost()

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        texts = listed(model, [concept.name for concept in brief.concepts])
        (out / "safety_concept.json").write_text(json.dumps(texts))

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        context = model.encode(json.loads((artifact / "safety_concept.json").read_text()))
        return model.changed(guidance=SafetyGuidance(concept=context.mean(), sld=self))


@dataclass(frozen=True)
class SafetyGuidance(ClassifierFree):
    """Classifier-free guidance with a safety prediction and its momentum."""

    concept: Context | None = None
    sld: SLD = SLD()
    has_memory: ClassVar[bool] = True

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        concept = self.concept.repeat(len(z))
        return super().begin(model, context, z) | {"concept": concept, "momentum": torch.zeros_like(z)}

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        free, text, safety = self.predictions(model, z, t, context, state)
        how, momentum = self.sld, state["momentum"]
        strength = (how.scale * (text - safety)).abs().clamp(max=1)
        strength = torch.where(text - safety < how.threshold, strength, 0)
        away = strength * (safety - free) + how.momentum_scale * momentum
        state["momentum"] = how.momentum * momentum + (1 - how.momentum) * away
        warm = t <= len(model.alphas_cumprod) * (1 - how.warmup / 50)
        return free + scale * (text - free - away * warm.view(-1, 1, 1, 1))

    def predictions(self, model: Model, z: Tensor, t: Tensor, context: Context, state: dict) -> tuple[Tensor, ...]:
        """Return the predictions for neg, the prompt and S.

        Each is [B, C, h, w]. One call of the U-Net computes all three if their contexts have the same length.
        """
        contexts = state["negative"], context, state["concept"]
        if context.hidden.shape[1] != state["concept"].hidden.shape[1]:  # a mined embedding may have any length
            return tuple(model.predict(z, t, each) for each in contexts)
        joined = once("joined with the concept", lambda: join(*contexts), *(each.hidden for each in contexts))
        return model.predict(torch.cat([z] * 3), t.repeat(3) if t.ndim else t, joined).chunk(3)
