"""Embedded world at run time. Its judges, captions and drawings need none of the packages that draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..store.local import sha256_file
from .files import path_of

LICENCE = "Apache-2.0, made from art under free licences (erasebench/mini/weights/LICENCES.md)"


class Block(nn.Module):
    """Residual block that halves the resolution."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 3, padding=1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Judge(nn.Module):
    """Judge with one trunk and a head for each question.

    Images [B, 3, 64, 64] in [-1, 1] -> dict of logits. The heads of people and artists have one more class: unknown,
    or no image at all. `features` [B, 64], for the Frechet distance, are trained through a second head of objects,
    `by_features`.
    """

    def __init__(
        self, objects: int, people: int, artists: int, hazards: int, widths: Sequence[int] = (32, 64, 128, 192)
    ):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            *(Block(a, b) for a, b in zip(widths, widths[1:], strict=False)),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.features = nn.Linear(4 * widths[-1], 64)
        self.by_features = nn.Linear(64, objects)
        sizes = {"objects": objects, "people": people + 1, "face": 1, "artists": artists + 1, "hazards": hazards}
        self.heads = nn.ModuleDict({name: nn.Linear(4 * widths[-1], size) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        wide = self.trunk(x)
        features = self.features(wide)
        heads = {name: head(wide) for name, head in self.heads.items()}
        return {"features": features, "by_features": self.by_features(features), **heads}


def prepared(images: Tensor) -> Tensor:
    """Convert images to input of the judge. uint8 [B, H, W, 3] -> [B, 3, 64, 64] in [-1, 1]."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if x.shape[-1] == 64 else F.interpolate(x, (64, 64), mode="area")


@cache
def checksums(folder: str) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in sorted(path_of(folder).glob("*.safetensors"))}


@cache
def classes() -> dict[str, list[str]]:
    """Return the names of the judge's classes. The kinds are objects, people, artists, hazards."""
    return json.loads(path_of("judge", "classes.json").read_text(encoding="utf-8"))


@cache
def load_judge() -> Judge:
    from safetensors.torch import load_file

    judge = Judge(*(len(classes()[kind]) for kind in ("objects", "people", "artists", "hazards")))
    judge.load_state_dict(
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in load_file(path_of("judge", "judge.safetensors")).items()
        }
    )
    return judge.eval()


@torch.no_grad()
def judged(images: Tensor) -> dict[str, Tensor]:
    """Return all logits, and `features`, of images uint8 [B, H, W, 3]."""
    return load_judge()(prepared(images))


def identify(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return face and identity probabilities of images.

    -> (probability of a face [B], softmax [B, K + 1] over the people and, last, an unknown person)
    """
    out = judged(images)
    return out["face"].sigmoid()[:, 0], out["people"].softmax(1)


def features(images: Tensor) -> Tensor:
    return judged(images)["features"]


@cache
def caption_features() -> np.ndarray:
    """Return features [N, 64] of the world's own drawings of captions."""
    from safetensors.torch import load_file

    return load_file(path_of("judge", "reference.safetensors"))["caption_features"].double().numpy()


def drawings(use: str | None = None) -> list[dict]:
    """Return the world's drawings with their ground truth.

    The keys are `pixels` uint8 [64, 64, 3], `caption`, `kind`, `objects`, `hazards`, `person`, `face`, `artist`,
    `hand`, `background`, and `masks` (name -> bool [64, 64]). use="caption" selects those drawn like the evaluation's
    captions, "mix" some of every kind, "concept" four of each object, person, artist and hazard.
    """
    import io

    import pandas as pd
    from PIL import Image

    table = pd.read_parquet(path_of("drawings.parquet"))
    records = (table if use is None else table[table["use"] == use]).to_dict("records")
    for record in records:
        record["pixels"] = np.asarray(Image.open(io.BytesIO(record.pop("webp"))).convert("RGB"))
        bits = [np.unpackbits(np.frombuffer(m, np.uint8)).reshape(64, 64).astype(bool) for m in record["masks"]]
        record["masks"] = dict(zip(record.pop("mask_names"), bits, strict=True))
    return records


def clip_model(vocabulary: int):
    """Build an open_clip CLIP for 64x64 images. Captions have at most 32 tokens."""
    from open_clip.model import CLIP

    return CLIP(
        embed_dim=64,
        vision_cfg={"layers": (1, 1, 1, 1), "width": 16, "head_width": 64, "image_size": 64},
        text_cfg={"context_length": 32, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 2},
    )


@cache
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(path_of("sd", "tokenizer"))


def tokenize(texts: Sequence[str]) -> Tensor:
    """Tokenize texts -> ids [B, 32].

    Ids after EOS are 0; EOS is the highest id, and open_clip's text tower pools there.
    """
    words = tokenizer()
    ids = words(list(texts), padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    return ids.input_ids * ids.attention_mask


@cache
def load_clip() -> tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
    """Load CLIP and its preprocessing. -> (model, preprocess: uint8 [B, H, W, 3] -> input, tokenize)"""
    from safetensors.torch import load_file

    model = clip_model(len(tokenizer()))
    model.load_state_dict(
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in load_file(path_of("clip", "clip.safetensors")).items()
        }
    )
    return model.eval(), prepared, tokenize
