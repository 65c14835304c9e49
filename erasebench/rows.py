"""Rows (metrics of a run) and differences (metrics of a comparison).

Each holds one metric. A row holds all information needed to question its number.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, TextIO, TypeVar

from .contracts import ErasebenchError

SCHEMA = 4
FAILED = ".failed"  # not .csv, so that a reader of all rows in a folder meets those of finished runs only once
AGAIN = "; delete the file and repeat its command"
LARGEST = 64 << 20  # bytes of a file of rows
FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # beginnings of cells that spreadsheets execute
NUMBER = re.compile(r"-\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


class Outdated(ErasebenchError):
    """A file that an earlier version wrote."""


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
    n_valid: int | None  # images with a verdict of the judge
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
    fit_notes: str  # JSON of the fit's remarks: condition numbers, ridges raised, masks found empty
    artifact: str  # key in the store of the fit's artifact; empty for the base
    attack_params: str = (
        ""  # JSON: hyperparameters, access, objective, images a prompt, outcomes of the prompts, key
    )
    by_concept: str = ""  # JSON concept -> [rate, images judged], of rates of forgetting and keeping
    overrides: str = "[]"  # JSON: the command line that reproduces these rows; a place on the disk is ...

    def flaw(self) -> str | None:
        if self.status not in ("ok", "skipped", "failed"):
            return f"status {self.status!r}"
        if self.status != "ok" and self.value is not None:
            return f"a {self.status} row has a value"
        if self.value is not None and None not in (self.low, self.high) and not self.low <= self.value <= self.high:
            return f"{self.metric} = {self.value} lies outside its interval [{self.low}, {self.high}]"
        return None


@dataclass(frozen=True)
class Difference:
    """One metric of a comparison: second - first.

    Both sides were shown the same prompts with the same seeds.
    """

    schema: int
    task: str
    world: str
    base: str
    sampler: str
    targets: str  # erased targets, joined by ", " if there are several
    first_label: str  # method with its other options, and its seed
    second_label: str
    first_runs: str  # run ids joined by " "
    second_runs: str
    metric: str
    split: str
    group: str  # as a row's
    higher_is_better: bool
    first: float
    second: float
    difference: float
    change_low: float | None
    change_high: float | None
    p_value: float | None
    n: int | None  # images of each side
    how: str  # the resampled units of the interval, and the test of the p value

    def flaw(self) -> str | None:
        low, high = self.change_low, self.change_high
        if not all(map(math.isfinite, (self.first, self.second, self.difference))):
            return f"{self.metric} is no number"
        if None not in (low, high) and not low <= self.difference <= high:
            return f"{self.metric}: {self.difference} lies outside its interval [{low}, {high}]"
        return None


Record = TypeVar("Record", Row, Difference)
NAMES = tuple(f.name for f in fields(Row))


def cell(value: object) -> object:
    """Format a value for a CSV.

    A text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    if not isinstance(value, str):
        return "" if value is None else repr(float(value)) if isinstance(value, float) else value
    value = value.replace("\0", "\\x00")
    return f"'{value}" if FORMULA.match(value) and not NUMBER.fullmatch(value) else value


def text_of(written: str) -> str:
    """Return the text that `cell` wrote."""
    return written[1:] if written.startswith("'") and FORMULA.match(written) else written


def write_table(lines: Iterable[Sequence[object]], stream: TextIO) -> None:
    """Write lines of a CSV, with any content of cells."""
    for line in lines:
        buffer = io.StringIO()
        # csv quotes a carriage return only if it is part of the line terminator
        csv.writer(buffer, lineterminator="\r\n").writerow([cell(value) for value in line])
        stream.write(buffer.getvalue().removesuffix("\r\n") + "\n")


def write(records: Sequence[Record], path: Path, kind: type[Record] = Row) -> None:
    """Write a CSV of records, atomically.

    Floats keep full precision (repr); numbers that are not finite become empty.
    """
    types = {f.name: f.type for f in fields(kind)}
    known = lambda name, value: not isinstance(value, float) or "None" not in types[name] or math.isfinite(value)
    stream = io.StringIO()
    lines = [[value if known(name, value) else None for name, value in asdict(record).items()] for record in records]
    write_table([[*types], *lines], stream)
    check_writable(path.parent)
    replace_file(path, stream.getvalue().encode(errors="backslashreplace"))


