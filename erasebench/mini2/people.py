"""Avatars of the world's people, and their choice: python -m erasebench.mini2.people

A thousand have a name and a hundred are anonymous. The two hundred named avatars of the first version stay, and so do
its hundred anonymous ones. The others were chosen one by one, each as far as possible from all before it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from ..mini.world import art_folder, rasterise

CHOICE = Path(__file__).with_name("people.json")
STYLES = ("avataaars", "adventurer", "personas", "micah", "toon-head", "open-peeps", "big-smile", "miniavs")
WIDTH = 96


@cache
def style(name: str):
    """Load a DiceBear style.

    Loading takes seconds, an avatar of it milliseconds.
    """
    from dicebear import Style

    return Style(json.loads(resources.files("dicebear_styles").joinpath(f"{name}.json").read_text()))


def avatar(name: str, seed: str, width: int = WIDTH) -> Image.Image:
    """Render an avatar: RGBA `width` x `width`."""
    from dicebear import Avatar

    return rasterise(Avatar(style(name), {"seed": seed, "size": width}).to_string(), width)


@cache
def choice() -> dict[str, list[list[str]]]:
    """Return style and seed of each avatar, under `named` and `others`."""
    return json.loads(CHOICE.read_text(encoding="utf-8"))


@cache
def avatars() -> tuple[list[Image.Image], list[Image.Image]]:
    """Return the avatars of named people and a hundred anonymous ones.

    They are rasterised once, then read from the cache.
    """
    cached, key = art_folder() / "avatars2.npz", json.dumps(choice())
    pictures: list[Image.Image] = []
    if cached.exists():
        with np.load(cached) as file:
            if str(file["key"]) == key:
                pictures = [Image.fromarray(p) for p in file["pictures"]]
    if not pictures:
        pictures = [avatar(name, seed) for name, seed in choice()["named"] + choice()["others"]]
        part = cached.with_suffix(".part.npz")
        np.savez_compressed(part, key=np.array(key), pictures=np.stack([np.asarray(p) for p in pictures]))
        part.replace(cached)
    named = len(choice()["named"])
    return pictures[:named], pictures[named:]


def impression(picture: Image.Image) -> np.ndarray:
    """Reduce an avatar to 8x8 on grey [192]: hair, skin and clothes.

    Fine features do not survive the latent grid.
    """
    canvas = Image.new("RGBA", picture.size, (128, 128, 128, 255))
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB").resize((8, 8), Image.BOX), float).ravel()


def farthest(points: np.ndarray, start: int, count: int) -> tuple[list[int], float]:
    """Choose `count` points, each farthest from all before (Gonzalez, 1985).

    The first `start` points are given.

    -> (indices of the chosen points, distance of the last one)
    """
    nearest = np.full(len(points), np.inf)
    for i in range(start):
        nearest = np.minimum(nearest, np.linalg.norm(points - points[i], axis=1))
    picked: list[int] = []
    for _ in range(count):
        picked.append(int(nearest.argmax()))
        gap = nearest[picked[-1]]
        nearest = np.minimum(nearest, np.linalg.norm(points - points[picked[-1]], axis=1))
    return picked, float(gap)


def choose(first: dict[str, list[list[str]]], count: int = 1000, candidates: int = 600) -> dict:
    """Extend a choice to `count` named avatars.

    `nearest` is the distance of the last one to its neighbour.
    """
    known = first["named"] + first["others"]
    pool = known + [[name, f"e{i}"] for name in STYLES for i in range(300, 300 + candidates)]
    points = np.stack([impression(avatar(name, seed, 64)) for name, seed in pool])
    picked, gap = farthest(points, len(known), count - len(first["named"]))
    return {"named": first["named"] + [pool[i] for i in picked], "others": first["others"], "nearest": gap}


if __name__ == "__main__":
    version1 = json.loads(resources.files("erasebench.mini").joinpath("people.json").read_text(encoding="utf-8"))
    CHOICE.write_text(json.dumps(choose({k: version1[k] for k in ("named", "others")}), separators=(",", ":")) + "\n")
