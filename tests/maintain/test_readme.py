"""The README's tables are those of the configuration, its numbers those of the files that it names."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from erasebench import cli
from erasebench.contracts import ErasebenchError
from erasebench.maintain import readme
from erasebench.report.row_table import EMPTY

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_configuration():
    """`python -m erasebench readme --write README.md` updates them, as `regress --accept` does for a new method.

    A method without a golden has no line yet.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    goldens = [path.stem for path in (ROOT / "results" / "reference" / "regress").glob("*.csv")]
    without = [
        f"| `{name}` |"
        for name, notes in readme.listed(ROOT / "conf" / "method").items()
        if not notes.get("regress", "").startswith(readme.LEFT_OUT) and not any(g.endswith(f"_{name}") for g in goldens)
    ]
    lines = readme.written(text, readme.tables()).splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith(tuple(without))) == text


def test_every_choice_is_described_or_is_a_variant_of_another():
    for kind in readme.COLUMNS:
        for path in (ROOT / "conf" / kind).glob("*.yaml"):
            assert readme.described(path) or "defaults:" in path.read_text(), (
                f"{path}: no first lines that describe it"
            )


def test_a_method_of_ones_own_has_a_line(tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# paper: a|b\n# here: `x=1|2`\n# regress: method.x=2\n_target_: mine.Mine\n")
    (tmp_path / "method" / "other.yaml").write_text("# reference: left out, a variant\ndefaults: [mine, _self_]\n")
    made = readme.table("method", tmp_path, {"mine": "3.0 s, 40"}).splitlines()
    assert made[2:] == ["| `mine` | a\\|b | | | `x=1\\|2` | 3.0 s, 40 |"]


def test_costs_come_from_the_longest_fit_of_an_airplane():
    columns = ("method", "world", "target", "fit_seconds", "value")
    lines = [("ap", "mini", "airplane", 123.6, 23200.0), ("ap", "mini", "cat", 500.0, 1.0)]
    lines += [("ap", "photo", "airplane", 900.0, 1.0), ("gie", "mini", "airplane", None, None)]
    lines += [("gie", "mini", "airplane", 57.4, 20720.0), ("uce", "mini", "airplane", 0.26, 0.0)]
    lines += [("gie", "mini", "airplane", 12.0, 100.0), ("none", "mini", "airplane", 0.0, 0.0)]
    some = [replace(EMPTY, metric="fit_unet_calls", **dict(zip(columns, line, strict=True))) for line in lines]
    some += [replace(some[0], metric="acc_e", fit_seconds=1000.0), replace(some[0], attack="cce", fit_seconds=1000.0)]
    assert readme.costs(some) == {"ap": "124 s, 23,200", "gie": "57 s, 20,720", "uce": "0.3 s, 0"}


def test_faults_are_one_line(tmp_path, capsys):
    (tmp_path / "plain.md").write_text("no marks")
    assert cli.main(["readme", "--write", str(tmp_path / "plain.md")]) == 1
    assert capsys.readouterr().err.startswith("error: no <!-- methods -->")
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# paper: one\n# colour: red\n")
    with pytest.raises(ErasebenchError, match="colour"):
        readme.table("method", tmp_path, {})


def test_the_table_of_speeds_is_that_of_the_benchmarks():
    """`python tests/benchmarks/page.py` brings it up to date."""
    page = runpy.run_path(str(ROOT / "tests/benchmarks/page.py"))
    assert page["table"](ROOT / "results/reference/bench.csv") in page["PAGE"].read_text(encoding="utf-8")
