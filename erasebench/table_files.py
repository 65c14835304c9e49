"""Strict readers of the user's tables and text files.

Tables are CSV, TSV, JSON, JSON lines or Parquet. Text stays text: a cell that says null, NA or 007 is that word.
Input that cannot be read with certainty is refused, in one line that says where. Row numbers begin at 0, as in a
data frame; line numbers begin at 1, as in an editor.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .contracts import ErasebenchError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")  # of tables; anything else is lines of text
DELIMITERS = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}
MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
PARQUET = b"PAR1"
Record = dict[str, Any]


def is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or content(path)[:4] == PARQUET


def check_file(path: Path, hint: str = "") -> None:
    """Raise ErasebenchError, with the hint, for anything but a regular file."""
    said = f" ({hint})" if hint else ""
    try:
        if path.is_dir():
            raise ErasebenchError(f"{path}: a folder, a file is needed{said}")
        if not path.exists():
            raise ErasebenchError(f"{path}: no such file{said}")
        if not path.is_file():
            raise ErasebenchError(f"{path}: not a regular file{said}")
    except (OSError, ValueError) as error:  # a name may be too long, or hold a NUL
        raise ErasebenchError(f"{str(path)[:200]!r}: cannot be read ({str(error)[:150]})") from error


def content(path: Path, hint: str = "") -> bytes:
    """Return the bytes of a regular file.

    Raises ErasebenchError, with the hint, if there is none.
    """
    check_file(path, hint)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name may be too long, or hold a NUL
        raise ErasebenchError(f"{str(path)[:200]!r}: cannot be read ({str(error)[:150]})") from error


def text(path: Path, hint: str = "") -> str:
    """Return the text of a file.

    It is in UTF-8, or in UTF-16 or 32 with a byte order mark. The mark is not part of the text.
    """
    raw = content(path, hint)
    if kind := next((kind for magic, kind in PACKED.items() if raw.startswith(magic)), None):
        raise ErasebenchError(f"{path}: a {kind} file: unpack it first")
    mark, encoding = next(((mark, name) for mark, name in MARKS if raw.startswith(mark)), (b"", "utf-8"))
    try:
        decoded = raw.decode(encoding) if encoding != "utf-8" else raw[len(mark) :].decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: len(mark) + error.start].count(b"\n") + 1
        raise ErasebenchError(
            f"{path}, line {line}: not {encoding.upper()} (byte 0x{error.object[error.start]:02x}): convert the file, "
            f"`iconv -f latin1 -t utf-8` if it is Latin-1"
        ) from error
    if "\0" in decoded:
        line = decoded[: decoded.index("\0")].count("\n") + 1
        raise ErasebenchError(f"{path}, line {line}: a NUL byte: no text in UTF-8 (UTF-16 needs a byte order mark)")
    return decoded


def read(path: Path, known: Collection[str]) -> list[Record]:
    """Read the rows of a table.

    Its content and its name identify its format. All rows have the same columns. A delimiter other than the usual
    one is found by the `known` names of columns. Raises ErasebenchError for anything that is not such a table.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet" or content(path)[:4] == PARQUET:
        rows = parquet(path)
    elif suffix in (".jsonl", ".ndjson"):
        rows = json_lines(path, text(path))
    elif suffix == ".json":
        rows = json_table(path, text(path))
    else:
        rows = delimited(path, text(path), known)
    if not rows:
        raise ErasebenchError(f"{path}: no rows")
    return rows


def delimited(path: Path, written: str, known: Collection[str]) -> list[Record]:
    """Return the rows of a CSV or TSV as text.

    Quoted line breaks belong to their cell; empty lines are left out.
    """
    if not written.strip():
        raise ErasebenchError(f"{path}: empty")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    parse = lambda delimiter: csv.reader(io.StringIO(written, newline=""), delimiter=delimiter, strict=True)
    fits = lambda delimiter: {name.strip().casefold() for name in first(path, parse(delimiter))} & set(known)
    delimiter = next((d for d in (usual, *DELIMITERS) if fits(d)), usual)
    cells = parse(delimiter)
    header = [name.strip() for name in first(path, cells)]
    check_columns(path, [name for name in header if name])  # pandas writes its index without a name
    rows: list[Record] = []
    try:
        for row in cells:
            if not row or (len(header) > 1 and len(row) == 1 and not row[0].strip()):
                continue
            if len(row) != len(header):
                raise ErasebenchError(
                    f"{path}, row {len(rows)} (line {cells.line_num}): {len(row)} cells, the header has {len(header)}: "
                    f"a cell that holds {DELIMITERS[delimiter]} is to be quoted"
                )
            rows.append({name: cell for name, cell in zip(header, row, strict=True) if name})
    except csv.Error as error:
        raise ErasebenchError(f"{path}, row {len(rows)} (line {cells.line_num}): {quoting(error)}") from error
    return rows


