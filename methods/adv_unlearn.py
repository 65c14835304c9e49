"""AdvUnlearn (Zhang et al., NeurIPS 2024): adversarial training of the text encoder.

It trains against prompts that bring the concept back:

    min over theta   || eps(x_t, E_theta(d* + c)) - [eps(x_t) - eta (eps(x_t, c) - eps(x_t))] ||^2
                     + lambda || eps(x_t, E_theta(c_r)) - eps(x_t, c_r) ||^2
    d* = argmin over d   || eps(x_t, E_theta(d + c)) - eps(x_t, c) ||^2,    d: embeddings of k words before the prompt

The U-Net, eps, stays the base's; the base's text encoder reads every prompt outside of E_theta(.). c_r: retained
prompts. Latents and targets therefore do not depend on theta: both come from trajectories sampled once, at the
sampler's own timesteps. The released code samples anew in every step, the attack's included, and draws t between
timesteps (at twenty times the cost).

Further departures: the attack clears its gradients after each step (there they add up over all thirty), returns the
embeddings of its last step (not those before it) and counts tokens (not words). Several attacks run side by side, each
on its own latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from erasebench.methods.esd import ESD, State
from torch import Tensor

from erasebench.contracts import Brief, ErasebenchError
from erasebench.model.context import Context
from erasebench.model.model import Model
from erasebench.toolbox.search import Slots, errors, table, with_vectors, words
from erasebench.toolbox.training import Optimisation, erased_noise_target, fine_tune, tuned
from erasebench.toolbox.vocabulary import kept_prompts

ENCODER = r"^text_encoder\.(?!.*embeddings\.)"  # every layer and the last norm


@dataclass(frozen=True)
class AdvUnlearn:
    """Text encoder trained against adversarial prefixes.

    warmup: steps before the first attack. retained: number of retained prompts (preserved names and captions); each
    step uses retain_batch of them with weight retain_scale (lambda). words: k of the attack, which starts from random
    words. eta, start_guidance, ddim_steps, trajectories: as in ESD.
    """

    steps: int = 1000
    warmup: int = 200
    batch: int = 1
    lr: float = 1e-5
    eta: float = 1.0
    retain_scale: float = 0.3  # published for nudity
    retain_batch: int = 5
    retained: int = 243  # as released, for COCO's objects
    words: int = 1
    attack_steps: int = 30
    attack_lr: float = 1e-3
    start_guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int = 100
    version: ClassVar[int] = 1

    def skip(self, model: Model) -> str:
        return "it trains one text encoder, and this model has two" if model.text_encoder_2 is not None else ""

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            concepts = model.encode([concept.name for concept in brief.concepts])
            retained = model.encode(kept_prompts(brief, self.retained, generator))
        if int(concepts.ends.max()) + self.words >= model.context_length:
            raise ErasebenchError(f"method.words={self.words}: the context has no room for them before the concept")
        count, attacks = len(concepts.ids), self.attack_steps * max(self.steps - self.warmup, 0)
        towards = [
            self.states(
                model, concepts.select([i]), self.batch, self.trajectories // count, self.steps + attacks, generator
            )
            for i in range(count)
        ]
        kept = self.states(model, retained, self.retain_batch, len(retained.ids), self.steps, generator)

        def loss(step: int) -> Tensor:
            concept = towards[torch.randint(count, (), generator=generator)]  # one concept a step, for the attack too
            adversary = self.attack(model, concept, generator) if step >= self.warmup else None
            state, other = next(concept), next(kept)
            context = model.encode(ids=state.context.ids)
            if adversary is not None:
                context = with_vectors(model, before(state.context, self.words), adversary)
            target = erased_noise_target(state.free, state.text, self.eta)
            forget = (model.eps(state.z, state.t, context) - target).square().mean()
            now = model.eps(other.z, other.t, model.encode(ids=other.context.ids))
            return forget + self.retain_scale * (now - other.text).square().mean()

        adam = partial(torch.optim.Adam, lr=self.lr)
        fine_tune(model, ENCODER, loss, Optimisation(self.steps, adam), out, "adv_unlearn")

    def states(
        self, model: Model, contexts: Context, batch: int, trajectories: int, count: int, generator: torch.Generator
    ) -> Iterator[State]:
        """Yield `count` batches of states on the base's trajectories.

        The trajectories lead to the prompts, and each batch has the base's predictions.
        """
        esd = ESD(
            steps=count,
            batch=batch,
            start_guidance=self.start_guidance,
            ddim_steps=self.ddim_steps,
            trajectories=max(trajectories, 1),
        )
        return esd.frozen(model, contexts, generator)

    def attack(self, model: Model, towards: Iterator[State], generator: torch.Generator) -> Tensor:
        """Return adversarial embeddings [batch * k, D] for the current theta.

        Placed before the prompt, they restore the concept most.
        """
        known = words(model)
        first = known[torch.randint(len(known), (self.batch * self.words,), generator=generator)]
        adversary = table(model)[first].detach().clone().requires_grad_(True)
        optimiser = torch.optim.Adam([adversary], lr=self.attack_lr)
        for _ in range(self.attack_steps):
            state = next(towards)
            optimiser.zero_grad()
            adversary.grad = torch.autograd.grad(self.revival(model, state, adversary), adversary)[0]
            optimiser.step()
        return adversary.detach()

    def revival(self, model: Model, state: State, adversary: Tensor) -> Tensor:
        """Return the attack's loss, summed over prompts.

        The sum gives each prompt the same gradient as alone.
        """
        context = with_vectors(model, before(state.context, self.words), adversary)
        return errors(model.eps(state.z, state.t, context), state.text).sum()

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


def before(context: Context, count: int) -> Slots:
    """Return prompts with `count` free slots after their start token."""
    ids = context.ids
    shifted = torch.cat([ids[:, :1], ids[:, :1].expand(-1, count), ids[:, 1 : ids.shape[1] - count]], 1)
    free = torch.zeros_like(shifted, dtype=torch.bool)
    free[:, 1 : 1 + count] = True
    return Slots(shifted, free)
