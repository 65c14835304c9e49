"""Inpainting probe (Lu et al., 2025).

The paper is "When are concepts erased from diffusion models?". The erased model completes an image of the concept with
a hole in its middle; the probe tests whether it fills in the concept. The known part is put back, noised, after each
step. `asr_blank` is the detector's verdict on the image with the hole left grey: the rest may already show the
concept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasebench.contracts import AttackCost, Found, Prompt, Sampler, Scene, SearchCost, Shot
from erasebench.model.model import Model, Sampled
from erasebench.toolbox.search import Step, number, shots, steered


@dataclass(frozen=True)
class ProbeInpaint:
    """Inpainting of a hole in the middle of an image. hole: share of the image's side."""

    hole: float = 0.5
    images: int = 3
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("sampler", "concept images")
    shared: ClassVar[bool] = False
    probe: ClassVar[bool] = True

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        latents = model.encode_images(scene.pictures)
        for i, prompt in enumerate(scene.prompts):
            made = (*shots(prompt, prompt.text, count=self.images).shots, Shot(prompt.text, prompt.seed, "blank"))
            yield i, Found(made, {"picture": latents[i].cpu()})

    def inside(self, side: int) -> slice:
        margin = round(side * (1 - self.hole) / 2)
        return slice(margin, side - margin)

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled:
        known = torch.stack([f.tensors["picture"] for f in founds]).to(model.device, model.dtype)
        noise, hole = model.noise([p.seed + 1 for p in shots], sampler.size), self.inside(known.shape[-1])

        def step(which: Step, z: Tensor, eps: Tensor) -> Tensor:
            z = which.ddim(z, eps)
            last = which.before < 0
            around = known if last else which.alpha_before.sqrt() * known + (1 - which.alpha_before).sqrt() * noise
            around = around.clone()
            around[..., hole, hole] = z[..., hole, hole]
            return around

        made = steered(model, shots, sampler, step)
        blank = torch.tensor([number(p) == self.images for p in shots])
        if blank.any():
            pictures = model.decode(known[blank.to(known.device)])
            hole = self.inside(pictures.shape[1])
            pictures[:, hole, hole] = 128
            made.images[blank] = pictures
        return made