def first(path: Path, cells: Any) -> list[str]:
    """Return the header: the first line that is not empty."""
    try:
        return next(row for row in cells if any(cell.strip() for cell in row))
    except csv.Error as error:
        raise ErasebenchError(f"{path}, the header: {quoting(error)}") from error
    except StopIteration:
        raise ErasebenchError(f"{path}: no header") from None


def quoting(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end" in said:
        return "a quote that is opened there, or before, is never closed"
    return f"not a readable table ({said})"


def check_columns(path: Path, names: Sequence[str]) -> None:
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ErasebenchError(f"{path}: two columns are called {twice[:100]!r}")


def json_table(path: Path, written: str) -> list[Record]:
    """Return the rows of a JSON file.

    It holds a list of objects or of texts, an object of columns, COCO's annotations, or an object a line.
    """
    if not written.strip():
        raise ErasebenchError(f"{path}: empty")
    try:
        made = parsed(written)
    except ValueError as error:
        lines = [line for line in written.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].strip().startswith("{") and lines[0].strip().endswith("}"):
            return json_lines(path, written)
        raise ErasebenchError(f"{path}: not readable as JSON ({str(error)[:150]})") from error
    if isinstance(made, Mapping):
        lists = [value for value in made.values() if isinstance(value, list) and value and isinstance(value[0], Mapping)]
        if isinstance(made.get("annotations"), list):
            made = made["annotations"]
        elif len(made) == len(lists) == 1:
            made = lists[0]
        else:
            made = transposed(path, made)
    if isinstance(made, list) and made and all(isinstance(entry, str) for entry in made):
        made = [{"prompt": entry} for entry in made]
    if not isinstance(made, list) or not made:
        raise ErasebenchError(f"{path}: not COCO's caption annotations, a list of objects or an object of columns")
    return alike(path, made)


def transposed(path: Path, columns: Mapping[str, Any]) -> list[Record]:
    """Return the rows of an object of columns.

    Each column is a list, or an object by row as pandas writes it; an object of plain values is a single row.
    """
    if columns and not any(isinstance(column, list | Mapping) for column in columns.values()):
        return [dict(columns)]
    made = {name: list(c.values()) if isinstance(c, Mapping) else c for name, c in columns.items()}
    index = [list(c) for c in columns.values() if isinstance(c, Mapping)]
    if not made or any(not isinstance(column, list) for column in made.values()) or any(i != index[0] for i in index):
        raise ErasebenchError(f"{path}: not COCO's caption annotations, a list of objects or an object of columns")
    sizes = {name: len(column) for name, column in made.items()}
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{name[:40]}: {size}" for name, size in list(sizes.items())[:8])
        raise ErasebenchError(f"{path}: the columns are of different lengths ({each})")
    return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]


def json_lines(path: Path, written: str) -> list[Record]:
    """Return the rows of a file with one JSON object a line."""
    made = []
    for number, line in enumerate(written.split("\n"), 1):  # str.splitlines also splits at characters within a text
        if not line.strip():
            continue
        try:
            made.append(parsed(line))
        except ValueError as error:
            raise ErasebenchError(f"{path}, line {number}: not readable as JSON ({str(error)[:150]})") from error
        if not isinstance(made[-1], Mapping):
            raise ErasebenchError(f"{path}, line {number}: not a JSON object")
    return alike(path, made)


def alike(path: Path, rows: Sequence[Any]) -> list[Record]:
    """Return the rows with the columns of all; missing values are None."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ErasebenchError(f"{path}, row {number}: not a JSON object")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def parsed(written: str) -> Any:
    """Parse JSON and keep numbers as they are written.

    Raises ValueError also for NaN, duplicate keys and deep nesting.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return made

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(written, object_pairs_hook=once, parse_int=str, parse_float=str, parse_constant=refused)
    except RecursionError:
        raise ValueError("too deep") from None


def parquet(path: Path) -> list[Record]:
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            check_columns(path, file.schema_arrow.names)
            return file.read().to_pylist()
    except ErasebenchError:
        raise
    except Exception as error:  # Arrow's errors, of files, types and memory, have no common class
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise ErasebenchError(f"{path}: not a readable table ({said})") from error
