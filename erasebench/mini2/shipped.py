"""Stages `drawings` and `yolo`: shipped drawings, captions and second judge.

The second judge recognises objects.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..mini.train import broken, worn
from .captions import concepts, names
from .clip import pixels
from .loop import Recipe, fit
from .nets import WEIGHTS
from .world import Picture, World, picture

YOLO = Recipe(steps=3_000, lr=2e-3, decay=0.02)
MASK = "masks"


def caption_picture(world: World, part: str, number: int) -> Picture:
    """Draw an image of the kind that evaluation captions describe.

    Three in four show two objects, the others an anonymous person.
    """
    return picture(world, part, number, "pair" if number % 4 else "nobody")


def single_concepts() -> list[tuple[str, str]]:
    """Return (kind, name) of every drawing of one concept.

    There are four of each, but only one of a person outside of the erased, kept and tuning lists.
    """
    n, every = names(), concepts()
    told = {*n["people"]["erase"], *n["people"]["keep"], *n["people"]["tuning"]}
    four = [("thing", name) for name in every["objects"]] + [
        ("person", name) for name in every["people"] if name in told
    ]
    four += [("artist", name) for name in every["artists"]] + [("hazard", name) for name in every["hazards"]]
    return four * 4 + [("person", name) for name in every["people"] if name not in told]


def to_webp(pixels_) -> bytes:
    Image.fromarray(pixels_).save(buffer := io.BytesIO(), "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def table(pictures: Iterable[tuple[str, Picture]]) -> pd.DataFrame:
    """Return one row an image.

    It has the use, the pixels as lossless WebP, the truth, and the masks as bits.
    """
    import numpy as np

    fields = ("kind", "caption", "objects", "hazards", "person", "face", "artist", "work", "hand", "inks", "background")
    fields += ("colour", "count")
    rows = []
    for use, p in pictures:
        truth = {name: getattr(p, name) for name in fields}
        places = {"place_names": list(p.places), "places": list(p.places.values())}
        masks = {"mask_names": list(p.masks), MASK: [np.packbits(m).tobytes() for m in p.masks.values()]}
        rows.append({"webp": to_webp(p.pixels), "use": use, **truth, **places, **masks})
    return pd.DataFrame(rows)


def drawings(captions: int = 1000, others: int = 1000) -> None:
    """Write drawings.parquet and captions.json.

    The drawings are of captions, of the world's mixture and of single concepts.
    """
    drawing, single = World(), single_concepts()
    made = [("caption", caption_picture(drawing, "shipped", i)) for i in range(captions)]
    made += [("mix", picture(drawing, "shipped mix", i)) for i in range(others)]
    made += [("concept", picture(drawing, "shipped concept", i, *concept)) for i, concept in enumerate(single)]
    table(made).to_parquet(WEIGHTS / "drawings.parquet", compression="brotli", compression_level=11)
    count = names()["captions"]["count"]
    evaluation = [caption_picture(drawing, "captions", i).caption for i in range(count)]
    training = [picture(drawing, "training captions", i).caption for i in range(2000)]
    lists = {"evaluation": evaluation, "training": [c for c in dict.fromkeys(training) if c not in set(evaluation)]}
    (WEIGHTS / "captions.json").write_text(json.dumps(lists, indent=0), encoding="utf-8")


def yolo(recipe: Recipe = YOLO, batch: int = 128, folder: Path = WEIGHTS / "yolo") -> None:
    """Train YOLOv8n-cls on fresh drawings of one object.

    Other contents and broken images have the class `nothing`.
    """
    from ..evaluators.yolo import build, logits, save

    torch.manual_seed(0)
    classes, drawing = [*concepts()["objects"], "nothing"], World()
    model, spoilt, kinds = build(len(classes)), batch // 16, (None, "thing", "coloured", "thing")

    def loss_of(step: int) -> Tensor:
        model.train()
        generator = torch.Generator().manual_seed(step)
        pictures = [picture(drawing, "yolo", step * batch + i, kinds[i % 4]) for i in range(batch)]
        pictures = [p for p in pictures if len(p.objects) < 2]
        label = torch.tensor([classes.index(p.objects[0]) if p.objects else len(classes) - 1 for p in pictures])
        label[:spoilt] = len(classes) - 1
        x = pixels(pictures)
        x = torch.cat([broken(x[:spoilt], generator), worn(x[spoilt:], generator)])
        return F.cross_entropy(logits(model, x / 2 + 0.5), label)

    fit("yolo", model, loss_of, recipe)
    save(model.eval(), classes, 64, folder)
