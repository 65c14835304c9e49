"""Erased Stable Diffusion (Gandikota et al., ICCV 2023): fine-tune the U-Net away from the concept.

    || eps_theta(x_t, c) - [ eps*(x_t) - eta (eps*(x_t, c) - eps*(x_t)) ] ||^2                          (Eq. 6)

with eps* the frozen base. Departures from the released code: weights stay in fp32 (Adam on bf16 weights leaves half of
them unchanged), and several x_t share a step. With `sampler=frozen` neither the trajectories nor the targets depend on
theta, and both come from one batched sampling before training. With `sampler=moving` t is one of those that the
sampler's next step stands for; in the released code the latents are two or three steps behind the t given to the
networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasebench.contracts import Brief, FitCost, Sampler
from erasebench.model.context import Context, join
from erasebench.model.guidance import ClassifierFree
from erasebench.model.memory import UNGRAPHED, at_once, in_slices
from erasebench.model.model import Model
from erasebench.toolbox.training import TRAINED, Optimisation, erased_noise_target, fine_tune, tuned
from erasebench.toolbox.trajectory import midway


@dataclass(frozen=True)
class ESD:
    """Fine-tuning with negative guidance.

    variant x trains the cross-attention, u everything else. sampler: x_t from the frozen base (released 2025) or from
    the model in training (the paper's, released 2023). eta is the negative guidance of Eq. 6. trajectories: number of
    frozen trajectories, shared by all concepts.
    """

    variant: Literal["x", "u"] = "x"
    sampler: Literal["frozen", "moving"] = "moving"
    steps: int = 1000
    batch: int = 1
    lr: float = 1e-5
    eta: float = 1.0
    start_guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int = 100
    version: ClassVar[int] = 1

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        frozen = 2 * self.ddim_steps * self.trajectories
        moving = self.steps * self.batch * (self.ddim_steps + 1)
        return FitCost(frozen if self.sampler == "frozen" else moving, self.steps * self.batch)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            concepts = model.encode([concept.name for concept in brief.concepts])
        states = self.frozen if self.sampler == "frozen" else self.moving
        drawn = states(model, concepts, generator)

        def loss(step: int) -> Tensor:
            state = next(drawn)
            target = erased_noise_target(state.free, state.text, self.eta)
            return (model.eps(state.z, state.t, state.context) - target).square().mean()

        adam = partial(torch.optim.Adam, lr=self.lr)
        fine_tune(model, TRAINED[self.variant], loss, Optimisation(self.steps, adam), out, "esd")

    def frozen(self, model: Model, concepts: Context, generator: torch.Generator) -> Iterator[State]:
        """Yield batches of states from trajectories of the base.

        Guidance has already computed both predictions.
        """
        which = torch.arange(self.trajectories) % len(concepts.ids)
        pool: list[State] = []
        with model.teacher():
            for part in which.split(64):
                seeds = torch.randint(2**31, (len(part),), generator=generator).tolist()
                record = partial(self.recorded, model, concepts.select(part), seeds)
                most = at_once(model.latent_shape(), UNGRAPHED)
                slices = in_slices(model, ("sample", None), record, len(part), most)
                steps = (state for states in zip(*slices, strict=True) for state in states)
                pool += [state.one(i) for state in steps for i in range(len(state.z))]
        for row in torch.randint(len(pool), (self.steps, self.batch), generator=generator).tolist():
            z, t, contexts, free, text = zip(*(pool[i] for i in row), strict=True)
            yield State(torch.cat(z), torch.cat(t), join(*contexts), torch.cat(free), torch.cat(text))

    def recorded(self, model: Model, contexts: Context, seeds: list[int], rows: slice) -> list[State]:
        """Record the current model's states at every step.

        Each state has the predictions without and with the prompt. `rows` selects the prompts.
        """
        record = Recorder()
        with model.changed(guidance=record):
            model.latents(contexts.select(rows), seeds[rows], self.trajectory)
        return record.states

    def moving(self, model: Model, concepts: Context, generator: torch.Generator) -> Iterator[State]:
        """Yield batches of states at one random t, sampled with current weights.

        The targets come from the base.
        """
        for _ in range(self.steps):
            context = concepts.select(torch.randint(len(concepts.ids), (self.batch,), generator=generator))
            with torch.no_grad():
                z, t = midway(model, context, self.trajectory, generator)
                with model.teacher():
                    free = model.eps(z, t, model.unconditional().repeat(self.batch))
                    text = model.eps(z, t, context)
            yield State(z, t, context, free, text)

    @property
    def trajectory(self) -> Sampler:
        return Sampler("ddim", self.ddim_steps, self.start_guidance)

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


class State(NamedTuple):
    """Noisy latents with their prompts and the base's predictions.

    z at t [B]; free and text are the predictions without and with the prompt.
    """

    z: Tensor
    t: Tensor
    context: Context
    free: Tensor
    text: Tensor

    def one(self, i: int) -> State:
        part = slice(i, i + 1)
        return State(self.z[part], self.t[part], self.context.select(part), self.free[part], self.text[part])


@dataclass(frozen=True)
class Recorder(ClassifierFree):
    """Classifier-free guidance that records its states and predictions."""

    states: list[State] = field(default_factory=list)

    def __call__(self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float, state: dict[str, Any]):
        free, text = self.predictions(model, z, t, context, state)
        noises = (model.as_noise(each, z, t) for each in (free, text))
        self.states.append(State(z, t.expand(len(z)), context, *noises))
        return free + scale * (text - free)
