"""Stage `clip`: a contrastive model of drawings and captions (Radford et al., 2021).

The U-Net uses its text tower.

    L = 1/2 [CE(s F_i F_t^T, 1..B) + CE(s F_t F_i^T, 1..B)],   F normalised features [B, 128], s a learnt scale <= 100

Images are drawn during training and never repeat. The image tower starts from the first version's weights, the text
tower from random ones. For `retrained` both start from random weights, since the first version has seen the forgotten
concepts.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..mini import nets as first_nets
from ..mini.train import worn
from .loop import Recipe, carry_over, fit
from .nets import WEIGHTS, clip_model, text_encoder, text_features, tokenize, tokenizer
from .world import Picture, World, picture

RECIPE = Recipe(steps=4_000, lr=1e-3, decay=0.05, warmup=300)
BATCH = 256


def pixels(pictures: list[Picture]) -> Tensor:
    """Convert drawings to [B, 3, 64, 64] in [-1, 1].

    The memory format is channels last (1.5 times as fast on a CPU).
    """
    stacked = torch.stack([torch.from_numpy(p.pixels) for p in pictures])
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    stage: str = "clip",
    recipe: Recipe = RECIPE,
    batch: int = BATCH,
    drawing: World | None = None,
    folder: Path = WEIGHTS,
) -> None:
    """Train CLIP, then write `clip/clip.safetensors` and `text_encoder`.

    The folder selects the model that they belong to.
    """
    torch.manual_seed(0)
    words, drawing = tokenizer(), drawing or World()
    model = clip_model(len(words)).to(memory_format=torch.channels_last)
    if stage == "clip":
        carry_over(model.visual, first_nets.load_clip()[0].visual.state_dict())
    contrast = ClipLoss()

    def loss_of(step: int) -> Tensor:
        model.train()
        model.logit_scale.data.clamp_(max=math.log(100))
        pictures = [picture(drawing, stage, step * batch + i) for i in range(batch)]
        seen = worn(pixels(pictures), torch.Generator().manual_seed(step))
        images = model.encode_image(seen, normalize=True)
        texts = text_features(model, tokenize([p.caption for p in pictures]))
        return contrast(images, texts, model.logit_scale.exp())

    fit(stage, model, loss_of, recipe)
    ship(model.eval(), folder)


def ship(model: nn.Module, folder: Path) -> None:
    """Write the text tower, and the judges' CLIP, at half precision.

    The text tower is for the diffusion model. `retrained` gets the tower alone: no judge uses its CLIP.
    """
    words, shipped = tokenizer(), folder == WEIGHTS
    tower = text_encoder(model, words.bos_token_id, words.eos_token_id).half()
    tower.save_pretrained(folder / ("sd" if shipped else "") / "text_encoder")
    if shipped:
        half = lambda v: v.half().contiguous() if v.is_floating_point() else v.contiguous()
        (folder / "clip").mkdir(parents=True, exist_ok=True)
        save_file({k: half(v) for k, v in model.state_dict().items()}, folder / "clip" / "clip.safetensors")


def load(folder: Path = WEIGHTS) -> nn.Module:
    """Load the finished CLIP of a folder."""
    model = clip_model(len(tokenizer()))
    state = load_file(folder / "clip" / "clip.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()
