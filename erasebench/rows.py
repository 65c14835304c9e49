"""The row: one metric of one run, with everything needed to doubt it."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from .contracts import ErasebenchError

SCHEMA = 4


@dataclass(frozen=True)
class Row:
    schema: int
    run_id: str
    status: Literal["ok", "skipped", "failed"]
    reason: str  # why skipped or failed; empty when ok
    method: str
    method_version: int | None
    params: str  # JSON of the method's hyperparameters
    base: str  # name of the base model
    revision: str  # hub revision, or sha256 of a local folder's content
    world: str
    task: str
    task_version: int
    n_concepts: int
    target: str  # erased names joined by ", " when they were chosen by name
    split: str
    attack: str
    subset: bool  # images= was set: fewer images than the task defines
    judge: str
    judge_version: str
    threshold: float | None
    metric: str
    group: str  # forget, keep, overall, quality, attack, probe, cost
    higher_is_better: bool | None
    value: float | None
    low: float | None
    high: float | None
    ci_method: str
    base_value: float | None  # the same number for the base's images of the same prompts and seeds
    change_low: float | None  # value - base_value, in pairs
    change_high: float | None
    p_value: float | None  # McNemar's, for rates
    n: int | None  # images made
    n_valid: int | None  # images that the judge gave a verdict on
    n_refused: int | None  # images that a guard refused to make
    n_dropped: int  # prompts of the task that the safety gate dropped
    published: float | None
    published_source: str
    seed: int
    sampler: str
    prompts_sha256: str
    packages: str  # JSON name -> version
    commit: str
    dirty: bool | None
    device: str
    batch: int | None  # smallest batch that sampling fell back to
    fit_seconds: float | None
    sample_seconds: float | None
    unet_calls: int | None  # U-Net evaluations of single latents, fit and sampling together
    peak_memory_mb: float | None
    fit_notes: str  # JSON of what the fit had to say: condition numbers, ridges raised, masks found empty
    artifact: str  # key in the store of what the method learnt; empty for the base
    attack_params: str = (
        ""  # JSON: hyperparameters, access, objective, images a prompt, what became of the prompts, key
    )


NAMES = tuple(f.name for f in fields(Row))
_TYPES = {f.name: f.type for f in fields(Row)}


def write(rows: list[Row], path: Path) -> None:
    """Write a CSV of rows, atomically. Floats keep full precision (repr)."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, NAMES, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in asdict(row).items()}
        )
    check_writable(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(buffer.getvalue(), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def check_writable(folder: Path) -> None:
    """Make the folder and try it, so that a run finds out before its work and not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError) -> ErasebenchError:
    return ErasebenchError(f"cannot write {path}: {error.strerror}; choose another folder with results=")


def _parse(name: str, text: str):
    kind = _TYPES[name]
    if text == "" and "None" in kind:
        return None
    if kind.startswith("bool"):
        return {"True": True, "False": False}[text]
    if kind.startswith("int"):
        return int(text)
    if kind.startswith("float"):
        return float(text)
    return text


def read(path: Path) -> list[Row]:
    """Read and validate one CSV of rows. Raises ErasebenchError naming the file, line and column."""
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != NAMES:
            odd = sorted(set(NAMES) ^ set(reader.fieldnames or ()))
            raise ErasebenchError(f"{path}: not rows of schema {SCHEMA} (columns that differ: {', '.join(odd)})")
        rows = []
        for number, record in enumerate(reader, start=2):
            values = {}
            for name in NAMES:
                try:
                    values[name] = _parse(name, record[name])
                except (ValueError, KeyError, TypeError) as error:
                    raise ErasebenchError(f"{path}:{number}: column {name} holds {record[name]!r}") from error
            row = Row(**values)
            problem = _invalid(row)
            if problem:
                raise ErasebenchError(f"{path}:{number}: {problem}")
            rows.append(row)
    return rows


def _invalid(row: Row) -> str | None:
    if row.schema != SCHEMA:
        return f"schema {row.schema}, expected {SCHEMA}"
    if row.status not in ("ok", "skipped", "failed"):
        return f"status {row.status!r}"
    if row.status != "ok" and row.value is not None:
        return f"a {row.status} row has a value"
    if row.value is not None and None not in (row.low, row.high) and not row.low <= row.value <= row.high:
        return f"{row.metric} = {row.value} lies outside its interval [{row.low}, {row.high}]"
    return None


def read_all(folder: Path) -> list[Row]:
    """Rows of every CSV in a folder, in the order of file names."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path)]
