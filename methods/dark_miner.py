"""Dark Miner (arXiv 2409.17682): mine, verify and circumvent embeddings of the concept.

    mine        c = argmin || eps - eps_theta(x_t, t, c) ||^2 over k images of the concept, theta frozen
    verify      s(c) = mean cos(E(x_c) - E(x_r), E(x_e) - E(x_r)) with E CLIP's image encoder, x_r of the anchor c0, x_e
                the k images; s <= tau ends the loop
    circumvent  min over adapters  || eps_theta(x_t, c) - eps(x_t, c0) ||^2
                                   + beta sum over c' in {c0, 0, -c} || eps_theta(x_t, c') - eps(x_t, c') ||^2

theta: adapters of the value projections of every attention module, self and cross. eps is the base, and x_t is a noisy
image that the base draws from c. No code was released. Choices where the paper is silent: |.|^2 sums over a latent (the
clipping norms bind only then), c starts as noise with the deviation of the encoder's outputs and has neither BOS nor
EOS, alpha equals the rank, SGD has no momentum, each of the k images has one x_c and x_r, and all terms use the same
x_t.

The store keeps every finished loop: a killed fit resumes from there, and fits that differ only in their stopping rule
share loops. `loops.json` records s(c) of every loop and the reason for the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from erasebench.evaluators.clip import Clip, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from erasebench.contracts import Brief, ErasebenchError, FitCost, Sampler
from erasebench.model.context import Context
from erasebench.model.finite import NotFinite, is_finite
from erasebench.model.memory import sampled, sampled_images
from erasebench.model.model import Model
from erasebench.model.source import weights_digest
from erasebench.progress import track
from erasebench.provenance import changed_sources, sources, write_sources
from erasebench.run.specification import sampling
from erasebench.store.local import Store, digest
from erasebench.tasks import seed_of
from erasebench.toolbox.attention import Adapted, LowRank, projection
from erasebench.toolbox.closed_form import filled, write_notes
from erasebench.toolbox.training import checked, noised

TERMS = ("anchor", "zero", "negative")
Adapters = dict[str, LowRank]  # attention processor -> adapter of its value projection


@dataclass(frozen=True)
class DarkMiner:
    """Loop of mining and circumventing, with adapters of the value projections.

    max_loops: None continues until s <= tau. length: of a mined embedding. pool: number of images of the concept, drawn
    from `template`; each mining uses k of them. newest: probability r that a step circumvents the newest embedding, not
    an older one. preserved: terms among anchor, zero and negative that are preserved, with weight `preserve_scale`
    (beta). images: None draws an image for every sample; a number draws so many for each embedding and reuses them
    (much cheaper, and a different distribution). clip: E.
    """

    tau: float = 0.2
    max_loops: int | None = None
    anchor: str = "a photo"  # c0
    template: str = "a {c} photo"
    pool: int = 200
    pool_seed: int = 2024
    length: int = 32
    k: int = 3
    mine_steps: int = 1000
    mine_lr: float = 0.1
    mine_lr_late: float = 0.01  # for the second half
    mine_clip: float = 10.0
    newest: float = 0.7
    steps: int = 1000
    batch: int = 1
    lr: float = 0.01
    lr_late: float = 0.001  # for the last fifth
    clip_norm: float = 100.0
    rank: int = 8
    preserved: tuple[str, ...] = TERMS
    preserve_scale: float = 0.5
    images: int | None = None
    guidance: float = 7.5
    ddim_steps: int = 50
    clip: Clip = Clip(architecture="ViT-L-14-quickgelu")
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "preserved", tuple(self.preserved))
        if unknown := set(self.preserved) - set(TERMS):
            raise ErasebenchError(f"method.preserved={sorted(unknown)[0]}: choose from {', '.join(TERMS)}")

    def skip(self, model: Model) -> str:
        return "a mined embedding has no pooled output, which it asks for" if model.text_encoder_2 is not None else ""

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        times, samples = self.max_loops or loops, self.steps * self.batch
        pictures = self.pool + times * (2 * self.k + (self.images or samples))
        others = len(set(self.preserved) - {"anchor"})
        return FitCost(
            2 * self.ddim_steps * pictures + times * samples * (1 + others),
            times * (self.mine_steps * self.k + samples * (1 + len(self.preserved))),
        )

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        names = [concept.name for concept in brief.concepts]
        shared = {
            "method": digest(replace(self, tau=0.0, max_loops=None)),
            "version": self.version,
            "clip": self.clip.weights(),
            "concepts": names,
            "seed": seed,
            "base": weights_digest(model.unet, model.text_encoder, model.vae),
            **sampling(),
        }
        outdated = set()

        def kept(stage: str, number: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            """Return the result of a loop's stage, computed once and stored."""

            def fill(folder: Path) -> None:
                made_by = sources(self)
                save_file(make(), folder / "made.safetensors")
                write_sources(folder, made_by)

            entry = Store().get_or_make(stage, {**shared, "loop": number}, fill)
            outdated.update(changed_sources(entry, sources(self)))
            return load_file(entry / "made.safetensors")

        pictures, found = self.pictures(model, names), []
        adapters, ended = self.untrained(model, seed), f"max_loops={self.max_loops} were done"
        while self.max_loops is None or len(found) < self.max_loops:
            number = len(found)
            found.append(kept("mined", number, partial(self.mined, model, adapters, pictures, seed, number)))
            if found[-1]["score"] <= self.tau:
                ended = f"s(c) <= {self.tau:g}"
                break
            done = kept("circumvented", number, lambda now=adapters: packed(self.circumvent(model, now, found, seed)))
            adapters = unpacked(done, model)
        save_file(packed(adapters), out / "adapters.safetensors")
        scores = [round(float(one["score"]), 4) for one in found]
        (out / "loops.json").write_text(json.dumps({"scores": scores, "ended": ended}))
        notes = {"source_changed": True} if outdated else {}  # since the reused loops were computed
        write_notes(out, {"loops": len(scores), "scores": scores, "ended": ended, **notes})

    @property
    def sampler(self) -> Sampler:
        return Sampler("ddim", self.ddim_steps, self.guidance)

    def pictures(self, model: Model, names: list[str]) -> Tensor:
        """Draw the base's images of the concepts: uint8 [pool, H, W, 3]."""
        texts = [filled(self.template, names[i % len(names)]) for i in range(self.pool)]
        seeds = [seed_of("dark_miner pool", self.pool_seed, i) for i in range(self.pool)]
        parts = [slice(i, i + 50) for i in range(0, self.pool, 50)]
        return torch.cat([sampled_images(model, texts[part], seeds[part], self.sampler) for part in parts])

    def untrained(self, model: Model, seed: int) -> Adapters:
        """Return an adapter for every attention module that changes nothing yet."""
        generator, made = torch.Generator().manual_seed(seed), {}
        for name in model.unet.attn_processors:
            height, width = model.weight(projection(name, "v")).shape
            down = torch.randn(1, self.rank, width, generator=generator) / self.rank
            made[name] = LowRank(*(x.to(model.device, model.dtype) for x in (down, torch.zeros(1, height, self.rank))))
        return made

    def mined(self, model: Model, adapters: Adapters, pictures: Tensor, seed: int, number: int) -> dict[str, Tensor]:
        """Mine one embedding [1, length, D] and compute its s(c).

        If `images` is set, the base's latents of the embedding are returned too, for reuse.
        """
        generator = torch.Generator().manual_seed(seed_of("dark_miner mine", seed, number))
        shown = pictures[torch.randperm(len(pictures), generator=generator)[: self.k]]
        with model.changed(processors=processors(adapters)):
            c = self.mine(model, model.encode_images(shown), generator)
            made = {"embedding": c, "score": self.verify(model, c, shown, generator)}
        if not is_finite(made["score"]):
            raise NotFinite("dark_miner: what was mined leads nowhere, its s(c) is not finite")
        if self.images is not None:
            made["latents"] = self.drawn(model, as_context(c).repeat(self.images), generator)
        return made

    def mine(self, model: Model, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Fit an embedding [1, length, D] that explains the latents best.

        The current model predicts the noise.
        """
        with torch.no_grad():
            spread = model.encode([self.anchor]).hidden.std()
        c = torch.randn(1, self.length, model.text_width, generator=generator).to(latents) * spread
        c.requires_grad_(True)
        optimiser = torch.optim.SGD([c], lr=self.mine_lr)
        for step in track(range(self.mine_steps), "mine"):
            optimiser.param_groups[0]["lr"] = self.mine_lr if step < self.mine_steps // 2 else self.mine_lr_late
            z, t, noise = noised(model, latents, generator)
            loss = squared(noise, model.eps(z, t, as_context(c).repeat(len(z))))
            descend(optimiser, loss, self.mine_clip)
        return c.detach()

    def verify(self, model: Model, c: Tensor, shown: Tensor, generator: torch.Generator) -> Tensor:
        """Return s(c), a scalar.

        It measures how far c leads the current model from the anchor towards the concept's images.
        """
        with torch.no_grad():
            anchor = model.encode([self.anchor])
        draw = lambda context: model.decode(self.drawn(model, context.repeat(len(shown)), generator, base=False))
        return verification(*(embedded(self.clip, i) for i in (draw(as_context(c)), draw(anchor), shown)))

    def circumvent(self, model: Model, adapters: Adapters, found: list[dict[str, Tensor]], seed: int) -> Adapters:
        """Train the adapters to answer the found embeddings like the anchor.

        The predictions of the `preserved` terms stay close to the base's.
        """
        generator = torch.Generator().manual_seed(seed_of("dark_miner circumvent", seed, len(found)))
        embeddings = torch.cat([one["embedding"] for one in found]).to(model.device)
        older = torch.randint(max(len(found) - 1, 1), (self.steps, self.batch), generator=generator)
        newest = torch.rand(older.shape, generator=generator) < self.newest
        which = torch.where(newest, len(found) - 1, older)
        latents = self.latents(model, found, which, generator)
        anchor = model.encode([self.anchor]).repeat(self.batch)
        adapters = {
            name: LowRank(*(x.clone().requires_grad_(True) for x in adapter)) for name, adapter in adapters.items()
        }
        optimiser = torch.optim.SGD([x for adapter in adapters.values() for x in adapter], lr=self.lr)
        with model.changed(processors=processors(adapters)):
            for step in track(range(self.steps), "circumvent"):
                optimiser.param_groups[0]["lr"] = self.lr if step < 0.8 * self.steps else self.lr_late
                z, t, _ = noised(model, latents[step], generator)
                descend(optimiser, self.loss(model, z, t, embeddings[which[step]], anchor), self.clip_norm)
        return {name: LowRank(*(x.detach() for x in adapter)) for name, adapter in adapters.items()}

    def loss(self, model: Model, z: Tensor, t: Tensor, c: Tensor, anchor: Context) -> Tensor:
        """Return the circumventing loss of embeddings c [B, length, D].

        z: latents [B, C, h, w].
        """
        known = {"anchor": anchor, "zero": as_context(0 * c), "negative": as_context(-c)}
        with model.teacher():
            aim = model.eps(z, t, anchor)
            before = {name: aim if name == "anchor" else model.eps(z, t, known[name]) for name in self.preserved}
        kept = sum(squared(model.eps(z, t, known[name]), before[name]) for name in self.preserved)
        return squared(model.eps(z, t, as_context(c)), aim) + self.preserve_scale * kept

    def latents(
        self, model: Model, found: list[dict[str, Tensor]], which: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the base's clean latents for the chosen embeddings.

        which: numbers of the embeddings [steps, batch]. Returns [steps, batch, C, h, w].
        """
        if self.images is not None:
            kept = torch.stack([one["latents"] for one in found]).to(model.device)
            return kept[which, torch.randint(self.images, which.shape, generator=generator)]
        embeddings = torch.cat([one["embedding"] for one in found]).to(model.device)
        parts = which.flatten().split(64)
        made = torch.cat([self.drawn(model, as_context(embeddings[part]), generator) for part in parts])
        return made.unflatten(0, which.shape)

    def drawn(self, model: Model, context: Context, generator: torch.Generator, base: bool = True) -> Tensor:
        """Sample latents with the base or with the current model."""
        seeds = torch.randint(2**31, (len(context.ids),), generator=generator).tolist()
        if not base:
            return sampled(model, context, seeds, self.sampler)
        with model.teacher():
            return sampled(model, context, seeds, self.sampler)

    def low_rank(self, model: Model, artifact: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the low-rank updates of the weights.

        weight -> (up [out, rank], down [rank, in]); their product is added to the weight.
        """
        adapters = unpacked(load_file(artifact / "adapters.safetensors"), model)
        return {projection(name, "v"): (x.up[0], x.down[0]) for name, x in adapters.items()}

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        added = self.low_rank(model, artifact)
        return model.changed(weights={name: model.weight(name) + up @ down for name, (up, down) in added.items()})


def as_context(hidden: Tensor) -> Context:
    """Wrap embeddings [B, length, D] as an encoded prompt."""
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return Context(hidden, ids, ids[:, 0] + hidden.shape[1] - 1)


def squared(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return |.|^2, summed over a latent and averaged over the batch."""
    return (ours - theirs).square().flatten(1).sum(1).mean()


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, largest: float) -> None:
    """Take one optimiser step, with the common gradient norm clipped to `largest`."""
    weights = optimiser.param_groups[0]["params"]
    optimiser.zero_grad(set_to_none=True)
    checked(loss, "dark_miner").backward(inputs=weights)
    torch.nn.utils.clip_grad_norm_(weights, largest)
    optimiser.step()


def verification(mined: Tensor, reference: Tensor, known: Tensor) -> Tensor:
    """Return s(c) of features [k, F].

    Mean cosine between two directions from the reference: to the images of c, and to the concept's images.
    """
    return F.cosine_similarity(mined - reference, known - reference, dim=1).mean()


@torch.no_grad()
def embedded(clip: Clip, images: Tensor) -> Tensor:
    """Return CLIP's features [N, F] of images uint8 [N, H, W, 3]."""
    encoder, preprocess, _ = load(clip.architecture, clip.pretrained)
    return encoder.encode_image(preprocess(images)).float().cpu()


def processors(adapters: Adapters) -> dict[str, Adapted]:
    return {name: Adapted(adapter) for name, adapter in adapters.items()}


def packed(adapters: Adapters) -> dict[str, Tensor]:
    return {f"{name}.{part}": x.contiguous().cpu() for name, a in adapters.items() for part, x in a._asdict().items()}


def unpacked(tensors: dict[str, Tensor], model: Model) -> Adapters:
    names = sorted({name.rpartition(".")[0] for name in tensors})
    place = lambda x: x.to(model.device, model.dtype)
    return {name: LowRank(place(tensors[f"{name}.down"]), place(tensors[f"{name}.up"])) for name in names}
