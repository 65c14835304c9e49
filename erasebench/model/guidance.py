"""What methods may replace around the U-Net: guidance, by default classifier-free, a guard of prompts, what surrounds each call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from .context import Context, join
from .reuse import once

if TYPE_CHECKING:
    from .model import Model


class Guidance(Protocol):
    has_memory: ClassVar[bool]  # whether the noise at one timestep depends on the timesteps before it

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        """State of the trajectories that start at z [B, C, h, w]; nothing is kept anywhere else."""
        ...

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        """What the scheduler is handed [B, C, h, w]: predictions of the U-Net (`Model.predict`), composed. scale: one for
        all, or [B, 1, 1, 1], at least 1."""
        ...


@dataclass(frozen=True)
class ClassifierFree:
    """eps(neg) + scale * (eps(prompt) - eps(neg)) (Ho & Salimans, 2022, Eq. 6); neg is the empty prompt by default.

    eps stands for what the U-Net predicts, be it noise or not: diffusers guides that, too."""

    negative: Context | None = None
    has_memory: ClassVar[bool] = False

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        negative = self.negative or model.unconditional()
        return {"negative": negative.repeat(len(z)) if len(negative.ids) == 1 else negative}

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        if isinstance(scale, int | float) and scale == 1:  # diffusers, too, leaves guidance out at 1
            return model.predict(z, t, context, state)
        free, text = self.predictions(model, z, t, context, state)
        return free + scale * (text - free)

    def predictions(self, model: Model, z: Tensor, t: Tensor, context: Context, state: dict) -> tuple[Tensor, ...]:
        """Predictions of neg and of the prompt, each [B, C, h, w], in one call of the U-Net where both are of one length."""
        if state["negative"].hidden.shape[1] != context.hidden.shape[1]:  # a mined embedding may have any
            return model.predict(z, t, state["negative"], state), model.predict(z, t, context, state)
        joined = once("joined", lambda: join(state["negative"], context), state["negative"].hidden, context.hidden)
        both = torch.cat([t, t]) if t.ndim else t  # one timestep for all, or one for each
        return model.predict(torch.cat([z, z]), both, joined, state).chunk(2)


class Guard(Protocol):
    """Scores prompts; those at or above `threshold` are refused. Differentiable, since attacks see it too."""

    threshold: float

    def __call__(self, model: Model, context: Context) -> Tensor: ...


class Around(Protocol):
    """What is entered around every call of the U-Net, with the prompts of its rows."""

    def __call__(self, model: Model, context: Context) -> AbstractContextManager[None]: ...


def nothing_around(model: Model, context: Context) -> AbstractContextManager[None]:
    return nullcontext()
