"""Rows survive a round trip exactly, and bad files are refused by name."""

import csv
import hashlib
import io
import json
import os
import re
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erasebench import rows
from erasebench.contracts import ErasebenchError
from erasebench.report import seals
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
    assert verified(path) == said and not seals.is_sealed(said)  # somebody's word
    write([example(value=0.25)], path)  # somebody improved a number
    assert verified(path) is None
    for damage in ("", "[]", "{", '{"rows_sha256": null}', "[" * 100_000):
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


def test_a_seal_is_this_installations_and_of_what_was_sealed(tmp_path, monkeypatch):
    installation = [tmp_path / "fresh"]  # other tests may have sealed in theirs before
    monkeypatch.setattr(seals, "place", lambda: installation[0] / "seal.key")
    found = {"rows_sha256": "x", "identical": 3, "packages": {"torch": "2"}}
    assert not seals.is_sealed(found | {"seal": "0" * 64}) and not seals.place().exists()  # reading makes no secret
    made = seals.sealed(found)
    assert seals.is_sealed(made) and seals.is_sealed(json.loads(json.dumps(made)))
    assert seals.place().stat().st_mode & 0o077 == 0
    for forged in (
        found,
        made | {"identical": 4},
        made | {"more": 1},
        made | {"seal": "é"},
        made | {"seal": None},
        None,
    ):
        assert not seals.is_sealed(forged)
    installation[0] = tmp_path / "another"
    assert not seals.is_sealed(made)
    (tmp_path / "another").write_text("no folder")
    with pytest.raises(ErasebenchError, match=r"seal\.key: verified rows cannot be sealed"):
        seals.secret()


def lines_of(*records, kind=Row):
    with tempfile.TemporaryDirectory() as folder:
        write(records, Path(folder, "a.csv"), kind)
        return Path(folder, "a.csv").read_bytes()


HEADER, LINE = lines_of(example()).splitlines(keepends=True)
DAMAGED = {
    "empty": b"",
    "blank": b"\n\n",
    "not a table": b"\x89PNG\r\n\x1a\n\x00\x00",
    "Latin-1": HEADER + LINE.replace(b"airplane", b"caf\xe9"),
    "NUL": HEADER + LINE.replace(b"airplane", b"air\x00plane"),
    "a byte order mark": b"\xef\xbb\xbf" + HEADER + LINE,
    "UTF-16": (HEADER + LINE).decode().encode("utf-16"),
    "a cell over csv's limit": HEADER + LINE.replace(b"airplane", b"x" * 200_000),
    "a quote that is not closed": HEADER + b'"' + LINE,
    "a short line": HEADER + LINE.rpartition(b",")[0] + b"\n",
    "a long line": HEADER + LINE.rstrip() + b",more\n",
    "a column twice": HEADER.rstrip() + b",value\n" + LINE.rstrip() + b",1\n",
    "a missing column": HEADER.replace(b",value", b"") + LINE,
    "columns in another order": HEADER.replace(b"run_id,status", b"status,run_id") + LINE,
    "hostile columns": b'"\x1b[31m\xe2\x80\xae\n",b\n1,2\n',
    "ten thousand columns": b",".join(b"c%d" % i for i in range(10_000)) + b"\n",
    **{f"n={odd}": lines_of(example()).replace(b",10,9,0,", b",%s,9,0," % odd.encode())
       for odd in ("ten", "1.5", "9" * 30, "9" * 5000, "nan")},
    **{f"value={odd}": HEADER + LINE.replace(b"0.30000000000000004", odd.encode())
       for odd in ("nan", "inf", "1e999", "-1e999", "x", "0x1")},
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ErasebenchError) as caught:
        read(tmp_path / "a.csv")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'a.csv'}:") and said.isprintable() and len(said) < 1000


def test_what_is_no_file_is_one_line(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    os.mkfifo(tmp_path / "pipe.csv")  # nothing is waited for
    for name in ("folder.csv", "loop.csv", "pipe.csv", "no.csv", "x" * 300, "no/folder.csv", "nul\0.csv"):
        with pytest.raises(ErasebenchError) as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


QUICK = settings(derandomize=True, deadline=None, max_examples=60)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
formulas = st.builds("".join, st.tuples(st.text("'", max_size=3), st.sampled_from("=+-@\t\r\n＝＋"), texts))


@QUICK
@given(st.lists(st.one_of(texts, formulas), min_size=3, max_size=3))
def test_every_text_comes_back_and_none_is_a_formula(given):
    target, reason, method = given
    content = lines_of(example(target=target, reason=reason, method=method))
    cells = list(csv.reader(io.StringIO(content.decode(), newline="")))[1]
    assert not any(re.match("[=+@\t\r\n＝＋－＠]|-(?![0-9])", cell) for cell in cells)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.csv").write_bytes(content)
        assert read(Path(folder, "a.csv")) == [example(target=target, reason=reason, method=method)]


@pytest.mark.parametrize("text,kept", [("-5", "-5"), ("-1.5e-3", "-1.5e-3"), ("-x", "'-x"), ("=1", "'=1"), ("'=1", "''=1"),
                                       ("'quoted'", "'quoted'"), ("a=b", "a=b"), ("", "")])  # fmt: skip
def test_a_cell_is_escaped_where_a_spreadsheet_would_carry_it_out(text, kept):
    assert rows.cell(text) == kept and rows.text_of(kept) == text


def test_what_is_not_finite_is_written_as_no_value(tmp_path):
    write([example(value=float("nan"), low=float("-inf"), p_value=float("inf"))], tmp_path / "a.csv")
    (row,) = read(tmp_path / "a.csv")
    assert (row.value, row.low, row.p_value, row.high) == (None, None, None, 0.5)


def value_or_line(folder, content, kind):
    path = Path(folder, "a.csv")
    path.write_bytes(content)
    try:
        found = read(path, kind)
    except ErasebenchError as error:
        assert str(error).startswith(f"{path}:") and str(error).isprintable() and len(str(error)) < 2000
        return
    assert all(isinstance(one, kind) for one in found)
    assert all(type(getattr(one, "n_dropped", 0)) is int and isinstance(one.metric, str) for one in found)


pieces = st.one_of(st.binary(max_size=20), st.sampled_from([b'"', b",", b"\n", b"\r", b"\0", b"nan", b"=", b"9" * 20]))


@QUICK
@given(st.one_of(st.binary(max_size=300), st.builds(bytes.__add__, st.just(HEADER), st.binary(max_size=300))))
def test_any_bytes_are_rows_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        for kind in (Row, Difference):
            value_or_line(folder, content, kind)


@QUICK
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), pieces), min_size=1, max_size=4))
def test_rows_with_anything_in_them_are_rows_or_one_line(changes):
    content = HEADER + LINE + LINE
    for where, size, piece in changes:
        at = int(where * len(content))
        content = content[:at] + piece + content[at + size :]
    with tempfile.TemporaryDirectory() as folder:
        value_or_line(folder, content, Row)


@QUICK
@given(st.one_of(st.binary(max_size=200), st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text()).map(
    lambda said: json.dumps({"rows_sha256": hashlib.sha256(HEADER + LINE).hexdigest(), **said}).encode())))  # fmt: skip
def test_anything_beside_rows_is_said_of_them_or_nothing(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(HEADER + LINE)
        path.with_suffix(".verified.json").write_bytes(content)
        assert isinstance(found := verified(path), dict | None) and not seals.is_sealed(found)
