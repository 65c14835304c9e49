"""Receler (Huang et al., ECCV 2024): small erasers behind the cross-attention, masked to the concept.

    o + E(o),  E(o) = W_up gelu(W_down o),  for every cross-attention's output o
    min over E   || eps_E(x_t, c + P*) - [eps(x_t) - eta (eps(x_t, c) - eps(x_t))] ||^2
                 + lambda mean over layers of  mean of E(o)^2 where M is 0
    P* = argmin over P   || eps_E(x_t, c + P) - eps(x_t, c) ||^2

eps is the base. P: vectors that replace the encoder's outputs from the concept's EOS on. M: the base's attention to the
concept's tokens in x_t, averaged over heads and the layers of one resolution, scaled to [0, 1] and compared with
`threshold`.

variant=released does the same as the released code: P never enters the prompt (it is assigned to a copy), so its fifty
inner steps repeat the same prediction; here they are omitted. Choices where paper and code are silent: P restarts in
every step as noise with the deviation of the encoder's outputs, and several concepts share the erasers.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasebench.contracts import Brief, Sampler
from erasebench.model.context import Context
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.toolbox.attention import Seeing, fitted, layers, projection
from erasebench.toolbox.closed_form import span
from erasebench.toolbox.search import errors
from erasebench.toolbox.training import checked, erased_noise_target
from erasebench.toolbox.trajectory import Along


@dataclass(frozen=True)
class Receler:
    """Adversarially trained erasers behind the cross-attention layers.

    rank: hidden width of an eraser. threshold: of the mask. map_side: side of the mask's attention maps (the nearest in
    the U-Net). outside_scale: lambda. vectors: number of vectors in P; attack_steps of Adam find them. eta,
    trajectories: as in AP.
    """

    variant: Literal["intended", "released"] = "intended"  # released: no adversarial prompts
    steps: int = 500
    batch: int = 1
    lr: float = 3e-4
    eta: float = 1.0
    rank: int = 128
    threshold: float = 0.1  # of a map scaled to [0, 1]; the concept is present at or above it
    map_side: int = 16
    outside_scale: float = 0.1
    vectors: int = 16
    attack_steps: int = 50
    attack_lr: float = 0.1
    attack_decay: float = 0.1
    start_guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int | None = None
    version: ClassVar[int] = 2

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [concept.name for concept in brief.concepts]
        with torch.no_grad():
            concepts, empty = model.encode(names), model.unconditional().repeat(self.batch)
        spans = [span(model, "{c}", name) for name in names]
        erasers = self.untrained(model, seed)
        sampler = Sampler("ddim", self.ddim_steps, self.start_guidance)
        parameters = [p for eraser in erasers.values() for p in eraser.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=self.lr)
        with model.changed(processors=self.processors(model, erasers)):
            towards = Along(model, concepts, sampler, generator, self.trajectories)
            for _ in track(range(self.steps), "receler"):
                which = torch.randint(len(names), (self.batch,), generator=generator)
                c = concepts.select(which)
                with torch.no_grad():
                    z, t = towards(c, which)
                with model.teacher():
                    free = model.eps(z, t, empty)
                    text, mask = self.located(model, z, t, c, [spans[i] for i in which])
                target = erased_noise_target(free, text, self.eta)
                prompt = c if self.variant == "released" else self.attack(model, z, t, c, text, generator)
                written: list[Tensor] = []
                erased = (model.eps(z, t, prompt, {"attention": {"written": written}}) - target).square().mean()
                loss = erased + self.outside_scale * outside(written, mask)
                optimiser.zero_grad(set_to_none=True)
                checked(loss, "receler").backward()
                optimiser.step()
        save_file(packed(erasers), out / "erasers.safetensors")

    def untrained(self, model: Model, seed: int) -> dict[str, nn.Sequential]:
        """Return an eraser for every cross-attention layer that adds nothing yet."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            erasers = {name: eraser(width(model, name), self.rank) for name in layers(model)}
        return {name: made.to(model.device, model.dtype) for name, made in erasers.items()}

    def processors(self, model: Model, erasers: dict[str, nn.Sequential]) -> dict[str, Erasing]:
        present = model.unet.attn_processors
        return {name: Erasing(present[name], made) for name, made in erasers.items()}

    def located(
        self, model: Model, z: Tensor, t: Tensor, context: Context, spans: Iterable[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return the current model's prediction and the concepts' masks.

        spans: the concepts' tokens. Returns (prediction [B, C, h, w], mask bool [B, s, s]).
        """
        seen: dict[str, Tensor] = {}
        with model.changed(processors={name: Seeing(name, seen.__setitem__) for name in layers(model)}):
            eps = model.eps(z, t, context)
        side = lambda maps: round(maps.shape[2] ** 0.5)
        nearest = min({side(maps) for maps in seen.values()}, key=lambda s: abs(s - self.map_side))
        mean = torch.stack([maps.mean(1) for maps in seen.values() if side(maps) == nearest]).mean(0)
        own = torch.stack([m[:, start:stop].mean(1) for m, (start, stop) in zip(mean, spans, strict=True)])
        low, high = own.amin(1, keepdim=True), own.amax(1, keepdim=True)
        mask = (own - low) / (high - low).clamp(min=1e-12) >= self.threshold
        return eps, mask.unflatten(1, (nearest, nearest))

    def attack(
        self, model: Model, z: Tensor, t: Tensor, context: Context, text: Tensor, generator: torch.Generator
    ) -> Context:
        """Return prompts with adversarial vectors.

        With them, the erasers answer most like the base's prediction `text`.
        """
        noise = torch.randn(len(z), self.vectors, model.text_width, generator=generator).to(z)
        vectors = (noise * context.hidden.std()).requires_grad_(True)
        optimiser = torch.optim.Adam([vectors], lr=self.attack_lr, weight_decay=self.attack_decay)
        for _ in range(self.attack_steps):
            loss = errors(model.eps(z, t, behind(context, vectors)), text).sum()
            optimiser.zero_grad()
            vectors.grad = torch.autograd.grad(loss, vectors)[0]
            optimiser.step()
        return behind(context, vectors.detach())

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        tensors, erasers = load_file(artifact / "erasers.safetensors"), {}
        for name in layers(model):
            erasers[name] = eraser(width(model, name), self.rank).to(model.device, model.dtype).requires_grad_(False)
            own = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
            erasers[name].load_state_dict(own)
        return model.changed(processors=self.processors(model, erasers))


@dataclass
class Erasing:
    """Processor of a cross-attention layer with an eraser behind it.

    `written` receives the eraser's output [B, pixels, D].
    """

    before: Any
    eraser: nn.Module

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask=None,
        temb=None,
        written: list[Tensor] | None = None,
    ) -> Tensor:
        out = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        more = self.eraser(out)
        if written is not None:
            written.append(more)
        return out + more


def eraser(size: int, rank: int) -> nn.Sequential:
    """Build an eraser: size -> rank -> size.

    Its last layer starts at zero.
    """
    made = nn.Sequential(nn.Linear(size, rank), nn.GELU(), nn.Linear(rank, size))
    nn.init.zeros_(made[2].weight)
    nn.init.zeros_(made[2].bias)
    return made


def width(model: Model, layer: str) -> int:
    """Return the output width of a cross-attention layer."""
    return model.weight(projection(layer, "v").replace("to_v", "to_out.0")).shape[0]


def outside(written: list[Tensor], mask: Tensor) -> Tensor:
    """Return the mean square of the erasers' outputs outside of the mask.

    written: outputs [B, pixels, D]. mask: bool [B, s, s]. The mean is over the places outside, then over samples and
    layers; it is 0 if a mask covers everything.
    """
    parts = []
    for more in written:
        free = ~fitted(mask, more.shape[1])[..., None]
        parts.append(((more * free).square().mean(2).sum(1) / free.sum((1, 2)).clamp(min=1)).mean())
    return torch.stack(parts).mean()


def behind(context: Context, vectors: Tensor) -> Context:
    """Write vectors [B, k, D] into the encodings, from EOS on.

    Vectors beyond the context's end are dropped.
    """
    place = torch.arange(context.hidden.shape[1], device=vectors.device) - context.ends[:, None]
    inside = (place >= 0) & (place < vectors.shape[1])
    chosen = vectors.gather(1, place.clamp(0, vectors.shape[1] - 1)[..., None].expand_as(context.hidden))
    return context._replace(hidden=torch.where(inside[..., None], chosen, context.hidden))


def packed(erasers: dict[str, nn.Sequential]) -> dict[str, Tensor]:
    return {f"{n}.{k}": x.detach().contiguous().cpu() for n, e in erasers.items() for k, x in e.state_dict().items()}
