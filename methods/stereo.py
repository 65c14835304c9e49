"""STEREO (Srivatsan et al., CVPR 2025): search thoroughly enough, then robustly erase once.

search, `rounds` times, theta going on from round to round:
    min over theta   || eps_theta(x_t, p) - [eps(x_t) - eta (eps(x_t, p) - eps(x_t))] ||^2,   p: the concept, then the last v
    min over v       E || noise - eps_theta(x_t, t, v) ||^2   over pictures of the concept, others in every round
erase, theta from the base again, with p any of P = {concept, v_1, v_2, ...} and p_a a prompt to anchor at:
    min over theta   || eps_theta(x_t, p) - [eps(x_t) + s_a (eps(x_t, p_a) - eps(x_t))
                                             - s_n mean over q in P of (eps(x_t, q) - eps(x_t))] ||^2

eps is the base. The numbers are the released code's, as its normalised guidance works out: its one scale of 2 is s_a
= 1 but s_n = 3 (a sign is taken after one is subtracted), and its negative guidance of 2 in the search is eta = 0.
Its anchors hold the concept beside other things (written by a language model); here they are the training templates,
with the concept or its surrogate in them. Departs from the released code: only theta is trained (there a flag that is
meant to freeze the rest does nothing), which are ESD's groups (its own holds the time embedding and the output, and no
norms), prompts are drawn evenly where they are dealt out there, words are learnt from the surrogate's last token on, and
predictions that nothing uses are not made. Several concepts are searched for one by one and erased together.
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

Target = Callable[[Tensor, Tensor, Context, Tensor], Tensor]  # of z, t, prompts and their numbers; asked of the base


@dataclass(frozen=True)
class STEREO:
    """variant x trains the cross-attention, u everything else. search_*: of the erasures in the search. pictures: of each
    concept, shared out among the rounds. inversion_*: of v. steps, batch, lr: of the last erasure, the batch of all.
    anchors: what the templates are filled with. anchor_scale, negative_scale: s_a and s_n. trajectories: as AP's."""

    variant: Literal["x", "u"] = "u"
    rounds: int = 2  # of erasing and inverting, before the erasure that stays
    search_steps: int = 200
    search_lr: float = 5e-6
    search_eta: float = 0.0  # negative guidance in the search; released: 2 in a form that comes to 0
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
            own = which % len(concepts.ids)  # whose prompts they are
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
        """For each round what still brings the concepts back, as prompts of one learnt word each."""

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
        """Latents [pictures, C, h, w] of a concept, drawn by the base in the training templates' words."""
        sampler = Sampler("ddim", self.ddim_steps, self.image_guidance)
        texts = [filled(brief.templates[i % len(brief.templates)], name) for i in range(self.pictures)]
        seeds = [seed_of("stereo picture", name, seed, i) for i in range(self.pictures)]
        return drawn(model, texts, seeds, sampler).z

    def inverted(self, model: Model, brief: Brief, number: int, shown: Tensor, seed: int) -> Tensor:
        """The word [1, D] for one concept's pictures, in the model as it stands."""
        concept = brief.concepts[number]
        start = table(model)[tokens(model, concept.surrogate or concept.name)[-1:]]
        how = Inversion(self.inversion_steps, self.inversion_batch, self.inversion_lr, seed)
        vector = textual_inversion(model, shown, brief.templates, start, how)
        if not torch.isfinite(vector).all():
            raise ErasebenchError(f"the inversion of {concept.name!r} diverged: lower method.inversion_lr")
        return vector

    def composed(self, free: Tensor, anchor: Tensor, negative: Tensor) -> Tensor:
        """The last erasure's target [B, C, h, w] from predictions for nothing, for anchors, and for all of P [P, B, C, h, w]."""
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
        """Train the model as it stands to answer each of the prompts with its target."""
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
