"""Forget-Me-Not (Zhang et al., CVPR workshops 2024): minimise attention to the concept.

    min over theta   || A_S ||,   A_S: all cross-attention maps of x_t at the positions S of the prompt, side by side

x_t: noisy images of the concept, at any t. S: the concept's own tokens and, with silenced=concept_and_end, EOS (and
padding, if it is EOS, as in Stable Diffusion 1). The loss is one norm of all maps together, not squared; it has no
other term. With inversion_steps, `inversion_tokens` embeddings replace the concept's name; textual inversion first
learns them from the images.

Departures from the released code: the base draws the images, which there are the user's (from training templates, which
also replace its one prompt in training), and one run forgets several concepts. Its gradient clipping, which finds no
weights to clip, is omitted. Choice where it is silent: the inversion starts from the name's own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasebench.contracts import PLACEHOLDER, Brief, FitCost, Sampler
from erasebench.model.context import Context, join
from erasebench.model.model import Model
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import maps
from erasebench.toolbox.closed_form import filled, span
from erasebench.toolbox.inversion import Inversion, textual_inversion
from erasebench.toolbox.search import fits, slots, table, tokens, two_encoders, with_placeholder, with_vectors
from erasebench.toolbox.training import TRAINED, Optimisation, drawn, fine_tune, noised, tuned

GROUPS = {"full": r"^unet\.", "x": TRAINED["x"]}


@dataclass(frozen=True)
class FMN:
    """Fine-tuning that silences the attention to a concept.

    trained: the whole U-Net, or x, its cross-attention. images: number of images of each concept. inversion_*: of
    textual inversion; 0 steps keep the concept's name.
    """

    trained: Literal["full", "x"] = "full"
    silenced: Literal["concept", "concept_and_end"] = "concept_and_end"  # EOS too, as released; or the concept alone
    steps: int = 35
    batch: int = 1
    lr: float = 2e-6
    images: int = 8
    guidance: float = 7.5
    ddim_steps: int = 50
    inversion_steps: int = 0  # released, where it is used: 500
    inversion_tokens: int = 4
    inversion_batch: int = 1
    inversion_lr: float = 1e-3
    version: ClassVar[int] = 1

    def skip(self, model: Model) -> str:
        return two_encoders(model) if self.inversion_steps else ""

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        inversion = concepts * self.inversion_steps * self.inversion_batch
        return FitCost(concepts * self.images * 2 * self.ddim_steps, self.steps * self.batch + inversion)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shown = [self.shown(model, c.name, brief.templates, seed) for c in brief.concepts]
        adam = partial(torch.optim.AdamW, lr=self.lr, weight_decay=0.01)

        def loss(step: int) -> Tensor:
            concepts, pictures = (
                torch.randint(high, (self.batch,), generator=generator).tolist() for high in (len(shown), self.images)
            )
            z, contexts, silenced = zip(
                *(shown[c].one(i) for c, i in zip(concepts, pictures, strict=True)), strict=True
            )
            x, t, _ = noised(model, torch.cat(z), generator)
            return attention(maps(model, x, t, join(*contexts)), torch.cat(silenced))

        fine_tune(model, GROUPS[self.trained], loss, Optimisation(self.steps, adam), out, "fmn")

    def shown(self, model: Model, name: str, templates: Sequence[str], seed: int) -> Shown:
        """Draw a concept's images with the base, and encode their prompts."""
        sampler = Sampler("ddim", self.ddim_steps, self.guidance)
        seeds = [seed_of("fmn image", seed, name, i) for i in range(self.images)]
        with torch.no_grad():
            contexts = model.encode([filled(template, name) for template in templates])
        which = torch.arange(self.images) % len(templates)
        latents = drawn(model, [filled(templates[i], name) for i in which], seeds, sampler).z
        own = torch.zeros(contexts.ids.shape, dtype=torch.bool, device=model.device)
        if self.inversion_steps:
            contexts, own, which = self.inverted(model, name, templates, latents, seed)
        else:
            for row, template in zip(own, templates, strict=True):
                row[slice(*span(model, template, name))] = True
        if self.silenced == "concept_and_end":
            own = own | (contexts.ids == model.tokenizer.eos_token_id)
        return Shown(latents, contexts, own, which)

    def inverted(
        self, model: Model, name: str, templates: Sequence[str], latents: Tensor, seed: int
    ) -> tuple[Context, Tensor, Tensor]:
        """Learn embeddings in place of the name by textual inversion.

        Returns (prompts with the embeddings, their positions, number of each image's prompt).
        """
        rows = [with_placeholder(model, filled(t, PLACEHOLDER), self.inversion_tokens) for t in templates]
        rows = [row for row in rows if fits(model, row)]
        named = tokens(model, name)
        start = table(model)[[named[i % len(named)] for i in range(self.inversion_tokens)]]
        own_seed = seed_of("fmn inversion", seed, name)
        how = Inversion(self.inversion_steps, self.inversion_batch, self.inversion_lr, own_seed)
        learnt = textual_inversion(model, latents, templates, start, how)
        prompts = slots(model, rows)
        with torch.no_grad():
            contexts = with_vectors(model, prompts, learnt.repeat(len(rows), 1))
        return contexts, prompts.free, torch.arange(self.images) % len(rows)

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


class Shown(NamedTuple):
    """Images of a concept, with their prompts and silenced positions.

    latents [N, C, h, w], prompts [P, L], silenced positions of the prompts [P, L], number of each image's prompt [N].
    """

    latents: Tensor
    contexts: Context
    silenced: Tensor
    which: Tensor

    def one(self, i: int) -> tuple[Tensor, Context, Tensor]:
        """Return an image, its prompt and its silenced positions.

        Each has a batch dimension of one.
        """
        prompt = slice(int(self.which[i]), int(self.which[i]) + 1)
        return self.latents[i : i + 1], self.contexts.select(prompt), self.silenced[prompt]


def attention(seen: Mapping[str, Tensor], silenced: Tensor) -> Tensor:
    """Return the norm of all maps at the silenced positions.

    seen: maps [B, heads, pixels, L]. silenced: [B, L]. One norm covers all maps; the result is the mean over samples.
    """
    parts = [(probabilities * silenced[:, None, None]).flatten(1) for probabilities in seen.values()]
    return torch.linalg.vector_norm(torch.cat(parts, 1), dim=1).mean()
