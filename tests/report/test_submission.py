"""Rows are checked before others get them, and verified by nothing but running them again."""

import json
import os
from dataclasses import replace

import pytest

from erasebench import cli, config, provenance, rows
from erasebench.maintain import regress
from erasebench.report import seals, submission
from erasebench.run.run import execute


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(provenance, "git", lambda: ("abc123", False))


@pytest.fixture
def honest(tmp_path, tiny_folder):
    """(rows of a small run, how to say where its base is)."""
    place = f"model.path={tiny_folder}"
    words = ["method=uce", "target=cat", "images=4", "sampler.steps=2", place, f"results={tmp_path}/results"]
    assert config.main(execute, words) == 0
    (path,) = (tmp_path / "results" / "runs").glob("*.csv")
    return path, place


def change(path, **changes):
    rows.write([replace(row, **changes) for row in rows.read(path)], path)


def wrong(capsys):
    return [line[6:].split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]


def test_honest_rows_are_verified_by_running_them_from_nothing(honest, capsys, monkeypatch):
    path, place = honest
    home = os.environ["ERASEBENCH_HOME"]
    assert cli.main(["verify", str(path), place]) == 0
    said = capsys.readouterr().out
    assert "wrong" not in said and f"To verify: python -m erasebench verify {path} --rerun {place}" in said
    assert rows.verified(path) is None  # checks alone verify nothing
    assert cli.main(["verify", str(path), "--rerun", place]) == 0
    found = rows.verified(path)
    assert seals.is_sealed(found)
    values = sum(row.value is not None for row in rows.read(path))
    assert found["commit"] == "abc123" and found["identical"] + found["within"] == values and found["identical"] > 20
    assert os.environ["ERASEBENCH_HOME"] == home
    change(path, seed=3)
    assert rows.verified(path) is None  # of other rows than those that came out


def test_an_edited_number_does_not_come_out_again(honest, capsys):
    path, place = honest
    edited = [replace(r, value=r.value + 50) if r.metric == "artifact_bytes" else r for r in rows.read(path)]
    rows.write(edited, path)
    assert cli.main(["verify", str(path), "--rerun", place]) == 1
    said = capsys.readouterr().out
    assert "artifact_bytes" in said and "Not verified: other numbers come out." in said
    assert not path.with_suffix(".verified.json").exists()


def test_a_forged_interval_or_base_does_not_come_out_again(honest):
    """Any value lies within an interval that its writer chose."""
    path, _ = honest
    made = rows.read(path)
    lines = [regress.line_of(row) for row in made]
    assert not submission.doubtful("r", made, made) and not regress.compare("r", lines, made)
    rates = [i for i, row in enumerate(made) if row.low is not None and row.high - row.low > 0.1]
    for i in rates:
        for forged in (
            {"low": -9.0, "high": 9.0},
            {"low": made[i].high},
            {"base_value": 1e9},
            {"low": None, "high": None},
        ):
            claim = [*made[:i], replace(made[i], **forged), *made[i + 1 :]]
            assert any(move.fault for move in submission.doubtful("r", claim, made)), (made[i].metric, forged)
    assert rates


def test_a_tree_with_changes_verifies_nothing(honest, capsys, monkeypatch):
    path, place = honest
    monkeypatch.setattr(provenance, "git", lambda: ("abc123", True))
    assert cli.main(["verify", str(path), "--rerun", place]) == 1
    assert "Not verified: the same numbers come out, but of a tree with changes" in capsys.readouterr().out
    assert not path.with_suffix(".verified.json").exists()


@pytest.mark.parametrize(
    "changes,what",
    [
        ({"run_id": "uce-other"}, "one run, in a file of its name"),
        ({"dirty": True}, "made from a clean checkout"),
        ({"commit": ""}, "made from a clean checkout"),
        ({"packages": json.dumps({"torch": "0.1"})}, "made with the packages that are here"),
    ],
)
def test_what_is_wrong_is_named(honest, capsys, changes, what):
    path, place = honest
    change(path, **changes)
    assert cli.main(["verify", str(path), place]) == 1
    assert what in wrong(capsys)


def test_options_that_make_another_run_cannot_be_verified(honest, capsys):
    path, place = honest
    said = json.loads(rows.read(path)[0].overrides)
    change(path, overrides=json.dumps([*said, "method.preserve_scale=7"]))
    assert cli.main(["verify", str(path), "--rerun", place]) == 1
    out = capsys.readouterr().out
    assert "wrong its options make this very run here" in out and "cannot be verified here" in out


def test_hostile_files_are_one_line(honest, tmp_path, capsys):
    path, place = honest

    def fails(file, message, *more):
        assert cli.main(["verify", str(file), *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line

    fails(tmp_path / "no.csv", "no such file")
    fails(path, "give model.path=")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    fails(path, str(path), place)
    path.write_text("a,b\n1,2\n")
    fails(path, str(path), place)
    path.write_text(text)
    change(path, overrides='["method._target_=os.system"]')
    fails(path, "may not say what code to load", place)
    for odd in ("{", "[1]", '["hydra.run.dir=x"]', '["+new=1"]', '["target=cat,dog"]', '["target=${oc.env:HOME}"]'):
        change(path, overrides=odd)
        fails(path, str(path), place)
    change(path, overrides='["method=uce", "method={uce: {a: 1}}"]')
    fails(path, str(path), place)
    change(path, overrides="[]", reason="\x1b[31m", status="failed", value=None, low=None, high=None)
    cli.main(["verify", str(path), place])
    assert "\x1b" not in capsys.readouterr().out
