"""Concept Ablation (Kumari et al., ICCV 2023): prompts of the concept are answered like its anchor's.

    variant=model   min over theta   || eps_theta(x_t, c*) - sg eps_theta(x_t, c) ||^2
    variant=noise   min over theta   || eps_theta(x_t, c*) - eps ||^2
    optional term                    + lambda || eps_theta(x_t, c) - eps ||^2

c: prompts of the anchor, which is the concept's surrogate. c*: the same prompts with the concept in the anchor's place.
x_t: noisy images that the base draws of c. sg stops the gradient: the target is the prediction of the current weights,
not the base's. As in the released code, the keys and values of BOS get no gradient, and images are mirrored at random.
With `augment`, images are also scaled down on a grey ground or scaled up beyond the frame, and the prompt says so. The
norms are means over the area that the image fills.

Departures from the released code:

- Prompts come from training templates or a file, not from a language model; images are encoded to the posterior's mean.
- The mask omits every place of the latent that the image does not fill completely (there, one more row on two sides).
- The learning rate is the given one; there it doubles beside a lambda.
- The erasing norm is a mean over channels too (there their sum, so a lambda of 1 there is 1/4 here, and the gradient's
  norm is clipped at four times as much).
- The words on an image's size are in the anchor's prompt and in the concept's (there in the concept's alone).
- lambda's term uses the same noisy images (there others, not augmented).
- For a style, the templates name the anchor (there nothing).
- The negative prompt is the mean of the concepts' encodings.

Omitted: memorised images, which need a filter for copies, and the parameter group `embedding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasebench.contracts import Brief, Concept, FitCost, Sampler
from erasebench.model.context import Context
from erasebench.model.guidance import ClassifierFree
from erasebench.model.memory import Term, share
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.prompt_files import lines
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import attend, layers
from erasebench.toolbox.closed_form import filled
from erasebench.toolbox.training import Optimisation, decoded, drawn, fine_tune, noised, tuned

GROUPS = {
    "cross-attn": r"^unet\..*attn2\.to_[kv]\.",
    "attn": r"^unet\..*attn[12]\.",
    "full-weight": r"^unet\.",
}
SMALL, LARGE = ("far away", "very small"), ("zoomed in", "close up")  # words for an image scaled down or up


@dataclass(frozen=True)
class CA:
    """Fine-tuning that maps a concept to its anchor.

    trained: the released parameter groups. templates: a file with one prompt a line and {c} in the anchor's place,
    instead of the world's training templates. images: number of images of each anchor, shared by all concepts that have
    it. away: guide these images away from the concepts. prior_scale: lambda. augment: published for objects and people,
    not for styles.
    """

    variant: Literal["model", "noise"] = "model"  # noise: images of the anchor under the concept's name
    trained: Literal["cross-attn", "attn", "full-weight"] = "cross-attn"
    steps: int = 100
    batch: int = 8  # published: four on each of two devices
    lr: float = 1.6e-5  # 2e-6 for each sample of the batch; published: twice that if prior_scale is not 0
    prior_scale: float = 0.0  # lambda; published for a grumpy cat and nudity: 1 on a sum over channels, 0.25 here
    augment: bool = True  # scaled images and words for their size; published without for styles and nudity
    templates: str | tuple[str, ...] | None = None
    images: int = 1000
    away: bool = False  # True: the concepts are the negative prompt of the anchor's images; published for nudity
    image_sampler: str = "dpmsolver"
    image_steps: int = 25
    image_guidance: float = 6.0
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.templates, str):  # the lines of the file are hashed, not its path
            object.__setattr__(self, "templates", lines(self.templates, "method.templates"))

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        samples, has_prior = self.steps * self.batch, self.prior_scale > 0
        pictures = surrogates * self.images * 2 * self.image_steps
        return FitCost(pictures + (samples if self.prior_scale == 0 else 0), samples * (1 + has_prior))

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        templates = self.templates or brief.templates
        pictures = self.pictures(model, brief.concepts, templates, seed)
        clip = lambda weights: torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        adam = partial(torch.optim.AdamW, lr=self.lr, weight_decay=0.01)

        def loss(step: int) -> list[Term]:
            seen = self.seen(model, brief.concepts, templates, pictures, generator)
            of = lambda rows: share(rows, self.batch) * self.loss(model, seen.select(rows))
            return [Term(of, self.batch, graphs=1 + (self.prior_scale > 0))]

        with model.changed(processors=dict.fromkeys(layers(model), start_held)):
            fine_tune(model, GROUPS[self.trained], loss, Optimisation(self.steps, adam, clip), out, "ca")

    def loss(self, model: Model, seen: Seen) -> Tensor:
        with torch.set_grad_enabled(self.prior_scale > 0):
            anchored = model.eps(seen.z, seen.t, seen.anchor)
        target = anchored.detach() if self.variant == "model" else seen.noise
        loss = within(model.eps(seen.z, seen.t, seen.concept) - target, seen.mask)
        if self.prior_scale > 0:
            loss = loss + self.prior_scale * within(anchored - seen.noise, seen.mask)
        return loss

    def seen(
        self,
        model: Model,
        concepts: Sequence[Concept],
        templates: Sequence[str],
        pictures: dict[str, Tensor],
        generator: torch.Generator,
    ) -> Seen:
        """Draw a batch: a concept, an image of its anchor and a view each."""
        views, anchors, named = [], [], []
        for _ in range(self.batch):
            concept = concepts[draw(0, len(concepts), generator)]
            i = draw(0, self.images, generator)
            views.append(self.view(model, pictures[concept.surrogate][i], generator))
            say = lambda name, i=i: " ".join([*views[-1].said, filled(templates[i % len(templates)], name)])
            anchors.append(say(concept.surrogate))
            named.append(say(concept.name))
        z, t, noise = noised(model, model.encode_images(torch.stack([v.picture for v in views])), generator)
        with torch.no_grad():
            anchor, concept = model.encode(anchors), model.encode(named)
        return Seen(z, t, noise, anchor, concept, torch.stack([v.mask for v in views]).to(z))

    def view(self, model: Model, picture: Tensor, generator: torch.Generator) -> View:
        """Return an augmented view of an image uint8 [S, S, 3].

        The image is mirrored with a chance of one half. With `augment` it is scaled down in about two of three cases
        and scaled up otherwise.
        """
        side, cell = len(picture), model.pixels_per_latent
        if draw(0, 2, generator):
            picture = picture.flip(1)
        mask = torch.ones(1, side // cell, side // cell)
        if not self.augment:
            return View(picture, mask, ())
        least = max(side // 3, 2 * cell - 1)  # wherever the image lies, it fills a place of the latent
        if draw(0, 100, generator) < 66:
            size, words = draw(least, side + 1, generator), SMALL
        else:
            size, words = draw(round(1.2 * side), round(1.4 * side), generator), LARGE
        top, left = (draw(0, abs(side - size) + 1, generator) for _ in "yx")
        said = (words[draw(0, 2, generator)],) if size < 0.6 * side or size > side else ()
        scaled = F.interpolate(picture.permute(2, 0, 1)[None].float(), (size, size), mode="bilinear", antialias=True)
        scaled = scaled[0].permute(1, 2, 0).round().to(torch.uint8)
        if size > side:
            return View(scaled[top : top + side, left : left + side], mask, said)
        shown = torch.full_like(picture, 128)
        shown[top : top + size, left : left + size] = scaled
        rows, columns = (slice(-(-first // cell), (first + size) // cell) for first in (top, left))
        mask = torch.zeros_like(mask)
        mask[:, rows, columns] = 1
        return View(shown, mask, said)

    def pictures(
        self, model: Model, concepts: Sequence[Concept], templates: Sequence[str], seed: int
    ) -> dict[str, Tensor]:
        """Draw the anchors' images with the base: anchor -> uint8 [N, S, S, 3].

        Image i uses template i, modulo the number of templates.
        """
        sampler = Sampler(self.image_sampler, self.image_steps, self.image_guidance)
        guidance = nullcontext()
        if self.away:
            with torch.no_grad():
                guidance = model.changed(
                    guidance=ClassifierFree(negative=model.encode([c.name for c in concepts]).mean())
                )
        made = {}
        with guidance:
            for anchor in track(dict.fromkeys(c.surrogate for c in concepts), "ca images"):
                texts = [filled(templates[i % len(templates)], anchor) for i in range(self.images)]
                seeds = [seed_of("ca image", seed, anchor, i) for i in range(self.images)]
                made[anchor] = decoded(model, drawn(model, texts, seeds, sampler))
        return made

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


class View(NamedTuple):
    """View of an image, with its mask and words for its size.

    picture: uint8 [S, S, 3]. mask: places of the latent that the image fills [1, h, w]. said: words for the prompt.
    """

    picture: Tensor
    mask: Tensor
    said: tuple[str, ...]


class Seen(NamedTuple):
    """Batch of noisy latents with their prompts and masks.

    z at t [B], the noise in z, prompts of anchor and concept, masks [B, 1, h, w].
    """

    z: Tensor
    t: Tensor
    noise: Tensor
    anchor: Context
    concept: Context
    mask: Tensor

    def select(self, rows: slice) -> Seen:
        return Seen(*(x.select(rows) if isinstance(x, Context) else x[rows] for x in self))


def within(error: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error within the masks.

    Errors [B, C, h, w], masks [B, 1, h, w]. Each sample has the same weight.
    """
    filled_ = mask.expand_as(error)
    return ((error.square() * filled_).sum((1, 2, 3)) / filled_.sum((1, 2, 3))).mean()


def start_held(attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None, temb=None) -> Tensor:
    """Attention processor that stops the gradient of BOS's key and value.

    It serves cross-attention layers.
    """
    held = lambda x: torch.cat([x[:, :1].detach(), x[:, 1:]], 1)
    key, value = (held(projection(encoder_hidden_states)) for projection in (attn.to_k, attn.to_v))
    return attend(attn, hidden_states, key, value)


def draw(low: int, high: int, generator: torch.Generator) -> int:
    """Return a random integer in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))
