"""Sheet of a run: images of the base and of the erased model in one file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..rows import replace_file
from .images import Shard
from .specification import Run

SHEET = 96  # largest side of an image on a sheet, in pixels


def sheet(run: Run, originals: Sequence[Shard], made: Sequence[Shard], path: Path, columns: int = 8) -> None:
    """Write the sheet of a run, unless its task is explicit.

    Each split has a pair of rows, base on top and erased below, with the same prompts and seeds; a run of the base has
    single rows. The file's EXIF description holds the run, its sides, and for each split the prompts and seeds of the
    columns.
    """
    if run.plan.explicit:
        return
    columns = min(columns, max(len(shard.prompts) for shard in made))
    strips, shown, sides = [], {}, ["base"] if run.is_base else ["base", "erased"]
    shrink = lambda picture: np.asarray(Image.fromarray(picture).resize((SHEET, SHEET), Image.LANCZOS))
    for split in dict.fromkeys(shard.prompts[0].split for shard in made):
        first = [next(s for s in side if s.prompts[0].split == split) for side in (originals, made)]
        shown[split] = [(prompt.text, prompt.seed) for prompt in first[0].prompts[:columns]]
        pair = [shard.images()[:columns].numpy() for shard in first]
        for pictures in pair[: len(sides)]:
            if pictures.shape[1] > SHEET:  # a page holds the sheets of many runs
                pictures = np.stack([shrink(picture) for picture in pictures])
            blank = np.full((columns - len(pictures), *pictures.shape[1:]), 255, np.uint8)
            strips.append(np.concatenate(list(np.concatenate([pictures, blank])), axis=1))
        strips.append(np.full((8, strips[-1].shape[1], 3), 255, np.uint8))
    said = Image.Exif()
    what = {"run": path.stem, "sides": sides, "columns": columns, "shows": shown}
    said[ExifTags.Base.ImageDescription] = json.dumps(what)
    Image.fromarray(np.concatenate(strips[:-1])).save(buffer := io.BytesIO(), "WEBP", quality=70, exif=said)
    replace_file(path, buffer.getvalue())
