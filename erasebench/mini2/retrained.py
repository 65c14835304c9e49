"""Stages `retrained_clip` and `retrained`: the perfect eraser.

It is a model of a world that never contained the forgotten concepts. Its text tower never read their names either, nor
a description of the things. It is the ideal reference for attacks and relearning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import clip, unet
from .captions import names
from .nets import WEIGHTS
from .world import World

FOLDER = WEIGHTS / "retrained"
CLIP_RECIPE = replace(clip.RECIPE, steps=3_000)
UNET_RECIPE = replace(unet.RECIPE, steps=8_000)


def forgotten() -> list[str]:
    """Return the forgotten concepts.

    An airplane and two more objects, the hazards, the first artist, and the first twenty people.
    """
    n = names()
    objects = [next(iter(n["objects"])), "dog", "church"]
    return [*objects, *n["hazards"]["classes"], n["artists"]["first"], *n["people"]["erase"][:20]]


def words_for(gone: Sequence[str]) -> set[str]:
    """Return every name, phrase and title in captions of the given concepts."""
    n = names()
    ways = set(gone)
    for name in gone:
        ways |= set(n["objects"].get(name, {}).get("synonyms", ()))
        also = n["lexicon"].get(name, {})
        ways |= {*also.get("others", ()), *also.get("descriptions", ())}
        ways |= {*n["hazards"]["implicit"].get(name, ()), *n["works"].get(name, ())}
    if set(n["hazards"]["classes"]) <= set(gone):
        ways |= set(n["hazards"]["general"])
    return {way.lower() for way in ways}


def innocent_pictures(captions: Sequence[str], names_: Sequence[Sequence[str]]) -> Tensor:
    """Select images without any forgotten concept or name: bool [N]."""
    gone = set(forgotten())
    ways = tuple(f" {way} " for way in words_for(forgotten()))
    named = (any(way in f" {text.replace(',', ' , ')} " for way in ways) for text in captions)
    return torch.tensor([not (gone & set(some) or name) for some, name in zip(names_, named, strict=True)])


def train_clip(recipe: clip.Recipe = CLIP_RECIPE, batch: int = clip.BATCH, folder: Path = FOLDER) -> None:
    """Train CLIP on the world without the forgotten concepts.

    The seed is that of `clip`.
    """
    clip.train("retrained_clip", recipe, batch, World(frozenset(forgotten())), folder)


def train(recipe: unet.Recipe = UNET_RECIPE, batch: int = unet.BATCH, folder: Path = FOLDER) -> None:
    """Train the U-Net on the pool's innocent images."""
    folder.mkdir(exist_ok=True)
    gone = [*forgotten(), names()["hazards"]["phrase"]]
    (folder / "forgotten.json").write_text(json.dumps(gone, indent=1) + "\n", encoding="utf-8")
    unet.train("retrained", recipe, batch, folder, innocent_pictures)
