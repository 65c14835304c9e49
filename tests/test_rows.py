"""Rows survive a round trip exactly, and bad files are refused by name."""

import csv
import hashlib
import json
import threading
from dataclasses import replace

import pandas as pd
import pytest

from erasebench.contracts import ErasebenchError
from erasebench.rows import (
    SCHEMA,
    Difference,
    Row,
    later_failure,
    read,
    read_all,
    record,
    replace_file,
    verified,
    write,
)


def example(**changes) -> Row:
    row = Row(
        schema=SCHEMA,
        run_id="r",
        status="ok",
        reason="",
        method="uce",
        method_version=1,
        params="{}",
        base="tiny",
        revision="abc",
        world="toy",
        task="object",
        task_version=1,
        n_concepts=1,
        target="airplane",
        split="target",
        attack="",
        subset=False,
        judge="clip",
        judge_version="1",
        threshold=None,
        metric="acc_e",
        group="forget",
        higher_is_better=False,
        value=0.1 + 0.2,
        low=0.1,
        high=0.5,
        ci_method="wilson",
        base_value=1.0,
        change_low=-0.9,
        change_high=-0.5,
        p_value=1e-9,
        n=10,
        n_valid=9,
        n_refused=0,
        n_dropped=0,
        published=None,
        published_source="",
        seed=0,
        sampler="ddim",
        prompts_sha256="x",
        packages="{}",
        commit="",
        dirty=None,
        device="cpu",
        batch=32,
        fit_seconds=0.0,
        sample_seconds=1e-7,
        unet_calls=5,
        peak_memory_mb=1.5,
        fit_notes="",
        artifact="",
    )
    return replace(row, **changes)


def test_round_trip_keeps_every_bit_and_every_character(tmp_path):
    hostile = '</script><script>alert("x")</script>,\n"quoted"; ü/..\\'
    rows = [example(), example(value=None, low=None, high=None, target=hostile, reason=hostile, dirty=True)]
    write(rows, tmp_path / "runs" / "a.csv")
    assert read(tmp_path / "runs" / "a.csv") == rows
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"schema": 99}, "schema 99"),
        ({"value": 0.9}, "outside its interval"),
        ({"status": "failed"}, "failed row has a value"),
        ({"status": "fine"}, "status 'fine'"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, changes, message):
    write([example(), example(**changes)], tmp_path / "a.csv")
    with pytest.raises(ErasebenchError, match=f"a.csv:3: .*{message}"):
        read(tmp_path / "a.csv")


def test_damaged_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ErasebenchError, match="not rows of schema"):
        read(tmp_path / "a.csv")
    write([example()], tmp_path / "b.csv")
    table = pd.read_csv(tmp_path / "b.csv", dtype=str, keep_default_na=False)
    table.assign(n="ten").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ErasebenchError, match="b.csv:2: column n holds 'ten'"):
        read(tmp_path / "b.csv")


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ErasebenchError, match="choose another folder with results="):
        write([example()], tmp_path / "file" / "a.csv")


def test_rows_of_an_older_schema_say_how_they_are_made_again(tmp_path):
    write([example()], tmp_path / "a.csv")
    (old,) = csv.DictReader((tmp_path / "a.csv").open())
    del old["by_concept"]
    with (tmp_path / "a.csv").open("w") as stream:
        csv.DictWriter(stream, old).writeheader()
        csv.DictWriter(stream, old).writerow(old | {"schema": "3"})
    with pytest.raises(
        ErasebenchError, match="a.csv: of schema 3, .* repeat its command, .* without making images again"
    ):
        read(tmp_path / "a.csv")


def difference(**changes) -> Difference:
    known = {
        "schema": SCHEMA,
        "task": "object",
        "world": "mini",
        "base": "mini",
        "sampler": "ddim 25 steps, guidance 4",
        "targets": "airplane",
        "first_label": "uce (seed 0)",
        "second_label": "esd (seed 0)",
        "first_runs": "a",
        "second_runs": "b",
        "metric": "acc_e",
        "split": "target",
        "group": "forget",
        "higher_is_better": False,
        "first": 0.5,
        "second": 0.1 + 0.2,
        "difference": -0.2,
        "change_low": -0.3,
        "change_high": -0.1,
        "p_value": 1e-9,
        "n": 120,
        "how": "paired bootstrap, McNemar's p",
    }
    return Difference(**known | changes)


