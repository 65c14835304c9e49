"""KPOP (arXiv 2403.12326): hide a concept behind a learnt prompt, the key.

The owner of the key gets the concept back.

    1. hide     min over theta  || eps_theta(c_e) - [eps(c_t) - eta (eps(c_e) - eps(c_t))] ||^2
                                + lambda || eps_theta(c_e, p) - eps(c_e) ||^2,   p fixed at its start
    2. recover  min over p      || eps_theta(c_e, p) - eps(c_e) ||^2,            |p - c_e| <= rho, theta fixed

eps is the base. The key is a pair (p_k, p_v) of K embeddings, appended to the context before the keys and values of
cross-attention layers. Choices where the paper is silent: the key starts as the first K outputs for the concept's
prompt, each of the pair stays within rho of that start after every step, and the ball is that of all K embeddings
together.

The artifact holds the keys, one for each concept: to publish the weights alone, leave out `keys.safetensors`. A model
is locked unless `unlock` is entered; without a key the processors are the base's own.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasebench.contracts import Brief, FitCost, Sampler
from erasebench.model.context import Context, join
from erasebench.model.guidance import ClassifierFree
from erasebench.model.model import Model
from erasebench.progress import track
from erasebench.toolbox.attention import attend, layers
from erasebench.toolbox.training import FILE, TRAINED, checked, erased_noise_target, tuned
from erasebench.toolbox.trajectory import Along, count_evaluations

PLACES = {
    "mid": ("mid_block",),
    "midout": ("mid_block", "up_blocks"),
    "inmidout": ("down_blocks", "mid_block", "up_blocks"),
}


class Key(NamedTuple):
    """Embeddings [B, K, D] appended to the context of keys and values."""

    k: Tensor
    v: Tensor

    def select(self, which: Tensor) -> Key:
        return Key(self.k[which], self.v[which])


@dataclass(frozen=True)
class KPOP:
    """Fine-tuning that hides a concept, and a key that restores it.

    As in ESD, variant x trains the cross-attention and u everything else. neutral: c_t. length: K. place: of the layers
    that read the key. trajectories: as in AP.
    """

    variant: Literal["x", "u"] = "x"
    steps: int = 1000
    batch: int = 1
    lr: float = 1e-5
    eta: float = 1.0
    recover_scale: float = 0.1  # lambda
    neutral: str = ""
    length: int = 10
    place: Literal["mid", "midout", "inmidout"] = "mid"
    key_steps: int = 1000
    key_lr: float = 1e-2
    rho: float = 10.0
    start_guidance: float = 3.0
    ddim_steps: int = 50
    trajectories: int | None = None
    version: ClassVar[int] = 1

    def fit_cost(self, concepts: int, surrogates: int, loops: float) -> FitCost:
        once, each = count_evaluations(self.ddim_steps, self.trajectories)
        steps = 2 * self.steps + self.key_steps
        return FitCost(once + self.batch * (steps + (self.steps + self.key_steps) * each), self.batch * steps)

    def fit(self, model: Model, brief: Brief, out: Path, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [concept.name for concept in brief.concepts]
        with torch.no_grad():
            concepts, neutral = model.encode(names), model.encode([self.neutral]).repeat(self.batch)
        start = Key(*(concepts.hidden[:, 1 : 1 + self.length].clone() for _ in "kv"))
        sampler = Sampler("ddim", self.ddim_steps, self.start_guidance)
        towards = Along(model, concepts, sampler, generator, self.trajectories)

        def states() -> tuple[Tensor, Tensor, Tensor]:
            which = torch.randint(len(names), (self.batch,), generator=generator)
            return which, *towards(concepts.select(which), which)

        with model.training(model.names(TRAINED[self.variant])) as weights:
            optimiser = torch.optim.Adam(weights.values(), lr=self.lr, foreach=False)
            for _ in track(range(self.steps), "kpop hide"):
                which, z, t = states()
                loss = self.hide(model, z, t, concepts.select(which), neutral, start.select(which))
                optimiser.zero_grad(set_to_none=True)
                checked(loss, "kpop hide").backward()
                optimiser.step()
            hidden = {name: weight.data.clone() for name, weight in weights.items()}
        with model.changed(weights=hidden):
            key = Key(*(part.clone().requires_grad_(True) for part in start))
            optimiser = torch.optim.Adam(key, lr=self.key_lr)
            for _ in track(range(self.key_steps), "kpop recover"):
                which, z, t = states()
                loss = self.recover(model, z, t, concepts.select(which), key.select(which))
                optimiser.zero_grad(set_to_none=True)
                checked(loss, "kpop recover").backward()
                optimiser.step()
                with torch.no_grad():
                    for part, centre in zip(key, start, strict=True):
                        part.copy_(within(part, centre, self.rho))
        save_file({n: w.contiguous().cpu() for n, w in hidden.items()}, out / FILE)
        save_file({n: p.detach().contiguous().cpu() for n, p in key._asdict().items()}, out / "keys.safetensors")
        (out / "concepts.json").write_text(json.dumps(names))

    def hide(self, model: Model, z: Tensor, t: Tensor, concept: Context, neutral: Context, key: Key) -> Tensor:
        """Return the loss of stage 1, with gradient to the weights."""
        with model.teacher():
            aim, text = model.eps(torch.cat([z, z]), torch.cat([t, t]), join(neutral, concept)).chunk(2)
        erased = (model.eps(z, t, concept) - erased_noise_target(aim, text, self.eta)).square().mean()
        back = (self.keyed_eps(model, z, t, concept, key) - text).square().mean()
        return erased + self.recover_scale * back

    def recover(self, model: Model, z: Tensor, t: Tensor, concept: Context, key: Key) -> Tensor:
        """Return the loss of stage 2, with gradient to the key."""
        with model.teacher():
            text = model.eps(z, t, concept)
        return (self.keyed_eps(model, z, t, concept, key) - text).square().mean()

    def keyed_eps(self, model: Model, z: Tensor, t: Tensor, context: Context, key: Key) -> Tensor:
        with model.changed(processors=self.processors(model)):
            return model.eps(z, t, context, {"attention": {"key": key}})

    def skip(self, model: Model) -> str:
        if self.processors(model):
            return ""
        where = " or ".join(PLACES[self.place])
        return f"the U-Net has no cross-attention in its {where}, where the key is read (method.place=inmidout: everywhere)"

    def processors(self, model: Model) -> dict[str, Keyed]:
        """Return processors for the layers that can read a key."""
        present = model.unet.attn_processors
        return {name: Keyed(present[name]) for name in layers(model) if name.startswith(PLACES[self.place])}

    def apply(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        return tuned(model, artifact)

    def unlock(self, model: Model, artifact: Path) -> AbstractContextManager[None]:
        """Restore the hidden concepts in prompts that name them.

        Enter it inside `apply`; leaving it locks the model again.
        """
        names = json.loads((artifact / "concepts.json").read_text())
        keys = Key(**{n: p.to(model.device, model.dtype) for n, p in load_file(artifact / "keys.safetensors").items()})
        words = tuple(torch.tensor(model.tokenizer(name).input_ids[1:-1], device=model.device) for name in names)
        return model.changed(processors=self.processors(model), guidance=Unlocked(keys=keys, words=words))


def within(part: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Project each part [K, D] onto the ball around its centre.

    part: [N, K, D]. Parts inside the ball stay unchanged.
    """
    away = part - centre
    length = away.flatten(1).norm(dim=1).view(-1, 1, 1)
    return torch.where(length > radius, centre + away * radius / length.clamp(min=1e-12), part)


