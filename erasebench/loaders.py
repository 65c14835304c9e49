"""Prompts that are not shipped: I2P, COCO's captions, one's own; from a file, or from the hub id of their owner."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .contracts import ErasebenchError, Missing
from .gate import refuses

LONGEST = 5000  # characters; a text encoder reads far less, so that more is a broken file
COLUMNS = {  # ours -> the dataset's own name, and the name in the widely copied CSV
    "text": ("prompt",),
    "seed": ("sd_seed", "evaluation_seed", "seed"),
    "guidance": ("sd_guidance_scale", "evaluation_guidance", "guidance"),
    "concept": ("concept", "class", "artist"),
}


class PromptRow(NamedTuple):
    """A prompt with what its dataset says about it; `number` is its row there, from 0."""

    number: int
    text: str
    seed: int | None
    guidance: float | None
    concept: str | None = None


def prompts(spec: Mapping[str, Any], needed: Sequence[str] = ("text", "seed")) -> tuple[list[PromptRow], int]:
    """(rows of I2P or of a table like it, how many the safety gate dropped). `spec`: path (CSV, Parquet), or hub id
    and revision. Empty prompts and duplicates stay: published counts hold them.

    Raises ErasebenchError for a missing file or column, and naming the row for a seed or guidance that is none, and
    for a prompt beyond all reason.
    """
    records, where = table(spec)
    present = set(records[0]) if records else set()
    names = {ours: next((name for name in theirs if name in present), None) for ours, theirs in COLUMNS.items()}
    for ours in needed:
        if names[ours] is None:
            raise ErasebenchError(
                f"{where}: no column {' or '.join(COLUMNS[ours])} (it has {', '.join(sorted(present))})"
            )
    rows = [row(where, number, record, names) for number, record in enumerate(records)]
    kept = [r for r in rows if not refuses(r.text)]
    return kept, len(rows) - len(kept)


def row(where: str, number: int, record: Mapping[str, Any], names: Mapping[str, str | None]) -> PromptRow:
    text = record[names["text"]]
    text = "" if text is None or text != text else str(text)  # an empty cell is read as NaN
    if len(text) > LONGEST:
        raise ErasebenchError(f"{where}, row {number}: a prompt of {len(text)} characters (at most {LONGEST})")
    seed = names["seed"] and numeric(where, number, names["seed"], record[names["seed"]])
    if seed is not None and (not 0 <= seed < 2**63 or seed != int(seed)):
        raise ErasebenchError(f"{where}, row {number}: {names['seed']} = {record[names['seed']]} is not a seed")
    guidance = names["guidance"] and numeric(where, number, names["guidance"], record[names["guidance"]])
    concept = names["concept"] and str(record[names["concept"]]).strip()
    return PromptRow(number, text, None if seed is None else int(seed), guidance, concept)


def numeric(where: str, number: int, name: str, value: Any) -> float:
    try:
        made = float(value)
    except (TypeError, ValueError):
        made = math.nan
    if not math.isfinite(made):
        raise ErasebenchError(f"{where}, row {number}: {name} = {value!r} is not a number")
    return made


def table(spec: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(records, where they are from) of a CSV or Parquet file, or of a dataset on the hub."""
    if spec.get("path"):
        import pandas

        path = Path(spec["path"])
        if not path.is_file():
            raise ErasebenchError(f"{path}: no such file")
        try:
            frame = pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_csv(path)
        except Exception as error:  # parser, encoding and Arrow errors have no common class
            raise ErasebenchError(f"{path}: not a readable table ({str(error).splitlines()[0][:150]})") from error
        return frame.to_dict("records"), str(path)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise Missing("datasets is not installed: pip install 'erasebench[data]', or give a file") from error
    try:
        return list(load_dataset(spec["hub"], revision=spec.get("revision"), split="train")), spec["hub"]
    except Exception as error:  # hub, network and schema errors have no common class
        raise Missing(
            f"{spec['hub']} could not be loaded ({str(error).splitlines()[0][:150]}): give a file with a path"
        ) from error


def captions(spec: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(evaluation, training) captions: the embedded world's; a text file, one a line; or COCO's annotations, one
    caption of each image, of the lowest id. The first `count` are evaluated, the rest are for methods."""
    if spec["path"] == "embedded":
        from .mini import nets

        return nets.captions()
    if not spec["path"]:
        return [], []
    path = Path(spec["path"])
    if not path.is_file():
        raise ErasebenchError(f"world.captions.path={path}: no such file (one caption a line, or COCO's annotations)")
    lines = coco(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    return lines[: spec["count"]], lines[spec["count"] :]


def coco(path: Path) -> Sequence[str]:
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        first: dict[int, tuple[int, str]] = {}
        for a in annotations:
            first[a["image_id"]] = min(first.get(a["image_id"], (a["id"], a["caption"])), (a["id"], a["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ErasebenchError(f"{path}: not COCO's caption annotations ({type(error).__name__}: {error})") from error
    return [caption for _, (_, caption) in sorted(first.items())]


def lines(path: str | Path, option: str) -> tuple[str, ...]:
    """The lines of a text file that hold something; `option` is what named it."""
    if not Path(path).is_file():
        raise ErasebenchError(f"{option}={path}: no such file (a text file, one entry a line)")
    return tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
