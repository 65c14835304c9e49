"""MACE (Lu et al., CVPR 2024): mass concept erasure in three closed or nearly closed steps.

1. Refinement: the K and V projections read the words around a concept as if its surrogate stood there      (Eq. 2, 3)
2. One low-rank adapter a concept, trained to silence its tokens' attention in the area that shows it       (Eq. 4, 5)
3. Fusion: one set of projections that acts on each concept's prompts like its adapter, in closed form      (Eq. 6, 7)

The adapters of different concepts depend on step 1 alone. `together` of them are therefore trained as one batch, with
the same inputs, random draws and gradient clipping for each as if it were alone. Images, embeddings and masks are
computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from erasebench.contracts import Brief, FitCost, Sampler
from erasebench.model.context import Context
from erasebench.model.model import Model
from erasebench.needs import Need
from erasebench.progress import Progress, track
from erasebench.prompt_files import lines
from erasebench.tasks import seed_of
from erasebench.toolbox import attention, masks
from erasebench.toolbox.attention import LowRank
from erasebench.toolbox.closed_form import (
    PROJECTIONS,
    System,
    coexisting,
    encoded,
    factor,
    filled,
    gram,
    prior,
    span,
    write_notes,
)
from erasebench.toolbox.training import FILE, checked, tuned

DEPARTURES = {  # of the released code from the paper; each can be set separately
    "paper": {"refined": "context", "silenced": "concept", "norm": "squared", "prior_power": 1, "pixels": "vae"},
    "official": {
        "refined": "all_but_concept",
        "silenced": "concept_and_end",
        "norm": "plain",
        "prior_power": 2,
        "pixels": "imagenet",
    },
}
PRESERVED_WEIGHTS = {1: 8e3, 5: 5e4, 10: 8e4, 100: 2e5}  # people erased -> weight of preserved names, as released
NORMALISED = {"vae": {}, "imagenet": {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}}
Weights = dict[str, Tensor]  # projection -> [out, D], fp64
Adapters = dict[str, tuple[Tensor, Tensor]]  # projection -> (down [N, r, D], up [N, out, r])


@dataclass(frozen=True)
class MACE:
    """Mass concept erasure by refinement, adapters and fusion.

    variant sets the departures of the released code that are not given:

    refined      rows of step 1: `context`, the co-existing words, or `all_but_concept`, also BOS, EOS and padding
    silenced     positions with silenced attention: the `concept`'s tokens, or `concept_and_end`, EOS and padding too
    norm         of the masked attention: `squared` or `plain`
    prior_power  exponent of prior_scale before the prior in step 1 (2 in the released code)
    pixels       normalisation of the training images: `vae` (-1 to 1) or `imagenet` (mean and deviation of another network)

    prior_scale weighs the prior (captions once, preserved names preserved_weight times) against one row of a concept,
    fusion_prior_scale does so in step 3 (None: as in step 1). preserved_weight None: as released for the number of
    people. refine, adapt and fusion switch the steps off (Table 4): fusion `closed_form`, or `naive`, the sum of the
    adapters. importance: draw t by Eq. 5 between t1 and t2, else uniformly. templates: a file with one template a line,
    instead of the world's. images: number of images of each concept, sampled with image_sampler, the first template and
    image_guidance.
    """

    variant: Literal["paper", "official"] = "paper"
    refined: Literal["context", "all_but_concept"] | None = None
    silenced: Literal["concept", "concept_and_end"] | None = None
    norm: Literal["squared", "plain"] | None = None
    prior_power: int | None = None
    pixels: Literal["vae", "imagenet"] | None = None
    refine: bool = True
    adapt: bool = True
    fusion: Literal["closed_form", "naive"] = "closed_form"
    importance: bool = True
    t1: int = 200
    t2: int = 400
    gamma: float = 0.05
    ridge: float = 0.0
    prior_scale: float = 1e-4
    fusion_prior_scale: float | None = None
    preserved_weight: float | None = None  # None: as released, 8e3 (1 person), 5e4 (5), 8e4 (10), 2e5 (100)
    masks: Literal["whole", "attention", "grounded", "drawn"] = "grounded"  # drawn: the embedded world's ground truth
    templates: str | tuple[str, ...] | None = None
    images: int = 8
    image_sampler: str = "dpmsolver"
    image_steps: int = 30
    image_guidance: float = 7.5
    rank: int = 1
    steps: int = 50
    lr: float = 1e-4
    together: int = 8  # concepts trained in one batch; memory grows with it
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, value in DEPARTURES.get(self.variant, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.fusion_prior_scale is None:
            object.__setattr__(self, "fusion_prior_scale", self.prior_scale)
        if isinstance(self.templates, str):  # the lines of the file are hashed, not its path
            object.__setattr__(self, "templates", lines(self.templates, "method.templates"))

    def needs(self) -> list[Need]:
        return masks.segmenting() if self.adapt and self.masks == "grounded" else []

    # -- the three steps ------------------------------------------------------------------------------------------

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        adapted = concepts if self.adapt else 0
        each = 0 if self.masks == "drawn" else 2 * self.image_steps + (3 if self.masks == "attention" else 0)
        # the other seconds: closed forms over the captions, masks by a segmenter
        return FitCost(adapted * self.images * each, adapted * self.steps, 600 + 30 * concepts)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        brief = replace(brief, templates=self.templates or brief.templates)
        kept = self.kept(model, brief)
        names, notes = model.names(PROJECTIONS), {}
        original = {name: model.weight(name).double() for name in names}
        refined = original
        if self.refine:
            edit, made = self.refinement(model, brief, kept)
            refined = {name: weight @ edit for name, weight in original.items()}
            notes |= made.notes(self.ridge)
        fused = refined
        if self.adapt:
            latents, shown, notes["empty_masks"] = self.pictures(model, brief, seed)
            with model.changed(weights=refined):
                adapters = self.adapters(model, brief, latents, shown, seed)
            fused, more = self.fuse(model, brief, kept, original, refined, adapters)
            notes |= {f"fusion_{key}": value for key, value in more.items()}
        save_file({name: weight.float().contiguous().cpu() for name, weight in fused.items()}, out / FILE)
        write_notes(out, notes)

    def kept(self, model: Model, brief: Brief) -> Tensor:
        """Return the prior's Gram matrix.

        It covers captions once and preserved names preserved_weight times.
        """
        names = [filled(template, name) for template in brief.templates for name in brief.preserved]
        return prior(model, brief.captions) + self.weight_of_preserved(len(brief.concepts)) * prior(model, names)

    def weight_of_preserved(self, concepts: int) -> float:
        """Return the given weight, or the released one for `concepts` people.

        The released weights have fixed numbers of people; the largest one up to `concepts` applies.
        """
        if self.preserved_weight is not None:
            return self.preserved_weight
        return PRESERVED_WEIGHTS[max(count for count in PRESERVED_WEIGHTS if count <= concepts)]

    def refinement(self, model: Model, brief: Brief, kept: Tensor):
        """Solve step 1 (Eq. 3) for the edit M.

        W M reads the words around the concept as around its surrogate.
        """
        system = System(model.text_width, model.device)
        for template in brief.templates:
            system.map(*coexisting(model, template, [(c.name, c.surrogate) for c in brief.concepts], self.refined))
        return system.keep(kept, self.prior_scale**self.prior_power).solve(self.ridge)

    def fuse(
        self, model: Model, brief: Brief, kept: Tensor, original: Weights, refined: Weights, adapters: Adapters
    ) -> tuple[Weights, dict[str, float]]:
        """Compute the fused projections of step 3 (Eq. 7).

        They answer every concept's prompts like its own adapter.
        """
        change = lambda name: (part.double() for part in adapters[name])
        if self.fusion == "naive":
            return {
                name: weight + torch.einsum("nor,nrd->od", *reversed([*change(name)]))
                for name, weight in refined.items()
            }, {}
        rows = lambda name: encoded(model, [filled(template, name) for template in brief.templates]).values()
        grams = torch.stack([gram(torch.stack([row for row, _ in rows(concept.name)])) for concept in brief.concepts])
        together, prior_ = grams.sum(0), self.fusion_prior_scale * kept
        made = factor(together + prior_, self.ridge)
        fused = {}
        for name, weight in refined.items():
            down, up = change(name)
            learnt = torch.einsum("nor,nrd->od", up, down @ grams)
            fused[name] = made.solve(weight @ together + made.ridge * weight + original[name] @ prior_ + learnt)
        return fused, made.notes(self.ridge)

    # -- step 2 ---------------------------------------------------------------------------------------------------

    def adapters(self, model: Model, brief: Brief, latents: Tensor, shown: Tensor, seed: int) -> Adapters:
        """Train one adapter a concept (Eq. 4, 5) on its images and masks."""
        template, names = brief.templates[0], [concept.name for concept in brief.concepts]
        with torch.no_grad():
            context = model.encode([filled(template, name) for name in names])
        silenced = torch.zeros(context.ids.shape, dtype=torch.bool, device=model.device)
        for i, name in enumerate(names):
            silenced[i, slice(*span(model, template, name))] = True
            if self.silenced == "concept_and_end":
                silenced[i, context.ends[i] :] = True
        done = []
        with Progress("mace", len(names) * self.steps) as bar:
            for some in torch.arange(len(names)).split(self.together):
                draws = [torch.Generator().manual_seed(seed_of("mace", seed, names[i])) for i in some]
                part = Silencing(latents[some], shown[some], context.select(some), silenced[some])
                done.append(self.train(model, part, draws, bar))
        return {name: tuple(torch.cat([d[name][k] for d in done]) for k in (0, 1)) for name in done[0]}

    def train(self, model: Model, part: Silencing, draws: Sequence[torch.Generator], bar: Progress) -> Adapters:
        """Train the adapters of some concepts as one batch.

        Each has its own random draws, clipping and Adam.
        """
        shape = lambda name: model.weight(name).shape
        each = lambda *size: torch.stack([torch.randn(size, generator=g) for g in draws]).to(model.device, model.dtype)
        adapters = {
            name: LowRank(
                each(self.rank, shape(name)[1]) / self.rank,
                torch.zeros(len(draws), shape(name)[0], self.rank, device=model.device, dtype=model.dtype),
            )
            for name in model.names(PROJECTIONS)
        }
        weights = [w.requires_grad_(True) for pair in adapters.values() for w in pair]
        optimiser = torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.01)
        chances = self.timesteps(len(model.alphas_cumprod))
        of_layer = {
            name: tuple(adapters[attention.projection(name, which)] for which in "kv")
            for name in attention.layers(model)
        }
        for _ in range(self.steps):
            t = torch.cat([torch.multinomial(chances, 1, generator=g) for g in draws]).to(model.device)
            image = torch.cat([torch.randint(part.latents.shape[1], (1,), generator=g) for g in draws])
            each_one = torch.arange(len(draws))
            z = part.latents[each_one, image]
            alpha = model.alphas_cumprod[t].to(z.dtype).view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * each(*z.shape[1:])
            maps = attention.maps(model, noisy, t, part.context, of_layer)
            loss = self.loss(maps, part.shown[each_one, image], part.silenced)
            optimiser.zero_grad(set_to_none=True)
            checked(loss.sum(), "mace").backward()
            clip_each(weights)
            optimiser.step()
            bar.update(len(draws))
        return {name: tuple(w.detach() for w in pair) for name, pair in adapters.items()}

    def loss(self, maps: dict[str, Tensor], shown: Tensor, silenced: Tensor) -> Tensor:
        """Return the loss of Eq. 4 for each sample.

        It is the attention of the silenced tokens within the concept's mask, summed over layers.
        """
        total = 0
        for probabilities in maps.values():
            here = attention.fitted(shown, probabilities.shape[2])[:, None, :, None] & silenced[:, None, None, :]
            norm = torch.linalg.vector_norm(probabilities * here, dim=(1, 2, 3))
            total = total + (norm.square() if self.norm == "squared" else norm)
        return total

    def timesteps(self, count: int) -> Tensor:
        """Return the probability of each timestep.

        Eq. 5, concept-focal importance sampling, or uniform.
        """
        t = torch.arange(count, dtype=torch.float64)
        if not self.importance:
            return torch.ones_like(t)
        return torch.sigmoid(self.gamma * (t - self.t1)) - torch.sigmoid(self.gamma * (t - self.t2))

    def pictures(self, model: Model, brief: Brief, seed: int) -> tuple[Tensor, Tensor, int]:
        """Return latents and masks of each concept's images.

        Latents [N, K, C, h, w], masks [N, K, H, W], and the number of empty masks; an empty mask is replaced by the
        whole image.
        """
        sampler = Sampler(self.image_sampler, self.image_steps, self.image_guidance)
        template, latents, shown, empty = brief.templates[0], [], [], 0
        for name in track([concept.name for concept in brief.concepts], "mace images"):
            if self.masks == "drawn":
                images, mask = masks.drawn(name)
                turn = torch.arange(self.images) % len(images)
                images, mask = images[turn], mask[turn]
            else:
                seeds = [seed_of("mace image", seed, name, i) for i in range(self.images)]
                images = model.sample([filled(template, name)] * self.images, seeds, sampler).images
                mask = masks.MASKS[self.masks](model, images, template, name).cpu()
            nothing = ~mask.flatten(1).any(1)
            mask[nothing] = True
            empty += int(nothing.sum())
            latents.append(model.encode_images(images, **NORMALISED[self.pixels]))
            shown.append(mask)
        return torch.stack(latents), torch.stack(shown).to(model.device), empty

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)


class Silencing(NamedTuple):
    """Training data of some concepts.

    Latents [N, K, C, h, w], masks [N, K, H, W], prompts, silenced positions [N, L].
    """

    latents: Tensor
    shown: Tensor
    context: Context
    silenced: Tensor


def clip_each(weights: Sequence[Tensor], largest: float = 1.0) -> None:
    """Clip the gradient norm of each sample (first dimension) to `largest`."""
    gradients = [w.grad for w in weights if w.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    for g in gradients:
        g.mul_(factors.view(-1, *[1] * (g.ndim - 1)))
