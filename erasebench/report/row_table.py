"""Rows as one long Parquet table: a line for each metric of each run.

The columns are the fields of `rows.Row`, in their order and with their types (text, int64, float64, bool; a field
that may be None is nullable), so that a line is a row and reads back equal: run_id, method, params, task, target,
split, attack, metric, value, low, high, n, ... Rows of one run stand together, runs are in the order of their ids.
Repeated texts (the command line, packages, a fit's notes) cost nothing there: Parquet keeps each once.

A file of kept rows (`erasebench.report.agreement --keep`) has only the columns in KEPT; its rows are empty
elsewhere.

In a folder of results the table is rows.parquet, and files in runs/ take precedence: they are newer, or were made
again.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

from .. import rows
from ..contracts import ErasebenchError
from ..rows import Row
from .runs import plain

TABLE = "rows.parquet"
KEPT = ("run_id", "status", "method", "params", "base", "revision", "world", "task", "n_concepts", "target", "split")
KEPT += ("attack", "subset", "metric", "value", "low", "high", "base_value", "change_low", "p_value", "n", "seed", "overrides")
MOST_ROWS = 1_000_000
EMPTY = Row(**dict.fromkeys(rows.NAMES, ""))


def arrow_fields(columns: Sequence[str], nullable: bool = False) -> list:
    """Return the Arrow fields of these columns of a row.

    All are nullable if `nullable`.
    """
    import pyarrow

    types = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_()}
    declared = {f.name: str(f.type) for f in fields(Row)}
    kind = lambda name: types.get(declared[name].split(" ")[0], pyarrow.string())
    return [pyarrow.field(name, kind(name), nullable=nullable or "None" in declared[name]) for name in columns]


def write(some: Sequence[Row], path: Path, columns: Sequence[str] = rows.NAMES, option: str = "--results") -> None:
    """Write a Parquet file of rows, atomically. Raises ErasebenchError if that fails."""
    import pyarrow
    from pyarrow import parquet

    lines = [{name: getattr(row, name) for name in columns} for row in some]
    table = pyarrow.Table.from_pylist(lines, schema=pyarrow.schema(arrow_fields(columns)))
    parquet.write_table(table, buffer := io.BytesIO(), compression="zstd", compression_level=19)
    rows.check_writable(path.parent)
    rows.replace_file(path, buffer.getvalue(), option)


def read(path: Path) -> list[Row]:
    """Return the rows of a Parquet file.

    Raises ErasebenchError in one line for any other file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        if not path.is_file() or path.stat().st_size > rows.LARGEST:
            raise ErasebenchError(f"{path}: not a file of at most {rows.LARGEST >> 20} MiB")
        file = parquet.ParquetFile(path)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        found = file.schema_arrow.remove_metadata()
        columns = next((names for names in (rows.NAMES, KEPT) if found.equals(pyarrow.schema(arrow_fields(names)))), None)
        if columns is None:
            raise ErasebenchError(f"{path}: not a Parquet file of rows (other columns); write it again")
        if file.metadata.num_rows > MOST_ROWS or size > rows.LARGEST:
            raise ErasebenchError(f"{path}: larger than any file of rows")
        made = [replace(EMPTY, **record) for record in file.read().to_pylist()]
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise ErasebenchError(f"{path}: not a Parquet file of rows ({plain(error)[:100]}); write it again") from error
    for number, row in enumerate(made, start=1):
        if flaw := find_flaw(row, columns):
            raise ErasebenchError(f"{path}: row {number}: {plain(flaw)[:100]}; write it again")
    return made


def find_flaw(row: Row, columns: Collection[str]) -> str | None:
    """Return the reason why these columns make no row, or None."""
    given = [f.name for f in fields(Row) if f.name in columns and "None" not in f.type]
    missing = next((name for name in given if getattr(row, name) is None), None)
    if missing:
        return f"no {missing}"
    if "schema" in columns and row.schema != rows.SCHEMA:
        return f"schema {row.schema}, expected {rows.SCHEMA}"
    return row.flaw()


def read_runs(results: Path) -> Mapping[str, tuple[Row, ...]]:
    """Return run id -> its rows in rows.parquet of a results folder.

    Empty if there is no such file.
    """
    path = results / TABLE
    if not path.exists():
        return {}
    stat = path.stat()
    return _read_runs(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)
def _read_runs(path: Path, changed: int, size: int) -> Mapping[str, tuple[Row, ...]]:
    found: dict[str, list[Row]] = {}
    for row in read(path):
        found.setdefault(row.run_id, []).append(row)
    return {run_id: tuple(own) for run_id, own in found.items()}


def place(results: Path, run_id: str) -> Path:
    """Return the path of a run's rows.

    The file need not exist: the rows may be in the table alone.
    """
    return results / "runs" / f"{run_id}.csv"


def list_places(results: Path) -> list[Path]:
    """Return the sorted paths of all runs of a results folder.

    Runs of the table are included.
    """
    return sorted({*(results / "runs").glob("*.csv"), *(place(results, run_id) for run_id in read_runs(results))})


def read_place(path: Path) -> list[Row]:
    """Return the rows of a run's file, or else of the table."""
    kept = () if path.exists() else read_runs(path.parent.parent).get(path.stem, ())
    return list(kept) or rows.read(path)


def read_all(results: Path) -> list[Row]:
    """Return the rows of every run of a results folder.

    They are in the order of their paths.
    """
    return [row for path in list_places(results) for row in read_place(path)]


def pack(results: Path, without: Collection[str] = ()) -> Path:
    """Rewrite rows.parquet of a results folder from runs/ and the table.

    Leaves out the runs in `without`.
    """
    found: dict[str, list[Row]] = {}
    for row in read_all(results):
        found.setdefault(row.run_id, []).append(row)
    write([row for run_id in sorted(found) if run_id not in without for row in found[run_id]], results / TABLE)
    return results / TABLE
