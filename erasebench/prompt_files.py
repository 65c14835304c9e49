"""Prompts that are not shipped: I2P, COCO's captions, or the user's own.

They come from a file, or from the hub id of their owner.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import table_files
from .contracts import ErasebenchError, Missing
from .gate import refuses

log = logging.getLogger("erasebench")
LONGEST = 5000  # characters; a text encoder reads far less, so a longer text indicates a broken file
MORE_CAPTIONS = (  # advice if a method needs captions and has none
    "give more than are evaluated, a longer file with world.captions.path= or a smaller world.captions.count="
)
I2P = "world.explicit.prompts.path="
CAPTIONS = ("prompt", "caption", "captions", "text")
COLUMNS = {  # ours -> the dataset's own name, and the name in the widely copied CSV
    "text": ("prompt",),
    "seed": ("sd_seed", "evaluation_seed", "seed"),
    "guidance": ("sd_guidance_scale", "evaluation_guidance", "guidance", "guidance_scale"),
    "concept": ("concept", "class", "artist", "celebrity", "person", "name", "object", "target", "style"),
    "type": ("type",),  # MACE's: erased and preserved, or 0 and 1
}
NAMES = frozenset(CAPTIONS).union(*COLUMNS.values())


class PromptRow(NamedTuple):
    """A prompt with the columns of its dataset.

    `number` is its row there, from 0.
    """

    number: int
    text: str
    seed: int | None
    guidance: float | None
    concept: str | None = None
    type: str | None = None


def prompts(
    spec: Mapping[str, Any], needed: Sequence[str] = ("text", "seed"), option: str = I2P
) -> tuple[list[PromptRow], int]:
    """Read I2P or a similar table -> (rows, number of dropped rows).

    The safety gate drops rows.

    `spec`: path (see records), or hub id and revision; `option` names the option for the path. Empty prompts and
    duplicates stay: published counts include them.

    Raises ErasebenchError for a missing file or column, and, naming the row, for an invalid seed or guidance, and
    for a prompt of unreasonable length.
    """
    made, where = table(spec, option)
    names = columns(made[0] if made else {}, COLUMNS)
    for ours in needed:
        if names[ours] is None:
            raise ErasebenchError(
                f"{where}: no column {' or '.join(COLUMNS[ours][:3])} (it has {', '.join(sorted(map(str, made[0] if made else {})))[:300]})"
            )
    rows = [row(where, number, record, names) for number, record in enumerate(made)]
    kept = [r for r in rows if not refuses(r.text)]
    return kept, len(rows) - len(kept)


def columns(record: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """Map our column names to the first wanted name in a record.

    Case makes no difference.
    """
    there = {str(name).strip().casefold(): name for name in reversed(list(record))}
    present = lambda name: name if name in record else there.get(name.casefold())
    return {ours: next(filter(None, map(present, theirs)), None) for ours, theirs in wanted.items()}


def row(where: str, number: int, record: Mapping[str, Any], names: Mapping[str, str | None]) -> PromptRow:
    value = lambda ours: record[names[ours]] if names.get(ours) else None
    word = lambda ours: cell(where, number, names[ours], value(ours)).strip() if names.get(ours) else None
    seed = integer(where, number, names["seed"], value("seed")) if names["seed"] else None
    guidance = numeric(where, number, names["guidance"], value("guidance")) if names["guidance"] else None
    return PromptRow(
        number, cell(where, number, names["text"], value("text")), seed, guidance, word("concept"), word("type")
    )


def cell(where: str, number: int, name: str, value: Any) -> str:
    """Return a cell as text; an empty cell is ''."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ErasebenchError(f"{where}, row {number}: {name} = {str(value)[:80]} is no text")
    text = str(value)
    if len(text) > LONGEST:
        raise ErasebenchError(f"{where}, row {number}: a {name} of {len(text)} characters (at most {LONGEST})")
    return text


def numeric(where: str, number: int, name: str, value: Any) -> float:
    made = math.nan
    if isinstance(value, str):
        value = value.strip()
        made = float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value, re.ASCII) else math.nan
    elif isinstance(value, int | float) and not isinstance(value, bool):
        made = value if isinstance(value, int) else float(value)
    if not math.isfinite(made):
        said = "nan is not a number: an empty cell" if value is None or value == "" else f"{value!r:.80} is not a number"
        raise ErasebenchError(f"{where}, row {number}: {name} = {said}")
    return made


def integer(where: str, number: int, name: str, value: Any) -> int:
    """Return a seed exactly as an integer.

    `1.0` is accepted: pandas writes it for 1 if another cell of the column is empty.
    """
    made = numeric(where, number, name, value)
    if isinstance(value, str):
        whole = re.fullmatch(r"\s*([+-]?\d+)(\.0*)?\s*", value, re.ASCII)
        made = int(whole[1]) if whole and len(whole[1]) < 25 else -1
    if not 0 <= made < 2**63 or made != int(made):
        raise ErasebenchError(f"{where}, row {number}: {name} = {str(value).strip():.80} is not a seed")
    return int(made)