@dataclass
class Keyed:
    """Processor of a cross-attention layer that reads an appended key.

    Without a key it calls the previous processor.
    """

    before: Any

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask=None,
        temb=None,
        key: Key | None = None,
    ) -> Tensor:
        if key is None:
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        behind = lambda more: torch.cat([encoder_hidden_states, more], 1)
        return attend(attn, hidden_states, attn.to_k(behind(key.k)), attn.to_v(behind(key.v)))


@dataclass(frozen=True)
class Unlocked(ClassifierFree):
    """Classifier-free guidance that reads prompts of hidden concepts with their key.

    The empty prompt, and prompts without a hidden concept, are read unchanged.
    """

    keys: Key | None = None
    words: tuple[Tensor, ...] = ()

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        named = torch.full((len(context.ids),), -1, device=z.device)
        for i, words in enumerate(self.words):
            named[(context.ids.unfold(1, len(words), 1) == words).all(2).any(1)] = i
        return super().begin(model, context, z) | {"named": named}

    def __call__(
        self, model: Model, z: Tensor, t: Tensor, context: Context, scale: float | Tensor, state: dict
    ) -> Tensor:
        """Guide the prediction; a scale of 1 reads the key too."""
        free, text = self.predictions(model, z, t, context, state)
        return free + scale * (text - free)

    def predictions(self, model: Model, z: Tensor, t: Tensor, context: Context, state: dict) -> tuple[Tensor, ...]:
        free, text = super().predictions(model, z, t, context, state)
        holders = torch.nonzero(state["named"] >= 0).flatten()
        if len(holders):
            own = t if t.ndim == 0 else t[holders]
            key = {"attention": {"key": self.keys.select(state["named"][holders])}}
            text = text.index_copy(0, holders, model.predict(z[holders], own, context.select(holders), key))
        return free, text
