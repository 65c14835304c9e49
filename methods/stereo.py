"""STEREO (Srivatsan et al., CVPR 2025): search thoroughly enough, then robustly erase once.

search, `rounds` times, theta continues from round to round:
    min over theta   || eps_theta(x_t, p) - [eps(x_t) - eta (eps(x_t, p) - eps(x_t))] ||^2,  p: the concept, then the last v
    min over v       E || noise - eps_theta(x_t, t, v) ||^2   over images of the concept, others in every round
erase, theta from the base again, with p any of P = {concept, v_1, v_2, ...} and p_a an anchor prompt:
    min over theta   || eps_theta(x_t, p) - [eps(x_t) + s_a (eps(x_t, p_a) - eps(x_t))
                                             - s_n mean over q in P of (eps(x_t, q) - eps(x_t))] ||^2

eps is the base. The numbers are the released code's, after expanding its normalised guidance: its single scale of 2
gives s_a = 1 but s_n = 3 (a sign is taken after one is subtracted), and its negative guidance of 2 in the search gives
eta = 0. Its anchors hold the concept beside other things (written by a language model); here they are the training
templates with the concept or its surrogate.

Departures from the released code: only theta is trained (there a flag that should freeze the rest has no effect), and
theta is ESD's parameter group (there a group with the time embedding and the output, and without norms). Prompts are
drawn uniformly (there they are dealt out), words are learnt from the surrogate's last token on, and unused predictions
are not computed. Several concepts are searched for one by one and erased together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasebench.contracts import Brief, ErasebenchError, Sampler
from erasebench.model.context import Context, join
from erasebench.model.model import Model
from erasebench.tasks import seed_of
from erasebench.toolbox.closed_form import filled
from erasebench.toolbox.inversion import Inversion, textual_inversion
from erasebench.toolbox.search import FREE, slots, table, tokens, with_vectors
from erasebench.toolbox.training import TRAINED, Optimisation, drawn, erased_noise_target, fine_tune, tuned
from erasebench.toolbox.trajectory import Along

Target = Callable[[Tensor, Tensor, Context, Tensor], Tensor]  # of z, t, prompts and their numbers; called with the base


@dataclass(frozen=True)
class STEREO:
    """Iterated search for adversarial words, followed by one robust erasure.

    variant x trains the cross-attention, u everything else. search_*: of the erasures in the search. pictures: number
    of images of each concept, divided among the rounds. inversion_*: of v. steps, lr: of the last erasure. batch: of
    all erasures. anchors: names that fill the templates. anchor_scale, negative_scale: s_a and s_n. trajectories: as in
    AP.
    """

    variant: Literal["x", "u"] = "u"
    rounds: int = 2  # of erasing and inverting, before the final erasure
    search_steps: int = 200
    search_lr: float = 5e-6
    search_eta: float = 0.0  # negative guidance in the search; released: 2 in a form that equals 0
    pictures: int = 500
    inversion_steps: int = 3000
    inversion_batch: int = 1
    inversion_lr: float = 5e-3
    steps: int = 200
    batch: int = 1
    lr: float = 2e-5
    anchors: Literal["concept", "surrogate"] = "concept"
    anchor_scale: float = 1.0
    negative_scale: float = 3.0  # released: 3, from one scale of 2 for both; 1 would be as strong as the anchor's
    start_guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int | None = None
    image_guidance: float = 7.5
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.pictures:
            raise ErasebenchError(
                f"method.rounds={self.rounds}: at least one, and no more than there are pictures ({self.pictures})"
            )

    def skip(self, model: Model) -> str:
        return "it learns words of one text encoder, and this model has two" if model.text_encoder_2 is not None else ""

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            concepts = model.encode([concept.name for concept in brief.concepts])
            anchors = model.encode([filled(t, name) for name in self.anchored(brief) for t in brief.templates])
        known = [concepts, *self.search(model, brief, concepts, generator, seed)]

        def target(z: Tensor, t: Tensor, prompts: Context, which: Tensor) -> Tensor:
            own = which % len(concepts.ids)  # the concept of each prompt
            place = torch.randint(len(brief.templates), own.shape, generator=generator)
            asked = [model.unconditional().repeat(len(z)), anchors.select(own * len(brief.templates) + place)]
            asked += [context.select(own) for context in known]
            free, anchor, *negative = (model.eps(z, t, context) for context in asked)
            return self.composed(free, anchor, torch.stack(negative))

        self.erase(model, join(*known), target, self.steps, self.lr, generator, out)

    def anchored(self, brief: Brief) -> list[str]:
        return [concept.name if self.anchors == "concept" else concept.surrogate for concept in brief.concepts]

    def search(
        self, model: Model, brief: Brief, concepts: Context, generator: torch.Generator, seed: int
    ) -> list[Context]:
        """Return the learnt prompts of every round, one word for each concept.

        In each round they still bring the concepts back.
        """

        def target(z: Tensor, t: Tensor, prompts: Context, which: Tensor) -> Tensor:
            free = model.eps(z, t, model.unconditional().repeat(len(z)))
            return erased_noise_target(free, model.eps(z, t, prompts), self.search_eta)

        pictures = [
            self.shown(model, brief, concept.name, seed).tensor_split(self.rounds) for concept in brief.concepts
        ]
        known = [concepts]
        with ExitStack() as stack:
            for number in range(self.rounds):
                folder = Path(stack.enter_context(TemporaryDirectory()))
                self.erase(model, known[-1], target, self.search_steps, self.search_lr, generator, folder)
                stack.enter_context(tuned(model, folder))
                vectors = [
                    self.inverted(model, brief, i, shown[number], seed_of("stereo inversion", seed, number, i))
                    for i, shown in enumerate(pictures)
                ]
                with torch.no_grad():
                    known.append(with_vectors(model, slots(model, [[FREE]] * len(vectors)), torch.cat(vectors)))
        return known[1:]

    def shown(self, model: Model, brief: Brief, name: str, seed: int) -> Tensor:
        """Draw a concept's latents [pictures, C, h, w] with the base.

        The prompts are training templates.
        """
        sampler = Sampler("ddim", self.ddim_steps, self.image_guidance)
        texts = [filled(brief.templates[i % len(brief.templates)], name) for i in range(self.pictures)]
        seeds = [seed_of("stereo picture", name, seed, i) for i in range(self.pictures)]
        return drawn(model, texts, seeds, sampler).z

    def inverted(self, model: Model, brief: Brief, number: int, shown: Tensor, seed: int) -> Tensor:
        """Learn a word [1, D] from one concept's images.

        The current model predicts the noise. Raises ErasebenchError if the inversion diverges.
        """
        concept = brief.concepts[number]
        start = table(model)[tokens(model, concept.surrogate or concept.name)[-1:]]
        how = Inversion(self.inversion_steps, self.inversion_batch, self.inversion_lr, seed)
        vector = textual_inversion(model, shown, brief.templates, start, how)
        if not torch.isfinite(vector).all():
            raise ErasebenchError(f"the inversion of {concept.name!r} diverged: lower method.inversion_lr")
        return vector

    def composed(self, free: Tensor, anchor: Tensor, negative: Tensor) -> Tensor:
        """Return the last erasure's target [B, C, h, w].

        free, anchor: predictions for the empty prompt and for anchors. negative: for all of P, [P, B, C, h, w].
        """
        return free + self.anchor_scale * (anchor - free) - self.negative_scale * (negative - free).mean(0)

    def erase(
        self,
        model: Model,
        prompts: Context,
        target: Target,
        steps: int,
        lr: float,
        generator: torch.Generator,
        out: Path,
    ) -> None:
        """Train the current model to answer each prompt with its target."""
        towards = Along(
            model, prompts, Sampler("ddim", self.ddim_steps, self.start_guidance), generator, self.trajectories
        )

        def loss(step: int) -> Tensor:
            which = torch.randint(len(prompts.ids), (self.batch,), generator=generator)
            context = prompts.select(which)
            with torch.no_grad():
                z, t = towards(context, which)
            with model.teacher():
                aim = target(z, t, context, which)
            return (model.eps(z, t, context) - aim).square().mean()

        how = Optimisation(steps, partial(torch.optim.AdamW, lr=lr))
        fine_tune(model, TRAINED[self.variant], loss, how, out, "stereo")

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)
