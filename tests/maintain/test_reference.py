"""The reference is made once: what is there is not made again, and what has changed is."""

from dataclasses import replace

import pytest
import yaml

from erasebench import rows
from erasebench.maintain import reference
from erasebench.report import row_table
from erasebench.run import run


@pytest.fixture
def made(tmp_path, tiny_folder, monkeypatch):
    """(make it -> ids of the runs that were carried out, where, the list)."""
    listed, place, carried = tmp_path / "list.yaml", tmp_path / "reference", []
    real = run.execute
    monkeypatch.setattr(run, "execute", lambda one: carried.append(one.id) or real(one))
    tiny = f"model.path={tiny_folder} sampler.steps=2 images=4"
    lines = [f"-m {tiny} method=none,uce target=cat", f"compare {tiny} method=none,uce target=dog"]

    def make(lines=lines, **options):
        carried.clear()
        listed.write_text(yaml.safe_dump({"runs": lines}))
        assert reference.bring_up_to_date(**options, path=listed, place=place) == 0
        return list(carried)

    return make, place, lines


def test_what_is_there_is_not_made_again(made, capsys):
    make, place, lines = made
    assert make(dry_run=True) == [] and not list(place.glob("**/*.csv"))
    assert "0 of 2 runs are there" in capsys.readouterr().out
    first = make()
    assert [name.split("-")[0] for name in first][:2] == ["none", "uce"]
    assert (place / "leaderboard.html").is_file() and len(list((place / "comparisons").glob("*.csv"))) == 1
    assert make() == []
    said = capsys.readouterr().out
    assert "2 of 2 runs are there" in said and "left over" not in said
    for path in (place / "runs").glob("*"):  # as in a clone: the table alone
        path.unlink()
    assert make() == []
    assert set(make(sheets=True)) == set(first[:2]) and all((place / "runs" / f"{name}.webp").is_file() for name in first[:2])


def test_what_is_asked_for_no_more_leaves_the_table_when_it_is_told_to(made, capsys):
    make, place, lines = made
    first = make(lines=lines[:1])
    for path in (place / "runs").glob("*"):
        path.unlink()
    fewer = [lines[0].replace("method=none,uce", "method=uce")]
    assert make(lines=fewer) == [] and set(row_table.read_runs(place)) == set(first)
    assert f"left over: {first[0]} in {place / 'rows.parquet'}" in capsys.readouterr().out
    assert make(prune=True, lines=fewer) == [] and set(row_table.read_runs(place)) == {first[1]}


def test_what_failed_is_damaged_or_has_changed_is_made_again(made, capsys):
    make, place, lines = made
    first = make(lines=lines[:1])
    path = place / "runs" / f"{first[1]}.csv"
    there = rows.read(path)
    rows.write([replace(row, status="failed", value=None, low=None, high=None) for row in there[:1]], path)
    assert make(lines=lines[:1]) == [first[1]]
    assert rows.read(path) == there
    path.write_bytes(path.read_bytes()[:500])
    assert make(lines=lines[:1]) == [first[1]] and rows.read(path) == there
    capsys.readouterr()
    (again,) = make(lines=[lines[0].replace("method=none,uce", "method=uce method.preserve_scale=7")])
    assert again not in first
    said = capsys.readouterr().out
    assert f"missing: {again}: about" in said  # by the run of before
    assert f"left over: {path}" in said


def test_the_list_that_ships_makes_runs_of_every_method():
    lines = reference.listed(reference.LIST)
    every = reference.every_method()
    methods = {path.stem for path in (reference.LIST.parent / "method").glob("*.yaml")}
    assert methods - set(every) == {"checkpoint", "retrained", "esd_2025"}
    for task in ("object", "explicit", "style", "celebrity"):
        assert any(f"task={task}" in line and f"method={','.join(every)}" in " ".join(line) for line in lines)