def table(spec: Mapping[str, Any], option: str = I2P) -> tuple[list[dict[str, Any]], str]:
    """Read a table or a hub dataset -> (records, their source)."""
    if spec.get("path"):
        table_files.check_file(Path(str(spec["path"])), option)
        return table_files.read(Path(str(spec["path"])), NAMES), str(spec["path"])
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise Missing(f"datasets is not installed: pip install 'erasebench[data]', or give a file with {option}") from error
    try:
        return list(load_dataset(spec["hub"], revision=spec.get("revision"), split="train")), spec["hub"]
    except Exception as error:  # hub, network and schema errors have no common class
        raise Missing(
            f"{spec['hub']} could not be loaded ({str(error).splitlines()[0][:150]}): give a file with {option}"
        ) from error


def captions(spec: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return (evaluation, training) captions.

    They are the embedded world's, or those of a file (see `captions_of`). The first `count` are evaluated, the rest
    are for methods.
    """
    evaluation, training, _ = seeded_captions(spec)
    return evaluation, training


def seeded_captions(spec: Mapping[str, Any]) -> tuple[list[str], list[str], list[int]]:
    """Return `captions`, and the evaluation captions' seeds if a table gives them."""
    if spec["path"] == "embedded":
        from .mini import files

        return *files.captions(), []
    if not spec["path"]:
        return [], [], []
    rows = captions_of(Path(str(spec["path"])))
    texts, seeds = [row.text for row in rows], [row.seed for row in rows if row.seed is not None]
    return texts[: spec["count"]], texts[spec["count"] :], seeds[: spec["count"]]


def captions_of(path: Path) -> list[PromptRow]:
    """Read captions from a text file, a table, or COCO's annotations.

    A text file holds one caption a line; a table has a column of captions, optionally with seeds; of COCO's
    annotations, the caption of the lowest id of each image is taken. Empty captions are left out, and counted if
    they are rows of a table.
    """
    hint = "world.captions.path=: a text file, one caption a line, a table, or COCO's annotations"
    table_files.check_file(path, hint)
    if not table_files.is_table(path):
        lines = table_files.text(path, hint).splitlines()
        return [PromptRow(i, line.strip(), None, None) for i, line in enumerate(lines) if line.strip()]
    made = table_files.read(path, NAMES)
    names = columns(made[0], {**COLUMNS, "text": CAPTIONS, "concept": (), "type": ()})
    if names["text"] is None:
        raise ErasebenchError(
            f"{path}: a table without a column {' or '.join(CAPTIONS)} (it has {', '.join(map(str, made[0]))[:300]}): name it "
            "so, or give a text file (.txt), one caption a line"
        )
    if guidance := names.pop("guidance"):
        log.info("%s: the column %s is not used: captions are drawn with the sampler's guidance", path, guidance)
    rows = [row(str(path), n, record, {**names, "guidance": None}) for n, record in enumerate(made)]
    rows = [r._replace(text=r.text.strip()) for r in rows]
    full = [r for r in rows if r.text]
    if len(full) < len(rows):
        log.info("%s: %d empty captions skipped (the first is row %d)", path, len(rows) - len(full), empty(rows))
    if not full:
        raise ErasebenchError(f"{path}: all captions are empty")
    return one_of_each(path, made, full) if {"image_id", "id"} <= set(made[0]) else full


def empty(rows: Sequence[PromptRow]) -> int:
    return next(r.number for r in rows if not r.text)


def one_of_each(path: Path, made: Sequence[Mapping[str, Any]], rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Return COCO's caption of the lowest id of each image.

    The order is that of the images' ids.
    """
    first: dict[int, tuple[int, PromptRow]] = {}
    for r in rows:
        image, own = (integer(str(path), r.number, name, made[r.number][name]) for name in ("image_id", "id"))
        if image not in first or own < first[image][0]:
            first[image] = own, r
    return [r for _, (_, r) in sorted(first.items(), key=lambda entry: entry[0])]


def lines(path: str | Path, option: str) -> tuple[str, ...]:
    """Return the non-empty lines of a text file; `option` is the option that named it."""
    if not Path(path).is_file():
        raise ErasebenchError(f"{option}={path}: no such file (a text file, one entry a line)")
    if table_files.is_table(Path(path)):
        raise ErasebenchError(f"{option}={path}: a table: give a text file, one entry a line")
    found = tuple(line.strip() for line in table_files.text(Path(path), f"{option}=, one entry a line").splitlines())
    return tuple(line for line in found if line)
