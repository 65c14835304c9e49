"""Replaceable parts around the U-Net: guidance, prompt guard, wrapper of each call.

Guidance is classifier-free by default; by default there is neither guard nor wrapper.
"""

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
        """Return the state of new trajectories from z [B, C, h, w].

        No state is kept anywhere else."""
        ...

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        """Return the guided prediction for the scheduler [B, C, h, w].

        It combines predictions of the U-Net (`Model.predict`). scale: one for all, or [B, 1, 1, 1]; at least 1."""
        ...


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: eps(neg) + scale * (eps(prompt) - eps(neg)) (Ho & Salimans, 2022, Eq. 6).

    neg is the empty prompt by default. eps is the U-Net's prediction, noise or not: diffusers, too, guides it as is."""

    negative: Context | None = None
    has_memory: ClassVar[bool] = False

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        negative = self.negative or model.unconditional()
        return {"negative": negative.repeat(len(z)) if len(negative.ids) == 1 else negative}

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        if isinstance(scale, int | float) and scale == 1:  # diffusers, too, skips guidance at 1
            return model.predict(z, t, context, state)
        free, text = self.predictions(model, z, t, context, state)
        return free + scale * (text - free)

    def predictions(self, model: Model, z: Tensor, t: Tensor, context: Context, state: dict) -> tuple[Tensor, ...]:
        """Return the predictions for neg and prompt, each [B, C, h, w].

        They take one call of the U-Net if both have the same length."""
        if state["negative"].hidden.shape[1] != context.hidden.shape[1]:  # a mined embedding may have any length
            return model.predict(z, t, state["negative"], state), model.predict(z, t, context, state)
        joined = once("joined", lambda: join(state["negative"], context), state["negative"].hidden, context.hidden)
        both = torch.cat([t, t]) if t.ndim else t  # one timestep for all, or one for each
        return model.predict(torch.cat([z, z]), both, joined, state).chunk(2)


class Guard(Protocol):
    """Score of prompts; those at or above `threshold` are refused.

    It must be differentiable, since attacks see it too."""

    threshold: float

    def __call__(self, model: Model, context: Context) -> Tensor: ...


class Around(Protocol):
    """Context manager around every call of the U-Net, given its rows' prompts."""

    def __call__(self, model: Model, context: Context) -> AbstractContextManager[None]: ...


def nothing_around(model: Model, context: Context) -> AbstractContextManager[None]:
    return nullcontext()
