"""Noisy training latents on their way from noise to prompts.

Fine-tuning methods train on them; their distribution is the sampler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..contracts import Sampler
from ..model.context import Context
from ..model.memory import sampled
from ..model.model import Model


class States(NamedTuple):
    """Latents at timesteps on their way to prompts.

    Latents z [N, C, h, w] at timesteps t [N]; `which` [N] is the number of the prompt that each approaches.
    """

    z: Tensor
    t: Tensor
    which: Tensor


def midway(
    model: Model, context: Context, sampler: Sampler, generator: torch.Generator, seeds: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sample latents up to a random step.

    Returns (z [B, C, h, w], t [B]). The model samples as it stands, and the step is the same for all; t is uniform
    among the training timesteps of that step (ESD and the methods built on it). `seeds`: of the initial noise, if
    the caller must know it.
    """
    count = len(context.ids)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
    stop = int(draw(sampler.steps))
    seeds = draw(2**31, count).tolist() if seeds is None else seeds
    z = model.latents(context, seeds, sampler, stop=stop)
    width = len(model.alphas_cumprod) // sampler.steps
    t = (model.scheduler(sampler).timesteps[stop].cpu() - draw(width)).clamp(min=0)
    return z, t.expand(count).to(z.device)


def count_evaluations(steps: int, trajectories: int | None) -> tuple[int, int]:
    """Count U-Net evaluations -> (of the base's trajectories, per `midway` sample).

    The second is 0 with `trajectories`. A `midway` walk ends at a random step, after (steps - 1) / 2 guided steps on
    average.
    """
    return 2 * steps * (trajectories or 0), 0 if trajectories else steps - 1


def walked(model: Model, contexts: Context, count: int, sampler: Sampler, generator: torch.Generator) -> States:
    """Return every step of `count` trajectories with the model as it stands.

    The trajectories take the prompts in turn.
    """
    made = []
    for part in (torch.arange(count) % len(contexts.ids)).split(64):
        seeds = torch.randint(2**31, (len(part),), generator=generator).tolist()
        sampled(model, contexts.select(part), seeds, sampler, trace := [])
        made += [States(z, t.expand(len(z)), part) for t, z in trace]
    return States(*(torch.cat(parts) for parts in zip(*made, strict=True)))


class Along:
    """Latents on their way to any of some prompts.

    `trajectories`: None samples each anew with the current model; a number draws from the steps of that many
    trajectories of the model as it is at construction (far cheaper, and another distribution: the student's own
    latents drift from the base's).
    """

    def __init__(
        self,
        model: Model,
        contexts: Context,
        sampler: Sampler,
        generator: torch.Generator,
        trajectories: int | None,
    ):
        self.model, self.sampler, self.generator = model, sampler, generator
        self.seen = None
        if trajectories is not None:
            count = max(trajectories, len(contexts.ids))  # at least one for each prompt
            self.seen = walked(model, contexts, count, sampler, generator)
            self.rows = [torch.nonzero(self.seen.which == i).flatten() for i in range(len(contexts.ids))]

    def __call__(self, context: Context, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return (z [B, C, h, w], t [B]) towards the prompts [B].

        `which` [B] holds their numbers.
        """
        if self.seen is None:
            return midway(self.model, context, self.sampler, self.generator)
        rows = [self.rows[i] for i in which.tolist()]
        row = torch.stack([r[torch.randint(len(r), (), generator=self.generator)] for r in rows])
        return self.seen.z[row], self.seen.t[row]