def replace_file(path: Path, content: bytes, option: str = "results=") -> None:
    """Write a file atomically and flush it to the disk.

    The error names the option, if any, that chooses its folder. The temporary file's name is random: processes of
    several machines or containers may have the same number.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error, option) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # not every file system can; the file is whole in any case
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Create the folder and test that it is writable.

    A run thus fails before its work and not after.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(path: Path, error: OSError, option: str = "results=") -> ErasebenchError:
    advice = f"; choose another folder with {option}" if option else ""
    return ErasebenchError(f"cannot write {path}: {error.strerror}{advice}")


def _parse(kind: str, text: str):
    if text == "" and "None" in kind:
        return None
    if kind.startswith("bool"):
        return {"True": True, "False": False}[text]
    if kind.startswith("int"):
        value = int(text)
        if value.bit_length() > 63:
            raise ValueError
        return value
    if kind.startswith("float"):
        value = float(text)
        if "None" in kind and not math.isfinite(value):
            raise ValueError
        return value
    return text_of(text)


def _content(path: Path) -> str:
    """Return the text of a file.

    Raises ErasebenchError if it is not a file, cannot be read, or is not a text of ours.
    """
    try:
        if not path.is_file():  # reading a pipe would block, and a link may lead to itself
            raise ErasebenchError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
        if path.stat().st_size > LARGEST:
            raise ErasebenchError(f"{path}: larger than any file of rows ({LARGEST >> 20} MiB)")
        content = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ErasebenchError(f"{path}: not a file of rows (not UTF-8){AGAIN}") from error
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in its name; a link that leads to itself
        raise ErasebenchError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    for mark, what in (("\0", "NUL"), ("\ufeff", "a byte order mark")):
        if mark in content[: None if mark == "\0" else 1]:
            raise ErasebenchError(f"{path}: not a file of rows (holds {what}){AGAIN}")
    return content


def read(path: Path, kind: type[Record] = Row) -> list[Record]:
    """Read and validate one CSV of records.

    Raises ErasebenchError naming the file, line and column.
    """
    types = {f.name: f.type for f in fields(kind)}
    reader = csv.reader(io.StringIO(_content(path), newline=""), strict=True)
    try:
        header, *lines = filter(None, reader)
    except csv.Error as error:
        raise ErasebenchError(f"{path}:{reader.line_num}: not a file of rows ({error}){AGAIN}") from error
    except ValueError as error:
        raise ErasebenchError(f"{path}: not a file of rows (empty){AGAIN}") from error
    if header != [*types]:
        _refuse(path, header, lines, [*types])
    return [_record(f"{path}:{number}", line, types, kind) for number, line in enumerate(lines, start=2)]


def _record(where: str, line: Sequence[str], types: dict[str, str], kind: type[Record]) -> Record:
    if len(line) != len(types):
        raise ErasebenchError(f"{where}: {len(line)} cells in place of {len(types)}{AGAIN}")
    values = {}
    for (name, declared), text in zip(types.items(), line, strict=True):
        try:
            values[name] = _parse(declared, text)
        except (ValueError, KeyError) as error:
            raise ErasebenchError(f"{where}: column {name} holds {_brief(text)}{AGAIN}") from error
    record = kind(**values)
    problem = f"schema {record.schema}, expected {SCHEMA}" if record.schema != SCHEMA else record.flaw()
    if problem:
        raise ErasebenchError(f"{where}: {problem}{AGAIN}")
    return record


def _brief(text: str, size: int = 60) -> str:
    """Quote a text for a message, on one line."""
    return ascii(text) if len(text) <= size else f"{ascii(text[:size])}..."


def _refuse(path: Path, header: Sequence[str], lines: Sequence[Sequence[str]], wanted: Sequence[str]) -> None:
    """Explain an unexpected header: an older version's, or a foreign one."""
    schema = dict(zip(header, lines[0], strict=False)).get("schema", "") if lines else ""
    if set(header) < set(wanted) and schema.isdecimal() and len(schema) < 5:
        raise Outdated(
            f"{path}: of schema {schema}, and {SCHEMA} is read: repeat its command, which writes it again from "
            "the store without making images again"
        )
    odd = sorted({*wanted} ^ {*header}) + [f"{name} twice" for name, count in Counter(header).items() if count > 1]
    some = ", ".join(_brief(name, 30).strip("'") for name in odd[:10]) or "in another order"
    more = f" and {len(odd) - 10} more" if len(odd) > 10 else ""
    raise ErasebenchError(f"{path}: not rows of schema {SCHEMA} (columns that differ: {some}{more}){AGAIN}")


def place(records: Sequence[Row], path: Path) -> Path:
    """Return the path for the rows of a run: its file, or <id>.failed beside it.

    The second is used if the rows say less than the existing file. A file that cannot be read belongs to someone
    else or to another version: only a run without a failure replaces it.
    """
    new = {_cell(row) for row in records if row.status == "ok"}
    failed = any(row.status == "failed" for row in records)
    if not path.exists() or (new and not failed):
        return path
    try:
        there = read(path)
    except (ErasebenchError, OSError, ValueError, csv.Error):
        return path.with_suffix(FAILED)
    old = {_cell(row) for row in there if row.status == "ok"}
    finished = bool(there) and all(row.status != "failed" for row in there)
    return path.with_suffix(FAILED) if old - new or (finished and failed) else path


def _cell(row: Row) -> tuple:
    """Return the key of a row's measurement."""
    return row.metric, row.split, row.attack, row.judge, row.threshold


def record(records: Sequence[Row], path: Path) -> Path:
    """Write the rows of a run to their `place` and return it.

    Rows in the run's own file replace an earlier failure.
    """
    where = place(records, path)
    write(records, where)
    if where == path:
        with suppress(OSError):
            path.with_suffix(FAILED).unlink(missing_ok=True)
    return where


def later_failure(path: Path) -> str:
    """Return why a repetition of a finished run failed, or ""."""
    if not path.with_suffix(FAILED).exists():
        return ""
    try:
        there = read(path.with_suffix(FAILED))
    except (ErasebenchError, OSError, ValueError, csv.Error):
        return "for a reason that cannot be read"
    return next((row.reason for row in there if row.status == "failed"), "it measured less")


def read_all(folder: Path) -> list[Row]:
    """Return the rows of all CSVs in a folder, by file name."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path)]


def verified(path: Path) -> dict | None:
    """Return the content of <id>.verified.json beside a file of rows.

    Anybody may have written that file; `seals` knows which were written here. None if there is no such file, or it
    describes other rows than these.
    """
    note = path.with_suffix(".verified.json")
    try:
        if not note.is_file() or note.stat().st_size > LARGEST:
            return None
        found = json.loads(note.read_text(encoding="utf-8"))
        now = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("rows_sha256") == now else None
