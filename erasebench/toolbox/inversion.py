"""Concepts given by images instead of a name: textual inversion on the base.

Gal et al., ICLR 2023:

    min over v    E  m || eps - eps(x_t, t, [v]) ||^2 / E m                        (their Eq. 2; m masks the concept)

The vector becomes a word, contracts.WORD, that tokenizer and text encoder know while the method runs. The evaluation
asks for the concept by its name, as usual.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..contracts import PLACEHOLDER, ErasebenchError
from ..model.model import Model
from ..progress import track
from .search import Draws, fits, noisy, slots, table, tokens, with_placeholder, with_vectors

KINDS = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Pictured:
    """Images that define a concept, and the settings of their inversion.

    path: a folder of images; transparent pixels are masked. start: the word whose last token initializes the vector.
    Raises ErasebenchError for a folder without images.
    """

    path: str
    start: str = "picture"
    steps: int = 3000
    batch: int = 4
    lr: float = 5e-3
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.files():
            raise ErasebenchError(f"pictures.path={self.path}: no folder with {', '.join(sorted(KINDS))} files")

    def files(self) -> list[Path]:
        folder = Path(self.path)
        return sorted(f for f in folder.iterdir() if f.suffix.lower() in KINDS) if folder.is_dir() else []

    def identity(self) -> dict[str, Any]:
        """Return the identity, from the images' content and not their path."""
        shown = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files()]
        return {"pictures": shown, "how": [self.start, self.steps, self.batch, self.lr], "version": self.version}

    def load(self, side: int) -> tuple[Tensor, Tensor]:
        """Load the images and their masks.

        Returns (images uint8 [N, side, side, 3], masks in [0, 1] [N, 1, side, side]).
        """
        made = []
        for file in self.files():
            try:
                made.append(np.array(Image.open(file).convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)))
            except OSError as error:
                raise ErasebenchError(f"{file}: not a readable picture ({error})") from error
        both = torch.from_numpy(np.stack(made))
        masks = both[..., 3:].permute(0, 3, 1, 2) / 255
        if not all(mask.any() for mask in masks):
            raise ErasebenchError(f"pictures.path={self.path}: a picture is wholly transparent")
        return both[..., :3].contiguous(), masks

    def learn(self, model: Model, templates: Sequence[str], seed: int) -> Tensor:
        """Learn the word's embedding [1, D]."""
        side = model.latent_shape()[1]
        pictures, masks = self.load(side * model.pixels_per_latent)
        z0, masks = model.encode_images(pictures), F.interpolate(masks, (side, side), mode="area").to(model.device)
        first = table(model)[tokens(model, self.start)[-1:]]
        how = Inversion(self.steps, self.batch, self.lr, seed)
        vector = textual_inversion(model, z0, templates, first, how, masks)
        if not torch.isfinite(vector).all():
            raise ErasebenchError("the inversion of the pictures diverged: lower pictures.lr")
        return vector


class Inversion(NamedTuple):
    """Settings of textual inversion.

    `steps` counts steps of AdamW, `batch` the images in each of them.
    """

    steps: int
    batch: int
    lr: float
    seed: int


def textual_inversion(
    model: Model,
    latents: Tensor,
    templates: Sequence[str],
    start: Tensor,
    how: Inversion,
    masks: Tensor | None = None,
) -> Tensor:
    """Learn token embeddings [k, D] that represent latents [N, C, h, w].

    They start from `start`, fill the templates' {c}, and use the model as it stands (Gal et al., 2023). `masks` [N,
    1, h, w] weigh the loss. Templates that are too long are skipped. The result is not finite if the inversion
    diverged.
    """
    rows = [with_placeholder(model, t.replace("{c}", PLACEHOLDER), len(start)) for t in templates]
    rows = [row for row in rows if fits(model, row)]
    masks = torch.ones_like(latents[:, :1]) if masks is None else masks
    vectors = torch.nn.Parameter(start.detach().clone())
    optimiser, draws = torch.optim.AdamW([vectors], lr=how.lr, weight_decay=0.01), Draws(model, [how.seed])
    for _ in track(range(how.steps), "inversion"):
        pick, which, t = (
            draws.integers([0], 0, most, how.batch)[0] for most in (len(latents), len(rows), len(model.alphas_cumprod))
        )
        noise = draws.normal([0], how.batch, *latents.shape[1:])[0]
        context = with_vectors(model, slots(model, [rows[i] for i in which]), vectors.repeat(how.batch, 1))
        error = (model.eps(noisy(model, latents[pick], t, noise), t, context) - noise).square()
        loss = (error * masks[pick]).mean() / masks[pick].mean()
        vectors.grad = torch.autograd.grad(loss, vectors)[0]  # no gradient for other weights that may be in training
        optimiser.step()
    return vectors.detach()
