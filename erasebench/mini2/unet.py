"""Stage `unet`: the diffusion model on the pool's latents.

CLIP's frozen text tower encodes the captions.

    z_t = sqrt(a_t) z + sqrt(1 - a_t) e,   L = w(t) |e_theta(z_t, t, text) - e|^2,
    w(t) = min(snr, 5) / snr for snr >= 1 (Hang et al., 2023), snr^-1/2 below

High noise decides whether an image becomes a cat or a dog, but the plain loss is so small there that names are hardly
learnt.

Training starts from the first version's weights wherever shapes match: all but the keys and values of the text.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..mini import files as first_files
from ..mini.train import INDEX
from ..store.local import sha256_file
from .latents import encode_captions, pool, pool_folder
from .loop import Recipe, carry_over, fit
from .nets import WEIGHTS, WIDTH, tokenize

log = logging.getLogger("erasebench")
RECIPE = Recipe(steps=24_000, lr=1e-3, warmup=500, ema=0.998)
BATCH = 64
OFTEN = {"pair": 2.0, "artist": 2.0, "counted": 2.0}  # frequency of a kind, relative to the world's own
DROPPED = 0.1  # share of captions replaced by the empty prompt, for guidance


def build(width: int = WIDTH) -> nn.Module:
    """Build a UNet2DConditionModel of the first version's shape.

    width: of the text encoder.
    """
    from diffusers import UNet2DConditionModel

    shape = UNet2DConditionModel.load_config(first_files.WEIGHTS / "sd" / "unet")
    return UNet2DConditionModel.from_config({**shape, "cross_attention_dim": width})


def load_tower(folder: Path) -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().requires_grad_(False)


def weight(alpha: Tensor) -> Tensor:
    """Return the loss weight w of signal shares a_t [B]."""
    snr = alpha / (1 - alpha)
    return torch.where(snr < 1, snr**-0.5, snr.clamp(max=5) / snr)


def train(
    stage: str = "unet",
    recipe: Recipe = RECIPE,
    batch: int = BATCH,
    folder: Path = WEIGHTS / "sd",
    among=None,
    size=None,
) -> None:
    """Train on the pool and write `unet` into the folder.

    `among(captions, contents)` -> bool [N] selects images.
    """
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    net = build()
    fresh = carry_over(net, load_file(first_files.WEIGHTS / "sd" / "unet" / "diffusion_pytorch_model.safetensors"))
    log.info(
        "%s: %.2f M parameters, %d tensors anew", stage, sum(p.numel() for p in net.parameters()) / 1e6, len(fresh)
    )
    net = net.to(memory_format=torch.channels_last)
    latents, texts, kinds, contents = pool() if size is None else pool(size, size)
    often = torch.tensor([OFTEN.get(kind, 1.0) for kind in kinds])
    if among is not None:
        often *= among(texts, contents)
    log.info("%s: %d of %d pictures", stage, often.count_nonzero(), len(often))
    tower = load_tower(folder)
    stamp = sha256_file(folder / "text_encoder" / "model.safetensors")[:10]
    rows, row_of = encode_captions(tower, texts, pool_folder() / f"text.{stamp}.{len(texts)}.npy")
    with torch.no_grad():
        empty = tower(tokenize([""]))[0]
    config = first_files.WEIGHTS / "sd" / "scheduler"
    alphas = DDIMScheduler.from_pretrained(config).alphas_cumprod

    def loss_of(step: int) -> Tensor:
        random_ = torch.Generator().manual_seed(step)
        which = torch.multinomial(often, batch, generator=random_)
        z = torch.from_numpy(latents[which.numpy()]).float()
        t = torch.randint(1000, (batch,), generator=random_)
        noise = torch.randn(z.shape, generator=random_)
        dropped = torch.rand(batch, generator=random_) < DROPPED
        text = torch.from_numpy(np.stack([rows[row_of[i]] for i in which.tolist()])).float()
        text = torch.where(dropped[:, None, None], empty, text)
        alpha = alphas[t].view(-1, 1, 1, 1)
        guess = net(alpha.sqrt() * z + (1 - alpha).sqrt() * noise, t, text, return_dict=False)[0]
        return (((guess - noise) ** 2).mean((1, 2, 3)) * weight(alphas[t])).mean()

    fit(stage, net, loss_of, recipe)
    copy.deepcopy(net).half().save_pretrained(folder / "unet")
    if folder == WEIGHTS / "sd":
        shutil.copytree(config, folder / "scheduler", dirs_exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps(INDEX, indent=1) + "\n", encoding="utf-8")
