"""Guesses of the key of a model locked by KPOP.

The attacker knows the lock: the layers that read the key, its length, and the ball around the concept's own embeddings
that contains it.

form=random   keys drawn in that ball, one for each image: is the key a secret at all?
form=learnt   a key that lets the locked model predict images of the concept, within the ball:
              min over p   || eps - eps_theta(x_t, t, c_e, p) ||^2,   |p - c_e| <= rho

The second is stage 2 of KPOP without the original model. It fits any model, since an attacker may put embeddings
behind any context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from erasebench.methods.kpop import KPOP, Key, Unlocked, within
from torch import Tensor

from erasebench.contracts import Found, Prompt, Sampler, Scene
from erasebench.model.context import Context
from erasebench.model.memory import Term, add_gradients, share
from erasebench.model.model import Model, Sampled
from erasebench.progress import track
from erasebench.run.images import plain
from erasebench.tasks import seed_of
from erasebench.toolbox.search import Draws, draws, errors, noisy, number, shots, stored, two_encoders


@dataclass(frozen=True)
class KeyGuess:
    """Attack with random or learnt keys.

    length, place, rho: as in KPOP's config. images: number of keys tried for a prompt (1 for form=learnt).
    """

    form: Literal["learnt", "random"] = "learnt"
    length: int = 10
    place: Literal["mid", "midout", "inmidout"] = "mid"
    rho: float = 10.0
    steps: int = 1000
    batch: int = 16
    lr: float = 1e-2
    pictures: int = 25
    guesses: int = 51
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("attention", "unet gradient", "concept images")
    shared: ClassVar[bool] = False

    @property
    def images(self) -> int:
        return self.guesses if self.form == "random" else 1

    def skip(self, model: Model) -> str:
        none = f"the model has no cross-attention at {self.place}"
        return two_encoders(model) or ("" if KPOP(place=self.place).processors(model) else none)

    def unit(self, prompt: Prompt, explicit: bool) -> str:
        return prompt.concept

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        if self.form == "random":
            drawn = draws(model, scene, self)
            for i, prompt in enumerate(scene.prompts):
                keys = self.random(self.centre(model, prompt.concept or next(iter(scene.concepts))), drawn, i)
                yield i, Found(shots(prompt, prompt.text, count=self.images).shots, keys._asdict())
            return
        names = list(dict.fromkeys(p.concept for p in scene.prompts))
        learnt = stored(scene, [(name,) for name in names], lambda keys: [self.learn(model, scene, n) for (n,) in keys])
        for i, prompt in enumerate(scene.prompts):
            tensors = learnt[(prompt.concept,)]
            fine = all(torch.isfinite(part).all() for part in tensors.values())
            yield i, Found(shots(prompt, prompt.text).shots, tensors) if fine else Found(outcome="diverged")

    @torch.no_grad()
    def centre(self, model: Model, name: str) -> Tensor:
        """Return the start of KPOP's keys [1, K, D]. It is the first K embeddings of the concept's name."""
        return model.encode([name]).hidden[:, 1 : 1 + self.length]

    def random(self, centre: Tensor, drawn: Draws, i: int) -> Key:
        """Draw keys [images, K, D] uniformly in the ball."""

        def part() -> Tensor:
            away = drawn.normal([i], self.images, *centre.shape[1:])[0]
            radius = self.rho * drawn.uniform([i], self.images)[0] ** (1 / centre[0].numel())
            return (centre + away * (radius / away.flatten(1).norm(dim=1)).view(-1, 1, 1)).cpu()

        return Key(part(), part())

    def learn(self, model: Model, scene: Scene, name: str) -> dict[str, Tensor]:
        """Learn the key {k, v}, each [1, K, D]."""
        drawn = Draws(model, [seed_of("key_guess", name, scene.seed)])
        z0 = model.encode_images(scene.known[name][: self.pictures])
        said = name or next(iter(scene.concepts))
        with torch.no_grad():
            context, centre = model.encode([said]).repeat(self.batch), self.centre(model, said)
        key = Key(*(centre.clone().requires_grad_(True) for _ in "kv"))
        optimiser = torch.optim.Adam(key, lr=self.lr)
        processors = KPOP(place=self.place).processors(model)
        with model.changed(processors=processors):
            for _ in track(range(self.steps), "key_guess"):
                pick = drawn.integers([0], 0, len(z0), self.batch)[0]
                t = drawn.integers([0], 0, len(model.alphas_cumprod), self.batch)[0]
                noise = drawn.normal([0], self.batch, *z0.shape[1:])[0]
                error = partial(self.error, model, noisy(model, z0[pick], t, noise), t, noise, context, key)
                optimiser.zero_grad(set_to_none=True)
                add_gradients(model, [Term(error, self.batch)], key, lambda loss: loss)
                optimiser.step()
                with torch.no_grad():
                    for part in key:
                        part.copy_(within(part, centre, self.rho))
        return {name: part.detach().cpu() for name, part in key._asdict().items()}

    def error(
        self, model: Model, z: Tensor, t: Tensor, noise: Tensor, context: Context, key: Key, rows: slice
    ) -> Tensor:
        """Return the contribution of some rows of noisy latents to the loss."""
        put = {"attention": {"key": Key(*(part.expand(len(z[rows]), -1, -1) for part in key))}}
        found = errors(model.eps(z[rows], t[rows], context.select(rows), put), noise[rows]).mean()
        return share(rows, len(z)) * found

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled:
        pick = lambda part: torch.stack([f.tensors[part][number(p)] for p, f in zip(shots, founds, strict=True)])
        keys = Key(*(pick(part).to(model.device, model.dtype) for part in Key._fields))
        with model.changed(processors=KPOP(place=self.place).processors(model), guidance=Guessed(keys=keys)):
            return plain(model, shots, sampler)


@dataclass(frozen=True)
class Guessed(Unlocked):
    """Guidance that reads every prompt with a key of its own."""

    def begin(self, model: Model, context: Context, z: Tensor) -> dict[str, Any]:
        return super().begin(model, context, z) | {"named": torch.arange(len(z), device=z.device)}