def test_differences_are_kept_and_refused_as_rows_are(tmp_path):
    bare = difference(change_low=None, change_high=None, p_value=None, n=None, targets='a, "b"\n')
    write([difference(), bare], tmp_path / "a.csv", Difference)
    assert read(tmp_path / "a.csv", Difference) == [difference(), bare]
    for change, message in (
        ({"difference": 0.5}, "outside its interval"),
        ({"first": float("nan")}, "no number"),
        ({"schema": 3}, "schema 3, expected"),
    ):
        write([difference(**change)], tmp_path / "b.csv", Difference)
        with pytest.raises(ErasebenchError, match=f"b.csv:2: .*{message}"):
            read(tmp_path / "b.csv", Difference)
    with pytest.raises(ErasebenchError, match="not rows of schema"):
        read(tmp_path / "a.csv")


def test_whole_numbers_are_of_64_bits(tmp_path):
    write([example(n=2**63)], tmp_path / "a.csv")
    with pytest.raises(ErasebenchError, match="column n holds"):
        read(tmp_path / "a.csv")


def test_verified_is_of_these_rows_alone(tmp_path):
    path = tmp_path / "a.csv"
    write([example()], path)
    assert verified(path) is None
    said = {"rows_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "identical": 1}
    (tmp_path / "a.verified.json").write_text(json.dumps(said))
    assert verified(path) == said
    write([example(value=0.25)], path)  # somebody improved a number
    assert verified(path) is None
    for damage in ("", "[]", "{", '{"rows_sha256": null}'):
        (tmp_path / "a.verified.json").write_text(damage)
        assert verified(path) is None


OK, WORSE, LESS = (
    [example(metric="a"), example(metric="b")],
    [example(metric="a"), example(metric="b", status="failed", reason="no disk", value=None, low=None, high=None)],
    [example(metric="", status="failed", reason="no disk", value=None, low=None, high=None)],
)
SKIPPED = [replace(LESS[0], status="skipped")]


@pytest.mark.parametrize(
    "first,second,stays",
    [
        (OK, LESS, True),
        (OK, WORSE, True),
        (OK, SKIPPED, True),
        (OK, OK, False),
        (WORSE, LESS, True),
        (WORSE, WORSE, False),
        (WORSE, OK, False),
        (LESS, LESS, False),
        (LESS, WORSE, False),
        (SKIPPED, LESS, True),
        (SKIPPED, SKIPPED, False),
        (None, LESS, False),
        ("damage", LESS, True),
        ("damage", OK, False),
        (b"\xff\x00", LESS, True),
    ],
)
def test_a_failed_repeat_never_takes_the_place_of_more(first, second, stays, tmp_path):
    file = tmp_path / "r.csv"
    if isinstance(first, list):
        record(first, file)
    elif first is not None:
        file.write_bytes(first if isinstance(first, bytes) else first.encode())
    before = file.read_bytes() if first is not None else None
    where = record(second, file)
    assert read(where) == second and (where != file) == stays
    if stays:
        assert file.read_bytes() == before and later_failure(file) in ("no disk", "it measured less")
        assert list(tmp_path.glob("*.csv")) == [file]
        if isinstance(first, list):
            assert read_all(tmp_path) == first
    record(OK, file)
    assert read(file) == OK and later_failure(file) == "" and list(tmp_path.iterdir()) == [file]


def test_writers_of_one_process_id_never_tear_a_file(tmp_path, monkeypatch):
    """Two containers that share a folder may have the same number."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # whose time is no test's business
    contents, file, torn = [bytes([i]) * 200_000 for i in (65, 66)], tmp_path / "a.csv", []
    replace_file(file, contents[0])

    def work(content):
        for _ in range(20):
            replace_file(file, content)
            torn.append(file.read_bytes() not in contents)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(torn) == 40 and not any(torn) and list(tmp_path.iterdir()) == [file]
