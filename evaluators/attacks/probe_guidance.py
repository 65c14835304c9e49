"""Guidance probe (Lu et al., 2025).

The paper is "When are concepts erased from diffusion models?". A classifier of noisy latents, trained on the original
model's images with and without the concept, steers the erased model's sampler.

    eps - scale sqrt(1 - alpha_t) grad log p(concept | x_t)              (Dhariwal & Nichol, 2021, Algorithm 2)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from erasebench.contracts import AttackCost, Found, Prompt, Sampler, Scene, SearchCost, Shot
from erasebench.model.model import Model, Sampled
from erasebench.run.images import plain
from erasebench.tasks import seed_of
from erasebench.toolbox.search import Draws, Step, noisy, number, steered, stored


@dataclass(frozen=True)
class ProbeGuidance:
    """Guidance by a classifier of noisy latents.

    pictures: maximum number of images with the concept, and of images without it. The classifier is two convolutions,
    a mean and a linear layer.
    """

    scales: tuple[float, ...] = (25.0, 64.0, 128.0, 193.0)
    pictures: int = 64
    steps: int = 300
    batch: int = 32
    lr: float = 1e-3
    width: int = 32
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("sampler", "concept images", "original model")
    shared: ClassVar[bool] = False
    probe: ClassVar[bool] = True

    @property
    def images(self) -> int:
        return len(self.scales)

    def unit(self, prompt: Prompt, explicit: bool) -> str:
        return prompt.concept

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        names = list(dict.fromkeys((p.concept,) for p in scene.prompts))
        trained = stored(scene, names, lambda missing: [self.train(model, scene, name) for (name,) in missing])
        for i, prompt in enumerate(scene.prompts):
            yield i, Found((Shot(prompt.text, prompt.seed),) * self.images, trained[(prompt.concept,)])

    def train(self, model: Model, scene: Scene, name: str) -> dict[str, Tensor]:
        concept = scene.concepts.get(name) or next(iter(scene.concepts.values()))
        draws, channels = Draws(model, [seed_of("probe_guidance", name, scene.seed)]), model.latent_shape()[0]
        shown = scene.known[name][: self.pictures]
        texts = [scene.templates[i % len(scene.templates)].replace("{c}", concept.surrogate) for i in range(len(shown))]
        others = [Prompt("", text, seed_of("other", name, i), "") for i, text in enumerate(texts)]
        with model.teacher():
            without = torch.cat(
                [plain(model, others[i : i + 32], scene.sampler).images for i in range(0, len(others), 32)]
            )
        z = torch.cat([model.encode_images(shown), model.encode_images(without)])
        label = torch.cat([torch.ones(len(shown)), torch.zeros(len(without))]).to(z.device, z.dtype)
        shapes = {"a": (self.width, channels, 3, 3), "b": (self.width, self.width, 3, 3), "line": (1, self.width)}
        weights = {
            k: (draws.normal([0], *s)[0] / torch.tensor(s[1:]).prod() ** 0.5).requires_grad_(True)
            for k, s in shapes.items()
        }
        optimiser = torch.optim.Adam(weights.values(), lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.steps):
                pick = draws.integers([0], 0, len(z), self.batch)[0]
                t = draws.integers([0], 0, len(model.alphas_cumprod), self.batch)[0]
                x = noisy(model, z[pick], t, draws.normal([0], self.batch, *z.shape[1:])[0])
                loss = F.binary_cross_entropy_with_logits(
                    self.logits({k: w[None] for k, w in weights.items()}, x[None])[0], label[pick]
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return {k: w.detach().cpu() for k, w in weights.items()}

    def logits(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return logits [G, B] of latents [G, B, C, h, w]. Each of the G groups has its own weights."""

        def one(w: dict[str, Tensor], z: Tensor) -> Tensor:
            z = F.silu(F.conv2d(z, w["a"], padding=1))
            return (F.silu(F.conv2d(z, w["b"], padding=1)).mean((2, 3)) @ w["line"].T)[:, 0]

        return torch.func.vmap(one)(weights, x)

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled:
        weights = {
            k: torch.stack([f.tensors[k] for f in founds]).to(model.device, model.dtype) for k in ("a", "b", "line")
        }
        scale = torch.tensor([self.scales[number(p)] for p in shots], device=model.device, dtype=model.dtype)

        def step(which: Step, z: Tensor, eps: Tensor) -> Tensor:
            with torch.enable_grad():
                x = z.detach().requires_grad_(True)
                (towards,) = torch.autograd.grad(F.logsigmoid(self.logits(weights, x[:, None])).sum(), x)
            return which.ddim(z, eps - scale.view(-1, 1, 1, 1) * (1 - which.alpha).sqrt() * towards)

        return steered(model, shots, sampler, step)
