"""The long table: rows read back as they were, and files of runs come before it."""

import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from erasebench import cli, rows
from erasebench.contracts import ErasebenchError
from erasebench.report import leaderboard, row_table
from erasebench.rows import Row

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def drawn(run_id: str, rng: random.Random) -> Row:
    """A row of any values that its fields may have."""
    texts = ["", "=1+1", "'", "a,\nb\"", "消去", "None", "nan", "{}"]
    kinds = {
        "str": lambda: rng.choice(texts),
        "int": lambda: rng.randrange(-(2**62), 2**62),
        "float": lambda: rng.gauss(0, 10 ** rng.uniform(-200, 200)),
        "bool": lambda: rng.random() < 0.5,
    }
    values = {}
    for f in fields(Row):
        kind, *rest = f.type.split(" | ")
        values[f.name] = None if rest and rng.random() < 0.3 else kinds.get(kind, lambda: "ok")()
    return Row(**values | {"run_id": run_id, "schema": rows.SCHEMA, "status": "ok", "low": None})


@pytest.fixture
def folder(tmp_path):
    """A folder of results with the files of ten runs, and their rows."""
    rng = random.Random(0)
    made = {name: [drawn(name, rng) for _ in range(rng.randrange(1, 9))] for name in map("run{}".format, range(10))}
    for name, own in made.items():
        rows.write(own, row_table.place(tmp_path, name))
    return tmp_path, made


def test_rows_of_files_and_of_the_table_are_equal(folder):
    results, made = folder
    written = [row for name in sorted(made) for row in made[name]]
    assert row_table.read_all(results) == written
    assert row_table.read(row_table.pack(results)) == written
    for path in (results / "runs").glob("*"):
        path.unlink()
    assert row_table.read_all(results) == written
    assert row_table.read(row_table.pack(results)) == written


def test_a_file_comes_before_the_table(folder):
    results, made = folder
    row_table.pack(results)
    again = [replace(made["run3"][0], metric="again")]
    rows.write(again, row_table.place(results, "run3"))
    row_table.place(results, "run4").unlink()
    found = row_table.read_all(results)
    assert [row for row in found if row.run_id == "run3"] == again
    assert [row for row in found if row.run_id == "run4"] == made["run4"]
    assert row_table.read_runs(results)["run3"] == tuple(made["run3"])
    row_table.pack(results, without=["run5"])
    assert row_table.read_runs(results)["run3"] == tuple(again) and "run5" not in row_table.read_runs(results)


def test_a_damaged_table_is_one_line_and_leaves_the_files(folder, capsys):
    results, _ = folder
    (results / row_table.TABLE).write_bytes(b"PAR1 no")
    groups, (problem,) = leaderboard.load(results)
    assert "not a Parquet file of rows" in problem and "\n" not in problem
    assert {run.head.run_id for group in groups for run in group.runs} == {f"run{i}" for i in range(10)}


def test_a_table_of_another_schema_is_refused(folder):
    results, made = folder
    row_table.write([replace(made["run1"][0], schema=rows.SCHEMA - 1)], results / "old.parquet")
    with pytest.raises(ErasebenchError, match="schema"):
        row_table.read(results / "old.parquet")


def test_the_reference_is_read_from_its_table():
    assert len(row_table.read(REFERENCE / row_table.TABLE)) > 10_000
    groups, problems = leaderboard.load(REFERENCE)
    assert not problems and {"object: airplane", "celebrity: 10"} <= {group.title for group in groups}


def test_claims_are_told_of_the_reference(tmp_path, capsys):
    assert cli.main(["claims", "--results", str(REFERENCE)]) == 0
    said = capsys.readouterr()
    verdicts = {line.partition(":")[0] for line in said.out.splitlines()}
    assert {"holds", "undecided"} <= verdicts <= {"holds", "does not hold", "undecided"} and not said.err
    assert cli.main(["claims", "--results", str(tmp_path)]) == 1 and "no rows" in capsys.readouterr().err
