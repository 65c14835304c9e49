"""Published tables as printed: every value of the file, the method that measures it, and how many can be measured."""

import csv
from pathlib import Path

import pytest

from erasebench import cli
from erasebench.report import printed
from erasebench.report.tables import published_tables

FOLDER = Path(__file__).parents[2] / "results" / "published"


def test_a_table_has_its_values_and_the_methods_that_measure_them(capsys):
    assert cli.main(["published", "mace_table1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("MACE") and out[0].endswith("Table 1; base SD v1.4")
    at = out.index("erased airplane")
    cells = {line.split("  ")[0]: line.split() for line in out[at + 2 : out.index("erased automobile")] if line}
    with (FOLDER / "mace_table1_cifar10_objects.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == '{"erased": "airplane"}']
    assert len(cells) == len({row["method"] for row in rows})
    for row in rows:
        assert (row["value"] or "–") in cells[row["method"]]
    assert cells["UCE"][-1] == "method=uce"
    assert any(line.endswith("erasebench experiment=mace_table1") for line in out)


def test_cells_that_no_method_here_measures_are_counted_out():
    table = printed.find_table("mace_table1")
    lines = [
        dict(method="UCE", metric="acc_e"),
        dict(method="UCE", metric="lpips"),
        dict(method="Unheard of", metric="acc_e"),
    ]
    first, *rest = printed.describe_measurable(table, lines)
    assert first == "1 of 3 values can be measured here"
    assert rest[:2] == ["methods that are not here: Unheard of", "metrics that are not measured: lpips"]


@pytest.mark.parametrize("name", [protocol.name for protocol in published_tables()])
def test_every_table_can_be_printed(name):
    lines = printed.describe(name)
    assert any("values can be measured here" in line for line in lines) and all(isinstance(line, str) for line in lines)


def test_all_tables_are_listed_and_an_unknown_one_is_one_line(capsys):
    assert cli.main(["published"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(published_tables())
    assert cli.main(["published", "mace_tabel1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean 'mace_table1'?" in line
