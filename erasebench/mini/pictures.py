"""Export drawings of one thing of the embedded world to a folder.

    python -m erasebench.mini.pictures cat cats

The folder is for `pictures.path=`. All but the thing is transparent, since the mask of each drawing is known; --whole
keeps the rest. The drawings used for comparison with the evaluation's captions are not among them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from .nets import drawings


def pictures(name: str, whole: bool = False) -> list[np.ndarray]:
    """Return every drawing that shows a thing -> uint8 [64, 64, 4]."""
    found = [d for use in ("concept", "mix") for d in drawings(use) if name in d["masks"] and d["masks"][name].any()]
    cover = lambda d: np.full((64, 64), True) if whole else d["masks"][name]
    return [np.dstack([d["pixels"], cover(d).astype(np.uint8) * 255]) for d in found]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasebench.mini.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="an object or a hazard of the embedded world")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--whole", action="store_true", help="nothing transparent")
    given = parser.parse_args(arguments)
    found = pictures(given.name, given.whole)
    if not found:
        print(f"error: the embedded world has no drawing of {given.name!r}", file=sys.stderr)
        return 1
    given.folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(found):
        Image.fromarray(pixels).save(given.folder / f"{i:02}.png")
    print(f"{len(found)} pictures in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
