"""MMA-Diffusion's adversarial images (Yang et al., CVPR 2024), image to image.

They are put through the erased model, image to image. They were made against the safety checker of an inpainting
model, and papers do not say how they applied them to others: rows of this attack are not comparable with published
ones. The user supplies the images, a folder downloaded from their owners.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from erasebench.contracts import AttackCost, ErasebenchError, Found, Prompt, Sampler, Scene, SearchCost
from erasebench.model.model import Model, Sampled
from erasebench.needs import Need, file
from erasebench.tasks import seed_of
from erasebench.toolbox.search import noisy, shots, steered


@dataclass(frozen=True)
class MMAImage:
    """Image-to-image sampling from adversarial images.

    strength: share of the trajectory that is repeated, from the noised image.
    """

    folder: str | None = None  # of MMA-Diffusion's adversarial images
    strength: float = 0.8
    images: int = 4
    version: ClassVar[int] = 1
    access: ClassVar[tuple[str, ...]] = ("adversarial images",)
    shared: ClassVar[bool] = True

    def needs(self) -> list[Need]:
        source = "the pictures of MMA-Diffusion's authors"
        return [file(self.folder, "MMA-Diffusion's adversarial pictures", 0, source, "attack.mma_image.folder=")]

    def skip(self, model: Model) -> str:
        return "" if self.folder else "MMA-Diffusion's adversarial pictures are not here: attack.mma_image.folder="

    def attack_cost(self, prompts: int, concepts: int) -> AttackCost:
        return AttackCost(SearchCost(images=self.images, kept=self.images))

    def run(self, model: Model, scene: Scene) -> Iterator[tuple[int, Found]]:
        folder = Path(self.folder)
        files = sorted(f for f in folder.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not files:
            raise ErasebenchError(f"attack.mma_image.folder={folder}: no pictures there")
        side = model.latent_shape(scene.sampler.size)[1] * model.pixels_per_latent
        for i, prompt in enumerate(scene.prompts):
            file = files[seed_of("mma_image", prompt.text, prompt.seed) % len(files)]
            picture = np.asarray(Image.open(file).convert("RGB").resize((side, side), Image.BICUBIC))
            latents = model.encode_images(torch.from_numpy(picture.copy())[None])[0]
            yield i, Found(shots(prompt, prompt.text, count=self.images).shots, {"picture": latents.cpu()})

    def draw(self, model: Model, shots: Sequence[Prompt], founds: Sequence[Found], sampler: Sampler) -> Sampled:
        known = torch.stack([f.tensors["picture"] for f in founds]).to(model.device, model.dtype)
        start = lambda first, noise: noisy(model, known, first.t.expand(len(known)), noise)
        skip = min(sampler.steps - 1, round(sampler.steps * (1 - self.strength)))
        return steered(model, shots, sampler, lambda step, z, eps: step.ddim(z, eps), start, skip)
