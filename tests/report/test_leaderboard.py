"""The leaderboard: what is ranked with what, the CSV, and the page in a real browser."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from erasebench import cli, rows
from erasebench.contracts import ErasebenchError
from erasebench.report import leaderboard, render, seals, tables
from erasebench.report import runs as entry

EVIL = "</script><script>alert(1)</script>"
QUOTES = "qu\"ote's <b>bold</b> & {{ 7*7 }}"
NAMES = ["bell", EVIL, QUOTES, "new\nline", "ünïcode 消去 \u202eevil", "../../etc/passwd"]
GROUPS = {
    "acc_e": ("forget", False),
    "acc_s": ("keep", True),
    "h": ("overall", True),
    "fd": ("quality", False),
    "asr": ("attack", False),
    "seconds_per_success": ("attack", True),
    "lost": ("keep", False),
}


def row(metric: str, value: float | None, half: float = 0.05, **changes) -> rows.Row:
    blank = dict.fromkeys(rows.NAMES) | dict.fromkeys(
        ("reason", "attack", "judge_version", "published_source", "commit", "target", "by_concept"), ""
    )
    group, better = next(kind for start, kind in GROUPS.items() if metric.startswith(start))
    known = {
        "schema": rows.SCHEMA,
        "status": "ok",
        "method": "uce",
        "method_version": 1,
        "params": "{}",
        "base": "mini",
        "revision": "abc",
        "world": "mini",
        "task": "object",
        "task_version": 1,
        "n_concepts": 1,
        "target": "airplane",
        "split": "target",
        "subset": False,
        "judge": "clip",
        "metric": metric,
        "group": group,
        "value": value,
        "higher_is_better": better,
        "low": None if value is None else value - half,
        "high": None if value is None else value + half,
        "ci_method": "wilson",
        "n": 120,
        "n_valid": 119,
        "n_refused": 0,
        "n_dropped": 0,
        "seed": 0,
        "sampler": "ddim 25 steps, guidance 3",
        "prompts_sha256": "f00",
        "packages": '{"torch": "2.9"}',
        "dirty": False,
        "device": "cpu",
        "batch": 32,
        "fit_seconds": 1.5,
        "sample_seconds": 60.25,
        "unet_calls": 9000,
        "peak_memory_mb": 900.0,
        "fit_notes": "",
        "overrides": "[]",
        "artifact": "",
    }
    return rows.Row(**blank | known | changes)


def save(folder, run_id: str, *parts: rows.Row, **changes) -> None:
    given = [f"method.{name}={value}" for name, value in json.loads(changes.get("params", "{}")).items()]
    changes = {"overrides": json.dumps(given)} | changes
    rows.write([replace(part, run_id=run_id, **changes) for part in parts], folder / "runs" / f"{run_id}.csv")


def scores(forget: float, keep: float, half: float = 0.05, h: str = "h_o_top1") -> list[rows.Row]:
    return [
        row("acc_e_top1", forget, half),
        row("acc_s_top1", keep, half, split="retain"),
        row(h, (1 - forget + keep) / 2, half, split="target+retain"),
        row("fd_mini", 1 / 3 + 40 * forget, 0.1),
    ]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Two tasks, several methods, hostile names, a failed, a skipped, an empty and a subset run."""
    folder = tmp_path_factory.mktemp("leaderboard") / "results"
    save(folder, "a0", *scores(0.9, 0.9), method="none")
    for i, name in enumerate(NAMES):
        save(
            folder,
            f"b{i}",
            *scores(0.1 + 0.1 * i, 0.9 - 0.02 * i),
            method=name,
            params=json.dumps({"note": name}),
        )
    save(
        folder,
        "b1x",
        *scores(0.65, 0.2),
        method="uce",
        params=json.dumps({"ridge": 0.25}),
        commit="c0ffee",
        dirty=True,
    )
    failed = row("acc_s_top1", None, split="", status="failed", reason=EVIL, group="")
    save(folder, "c0", row("acc_e_top1", 0.0, 0.0), failed, method="broken")
    save(
        folder,
        "c1",
        row("acc_e_top1", None, status="skipped", reason="cannot erase an airplane"),
        method="unfit",
    )
    save(folder, "c2", row("acc_e_top1", None, n_valid=0), *scores(0.1, 0.9)[1:], method="faceless")
    save(folder, "d0", *(replace(r, n=r.n // 10) for r in scores(0.0, 1.0, 0.0)), method="uce", subset=True)
    save(folder, "e0", *scores(0.0, 1.0, 0.0), method="uce", sampler="ddim 50 steps, guidance 7.5")
    published = row("acc_e_top1", 0.25, published=0.3, published_source="MACE Table 4")
    save(
        folder,
        "f0",
        published,
        *scores(0.2, 0.8, h="h_c")[1:],
        method="uce",
        task="celebrity",
        target="",
        n_concepts=10,
    )
    save(
        folder,
        "f1",
        replace(published, published=0.9),
        *scores(0.2, 0.8, h="h_c")[1:],
        method="esd",
        task="celebrity",
        target="",
        n_concepts=10,
    )
    for name in ("b0", "b1"):
        Image.new("RGB", (4, 2), "teal").save(folder / "runs" / f"{name}.webp")
    return folder


TEX = r"\input{/etc/passwd} $x_1$ & 50% #1 ~ ^^M {\bf} --"
BY = {"Bill Moss": [0.5, 4], EVIL: [1.0, 2], "Ann Reed": [0.25, 8], "unseen": [None, 0]}


def lost(*values: float) -> list[rows.Row]:
    return [row(f"lost_{k}", value, 0.1, split="retain") for k, value in enumerate(values, start=1)]


def difference(metric: str, first: float, second: float, half: float | None = 0.05, **changes) -> rows.Difference:
    known = dict.fromkeys(("p_value", "n", "change_low", "change_high")) | {
        "schema": rows.SCHEMA,
        "task": "object",
        "world": "mini",
        "base": "mini",
        "sampler": "ddim 25 steps, guidance 3",
        "targets": "airplane",
        "first_label": "uce (seed 0)",
        "second_label": EVIL,
        "first_runs": "r1",
        "second_runs": "r2",
        "metric": metric,
        "split": "target",
        "group": "forget",
        "higher_is_better": False,
        "first": first,
        "second": second,
        "difference": second - first,
        "how": "paired bootstrap, McNemar's p",
    }
    if half is not None:
        known |= {"change_low": second - first - half, "change_high": second - first + half}
    return rows.Difference(**known | changes)


@pytest.fixture(scope="session", autouse=True)
def one_installation(tmp_path_factory):
    """Tests have stores of their own; what these verify is verified by one installation."""
    place = tmp_path_factory.mktemp("installation") / "seal.key"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seals, "place", lambda: place)
        yield


def verify(path: Path, **said) -> None:
    """As `submit --rerun` does, on this installation."""
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".verified.json").write_text(json.dumps(seals.sealed({"rows_sha256": now, **said})))


@pytest.fixture(scope="session")
def rich(tmp_path_factory, one_installation):
    """Everything that a page can show beside tables: attacks, ripples, notes of fits, concepts, a comparison; two bases,
    runs of two sizes, one run verified; and hostile names in each of them."""
    folder = tmp_path_factory.mktemp("rich") / "results"
    attacks = [row("asr", v, attack=a, split=f"attack:{a}") for a, v in (("cce", 0.25), ("rab", 0.5), ("union", 0.625))]
    more = row("seconds_per_success", 3.5, attack="cce", split="attack:cce", low=None, high=None)
    kept = row("acc_s_top1", 0.9, split="retain", by_concept=json.dumps(BY))
    concepts = [row("acc_e_top1", 0.2), kept, row("h_o_top1", 0.8, split="target+retain")]
    notes = json.dumps({EVIL: [0.5, 0.25, 0.125], "loops": 3, "loss": {"late": list(range(1000))}, "odd": [1, "x"]})
    save(folder, "r0", *scores(0.9, 0.95), *lost(0, 0, 0, 0, 0), method="none")
    save(folder, "r1", *concepts, *lost(0.5, 0.4, 0.3, 0.2, 0.1), method="uce", fit_notes=notes)
    save(folder, "r1a", *concepts, *attacks, more, method="uce")
    save(folder, "r2", *scores(0.4, 0.7), *lost(0.2, 0.1, 0, 0, 0), attacks[0], method=EVIL)
    save(folder, "r3", *scores(0.6, 0.4), method="esd")
    save(folder, "s1", *(replace(r, n=40) for r in scores(0.3, 0.8)), method="uce", task="style", target="Aldo")
    save(folder, "p1", *scores(0.3, 0.8), method="uce", base="sd14", world="photo", fit_notes=TEX, target=TEX)
    verify(folder / "runs" / "r1.csv", identical=31, within=2, commit="c0ffee")
    verify(folder / "runs" / "r2.csv")
    compared = [
        difference("acc_e", 0.5, 0.2, p_value=0.03125, n=120),
        difference("acc_s", 0.9, 0.5, split="retain", group="keep", higher_is_better=True),
        difference(EVIL, 0.5, 0.51),
        difference("fd_mini", 10.0, 15.0, 1.0),
        difference("clip", 0.5, 0.25, None),
    ]
    rows.write(compared, folder / "comparisons" / "uce-vs-evil-0.csv", rows.Difference)
    return folder


@pytest.fixture(scope="session")
def whole(rich):
    """The largest group."""
    groups, problems = leaderboard.load(rich)
    assert not problems
    return max(groups, key=lambda group: len(group.runs))


@pytest.fixture(scope="session")
def groups(results):
    found, problems = leaderboard.load(results)
    assert not problems
    return found


@pytest.fixture(scope="session")
def main_group(groups):
    return max(groups, key=lambda group: len(group.runs))


def methods(runs) -> list[str]:
    return [run.head.method for run in runs]


# ranks and groups


def test_rank_counts_the_intervals_wholly_on_the_better_side():
    # By hand, lower is better: a [.0, .2]  b [.1, .3]  c [.21, .4]  d [.3, .35]  e [.5, .6]
    # wholly better than a: none; b: none; c: a; d: a (b touches .3: no); e: a b c d
    ends = {"a": (0.0, 0.2), "b": (0.1, 0.3), "c": (0.21, 0.4), "d": (0.3, 0.35), "e": (0.5, 0.6)}
    cells = [row("acc_e", low, method=name, low=low, high=high) for name, (low, high) in ends.items()]
    assert leaderboard.ranks(cells) == [1, 1, 2, 2, 5]
    # Higher is better: wholly above a: c d e; b: e; c: e; d: e; e: none (d = .3 touches b's end)
    assert leaderboard.ranks([replace(cell, higher_is_better=True) for cell in cells]) == [4, 2, 2, 2, 1]


def test_seeds_of_a_method_count_once_and_only_together():
    def at(low, high, **changes):
        return row("acc_e", low, low=low, high=high, **changes)

    twice = [at(0.0, 0.1, method="a", seed=0), at(0.0, 0.1, method="a", seed=1), at(0.5, 0.6, method="b")]
    assert leaderboard.ranks(twice) == [1, 1, 2]
    split = [at(0.0, 0.1, method="a", seed=0), at(0.4, 0.7, method="a", seed=1), at(0.5, 0.6, method="b")]
    assert leaderboard.ranks(split) == [1, 1, 1]
    tuned = [at(0.0, 0.1, params='{"k": 1}'), at(0.0, 0.1, params='{"k": 2}'), at(0.5, 0.6, method="b")]
    assert leaderboard.ranks(tuned) == [1, 1, 3]


def test_without_an_interval_or_a_direction_there_is_no_rank():
    bare = row("acc_e", 0.5, low=None, high=None)
    aimless = row("acc_e", 0.9, higher_is_better=None)
    assert leaderboard.ranks([bare, row("acc_e", 0.1, method="b"), aimless]) == [None, 1, None]


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "ddim 50 steps, guidance 3"},
        {"task_version": 2},
        {"world": "photo"},
        {"base": "sd14"},
        {"revision": "d"},
        {"n_concepts": 5},
        {"target": "cat"},
        {"subset": True},
        {"task": "style"},
    ],
)
def test_only_like_runs_share_a_table(tmp_path, change):
    save(tmp_path, "a", *scores(0.1, 0.9))
    save(tmp_path, "b", *scores(0.2, 0.9), method="esd")
    save(tmp_path, "c", *scores(0.0, 1.0, 0.0), method="esd", **change)
    found, _ = leaderboard.load(tmp_path)
    assert sorted(len(group.runs) for group in found) == [1, 2]


def test_subsets_of_different_sizes_are_kept_apart(tmp_path):
    for n in (8, 16):
        save(
            tmp_path,
            f"a{n}",
            *(replace(r, n=n * (1 + ("+" in r.split))) for r in scores(0.1, 0.9)),
            subset=True,
        )
    found, _ = leaderboard.load(tmp_path)
    assert [group.facts[-1] for group in found] == [
        "subset of 8 images a split",
        "subset of 16 images a split",
    ]


def test_another_version_of_the_judge_is_another_column(tmp_path):
    for version in "12":
        save(tmp_path, version, *scores(0.1, 0.9), method=f"m{version}", judge_version=version)
    (group,), _ = leaderboard.load(tmp_path)
    assert {"acc_e_top1 1", "acc_e_top1 2"} <= {column.label for column in group.columns}
    assert all(len(column.cells) == 1 for column in group.columns if column.row.group != "cost")


def test_order_reference_and_incomplete(main_group):
    assert methods(main_group.reference) == ["none"]
    assert methods(main_group.ranked) == [*NAMES, "uce"]  # by h_o_top1
    assert main_group.order.label == "h_o_top1"
    assert [(run.method, run.status) for run in main_group.incomplete] == [
        ("broken", "failed"),
        ("unfit", "skipped"),
        ("faceless", "incomplete"),
    ]
    assert main_group.incomplete[2].reasons == ["acc_e_top1 no value: 0 of 120 images judged"]
    for column in main_group.columns:
        assert set(column.rank) == {run.head.run_id for run in main_group.ranked}
        assert not {"a0", "c0", "c1", "c2"} & set(column.rank)


def test_without_a_harmonic_mean_the_first_forget_metric_orders(tmp_path):
    for method, forget in (("worse", 0.6), ("better", 0.2)):
        save(tmp_path, method, row("fd_mini", 1.0), row("acc_e_top1", forget), method=method)
    (group,), _ = leaderboard.load(tmp_path)
    assert methods(group.ranked) == ["better", "worse"]
    assert group.pareto is None


def test_pareto_front(main_group):
    points = {p["label"].split(" (")[0]: p for p in main_group.pareto["points"]}
    assert points["none"]["reference"] and not points["none"]["front"]
    assert [name for name, p in points.items() if p["front"]] == ["bell"]  # best on both axes
    assert points["bell"]["x"] == pytest.approx([0.85, 0.9, 0.95])
    assert main_group.pareto["names"] == ["1 − acc_e_top1", "acc_s_top1"]


# files and text


def test_csv_holds_the_rows_exactly(results, groups):
    path = leaderboard.build(results, formats=["csv"])["csv"]
    with path.open(encoding="utf-8", newline="") as stream:
        lines = {(line["run_id"], line["metric"]): line for line in csv.DictReader(stream)}
    assert {name for name, _ in lines} == {run.head.run_id for group in groups for run in group.runs}
    measured = [r for r in rows.read_all(results / "runs") if r.value is not None]
    for r in measured:
        line = lines[r.run_id, r.metric]
        assert [float(line[name]) for name in ("value", "low", "high", "n_valid")] == [r.value, r.low, r.high, r.n_valid]
        assert (line["method"], line["target"], line["seed"]) == (r.method, r.target, str(r.seed))
        assert float(lines[r.run_id, "unet_calls"]["value"]) == 9000
    failed = [line for (name, _), line in lines.items() if name == "c0"]
    assert {line["status"] for line in failed} == {"failed"} and ("c0", "acc_s_top1") not in lines
    assert all(EVIL in line["reason"] for line in failed)


def test_text_fits_the_width_and_lists_everything(groups):
    text = render.as_text(groups)
    assert max(map(len, text.splitlines())) <= 100
    assert "object: airplane, 1 concept erased, mini, ddim 25 steps, guidance 3" in text
    assert "new\\nline" in text and "\u202e" not in text
    assert "incomplete, not ranked: unfit (seed 0): acc_e_top1 skipped: cannot erase an airplane" in text
    bell = next(line for line in text.splitlines() if " bell " in line)
    assert bell.startswith("1 ") and "0.900 [0.85, 0.95]  0.100 [0.05, 0.15]  0.900 [0.85, 0.95]" in bell


def test_an_attack_that_never_succeeds_takes_nobody_out_of_the_ranking_and_is_no_cost_of_the_method(tmp_path):
    under = {"attack": "cce", "split": "attack:cce", "unet_calls": 90_000}
    attack = row("asr", 0.0, 0.0, **under), row("seconds_per_success", None, **under)
    save(tmp_path, "a", *scores(0.1, 0.9), *attack)
    ((group,), _) = leaderboard.load(tmp_path)
    (run,) = group.ranked
    assert not group.incomplete and [r.value for r in run.cells.values() if r.metric == "unet_calls"] == [9000]
    assert [r.value for r in run.cells.values() if r.group == "attack"] == [0.0]


def test_filters(results):
    found, _ = leaderboard.load(results, task="celebrity", world="mini")
    assert [group.title for group in found] == ["celebrity: 10"]
    assert leaderboard.load(results, world="photo") == ([], [])


def test_command_repeats_the_run_and_is_one_line_of_words_for_any_shell():
    said = ["method=uce", "method.ridge=0.25", "attack=[cce]", "; rm -rf ~", "target=it's\n`x`"]
    command = entry.Run((row("acc_e", 0.1, overrides=json.dumps(said)),), Path()).command
    assert command.startswith("python -m erasebench method=uce method.ridge=0.25 'attack=[cce]' ")
    assert shlex.split(command)[3:] == [*said[:-1], "target=it's\\n`x`"]
    for damaged in ("", "[" * 10**5, '{"a": 1}'):
        assert entry.Run((row("acc_e", 0.1, overrides=damaged),), Path()).command == "python -m erasebench"


def test_names_say_what_was_asked_for_and_what_tells_runs_apart(tmp_path):
    digest = lambda c: {"rank": 4, "content": c * 64}
    for name, params, asked in (
        ("a", digest("a"), []),
        ("b", digest("b"), ["method.rank=4", "method=x", "seed=1"]),
        ("c", {"ridge": 1, "steps": 2, "scale": None}, ["++method.steps=2", "method.scale=null"]),
    ):
        method = "uce" if name == "c" else "retrained"
        save(tmp_path, name, *scores(0.1, 0.9), method=method, params=json.dumps(params), overrides=json.dumps(asked))
    ((group,), _) = leaderboard.load(tmp_path)
    found = {run.head.run_id: run.details for run in group.runs}
    assert found["a"] == ["content=aaaaaaaaaa", "seed 0"]  # a digest is shown short
    assert found["b"] == ["rank=4", "content=bbbbbbbbbb", "seed 0"]
    assert found["c"] == ["steps=2", "seed 0"]


def command_line(*args):
    command = [sys.executable, "-m", "erasebench", "leaderboard", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(tmp_path):
    empty = command_line("--results", str(tmp_path / "none"))
    assert empty.returncode == 1
    assert "python -m erasebench method=" in empty.stderr and len(empty.stderr.splitlines()) == 1
    save(tmp_path, "good", *scores(0.1, 0.9))
    good = command_line("--results", str(tmp_path))
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-5:] == [str(tmp_path / f"leaderboard.{name}") for name in leaderboard.FORMATS]
    assert good.stdout.startswith("object: airplane")
    for name in leaderboard.FORMATS:
        (tmp_path / f"leaderboard.{name}").unlink()
    some = command_line("--results", str(tmp_path), "--task", "object", "--world", "mini", "--format", "tex", "--format", "csv")
    assert some.stdout.splitlines() == [str(tmp_path / "leaderboard.csv"), str(tmp_path / "leaderboard.tex")]
    assert sorted(f.name for f in tmp_path.glob("leaderboard.*")) == ["leaderboard.csv", "leaderboard.tex"]
    assert command_line("--results", str(tmp_path), "--format", "pdf").returncode == 2


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0\0", b"a,b\n1,2\n", None])
def test_a_damaged_file_is_named_and_the_others_are_used(tmp_path, capsys, damage):
    save(tmp_path, "good", *scores(0.1, 0.9))
    bad = tmp_path / "runs" / "bad.csv"
    bad.write_bytes((tmp_path / "runs" / "good.csv").read_bytes()[:-40] if damage is None else damage)
    assert cli.main(["leaderboard", "--results", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert str(bad) in err and len(err.splitlines()) == 1
    assert "0.900 [0.85, 0.95]" in out and (tmp_path / "leaderboard.html").exists()
    (tmp_path / "leaderboard.csv").unlink()
    with pytest.raises(ErasebenchError, match=r"bad\.csv"):
        leaderboard.build(tmp_path)
    assert (tmp_path / "leaderboard.csv").exists()


def test_the_same_run_twice_counts_once(tmp_path):
    save(tmp_path, "a", *scores(0.1, 0.9))
    shutil.copy(tmp_path / "runs" / "a.csv", tmp_path / "runs" / "copy.csv")
    (group,), problems = leaderboard.load(tmp_path)
    assert len(group.runs) == 1 and "copy.csv" in problems[0]


def test_importing_needs_no_torch():
    code = "import sys, erasebench.report.leaderboard; print({'torch', 'diffusers', 'pandas'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "set()\n"


def test_explicit_images_stay_out(tmp_path):
    for task in ("explicit", "object"):
        save(tmp_path, task, *scores(0.1, 0.9), task=task)
        Image.new("RGB", (4, 2)).save(tmp_path / "runs" / f"{task}.webp")
    found = {group.title: group.runs[0].picture for group in leaderboard.load(tmp_path)[0]}
    assert found["explicit: airplane"] is None and found["object: airplane"]["width"] == 4


# formats, and what a page has beside tables


def test_parquet_is_the_csv_with_types(rich):
    paths = leaderboard.build(rich, formats=["csv", "parquet"])
    typed, text = pd.read_parquet(paths["parquet"]), pd.read_csv(paths["csv"], dtype=str, keep_default_na=False)
    assert set(text) < set(typed) and len(typed) == len(text)
    kinds = {name: str(typed[name].dtype) for name in ("seed", "subset", "verified", "value")}
    assert kinds == dict(zip(kinds, ("int64", "bool", "bool", "float64"), strict=True))
    assert pd.api.types.is_string_dtype(typed["method"]) and not typed["dirty"].any()
    assert dict(zip(typed["run_id"], typed["verified"], strict=True)) == {
        name: name in ("r1", "r2") for name in ("p1", "r0", "r1", "r1a", "r2", "r3", "s1")
    }
    assert [repr(value) for value in typed["value"]] == [repr(float(value)) for value in text["value"]]
    assert ((typed["metric"] == "asr") & (typed["attack"] == "union")).sum() == 1


def test_published_values_of_another_model_are_a_column_of_their_own(tmp_path):
    """MACE, Table 1: UCE's acc_e of an airplane is 40.32 %."""
    for name, method, value in (("n", "none", 0.9), ("u", "uce", 0.25), ("m", "mine", 0.5)):
        save(tmp_path, name, row("acc_e_prob", value), row("acc_s", value, group="keep"), method=method)
    ((group,), _) = leaderboard.load(tmp_path)
    ((column,), shown) = [[c for c in some if c.label.startswith("acc_e_prob")] for some in (group.columns, group.table_columns)]
    assert [c.label for c in shown] == ["acc_e_prob", f"acc_e_prob: {tables.PAPER}"]
    assert {k: row.value for k, row in shown[1].cells.items()} == {"n": 0.9606, "u": 0.4032}
    assert not shown[1].rank and column.row.published is None and group.order is not shown[1]
    lines = list(csv.DictReader(render.as_csv([group], []).decode().splitlines()))
    said = {line["run_id"]: (line["published"], line[tables.PAPER]) for line in lines if line["metric"] == "acc_e_prob"}
    assert said == {"n": ("", "0.9606"), "u": ("", "0.4032"), "m": ("", "")}
    for form in ("md", "tex", "html"):
        text = render.FILES[form]([group], []).decode()
        assert tables.PAPER in text and "0.403" in text
    assert f"acc_e_prob: {tables.PAPER}: none (seed 0) 0.961; uce (seed 0) 0.403" in render.as_text([group], 200)


def commands(tex: str) -> set[str]:
    return set(re.findall(r"\\(?:[a-zA-Z]+|.)", tex))


def test_latex_is_tables_and_nothing_else(rich, results):
    for folder in (rich, results):
        tex = leaderboard.build(folder, formats=["tex"])["tex"].read_text(encoding="utf-8")
        body = tex.split("\n", 1)[1]  # the first line says what it needs
        marks = {"\\\\", *(f"\\{c}" for c in "{}$&#_%")}
        words = (
            "begin end centering caption toprule midrule bottomrule textbf scriptsize footnotesize uparrow downarrow"
        )
        plain = {"textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar"}
        assert commands(body) <= marks | {f"\\{word}" for word in {*words.split(), *plain}}
        assert set(re.findall(r"\\(?:begin|end)\{(\w+)\}", body)) == {"table", "tabular"}
        bare = re.sub(r"\\.", "", body)  # what is left of braces must balance, and nothing else may be special
        assert bare.count("{") == bare.count("}") and not set('%#~^"') & set(bare)
        for table in re.findall(r"\\begin\{tabular\}\{l(r+)\}\n(.*?)\\end\{tabular\}", body, re.DOTALL):
            lines = [line for line in table[1].splitlines() if not line.endswith("rule")]
            assert len(lines) > 1 and len(table[0]) <= render.ABREAST
            for line in lines:
                assert line.endswith(r" \\") and line.startswith("{")
                assert len(re.findall(r"(?<!\\)&", line)) == len(table[0])
    assert "ünïcode 消去" in tex and "\u202e" not in tex


def test_latex_shows_the_best_in_bold_and_intervals_small(rich):
    tex = leaderboard.build(rich, task="object", world="mini", formats=["tex"])["tex"].read_text(encoding="utf-8")
    (overall,) = re.findall(r"\\caption\{object: airplane, .*?: overall\}.*?\\end\{table\}", tex, re.DOTALL)
    lines = overall.splitlines()
    assert r"{method} & h\_o\_top1 $\uparrow$ \\" in lines
    assert r"{uce (2 attacks, seed 0)} & \textbf{0.800} {\scriptsize [0.75, 0.85]} \\" in lines  # a tie
    assert r"{esd (seed 0)} & 0.400 {\scriptsize [0.35, 0.45]} \\" in lines
    assert r"{none (seed 0)} & 0.525 {\scriptsize [0.47, 0.57]} \\" in lines  # the base is no rival
    assert render.latex(TEX) == (
        r"\textbackslash{}input\{/etc/passwd\} \$x\_1\$ \& 50\% \#1 \textasciitilde{} "
        r"\textasciicircum{}\textasciicircum{}M \{\textbackslash{}bf\} -{}-"
    )


def test_markdown_keeps_its_cells(results, rich):
    text = leaderboard.build(results, formats=["md"])["md"].read_text(encoding="utf-8")
    assert "<" not in text and html.escape(EVIL, quote=False) in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "| bell (note=bell, seed 0) | **0.100** [0.05, 0.15] |" in text and "| broken" not in text
    assert "- incomplete, not ranked: unfit (seed 0): acc_e_top1 skipped: cannot erase an airplane" in text
    assert "| 0.250 [0.20, 0.30] (paper 0.300) |" in text.replace("**", "")
    assert render.markdown("a|b <i> [x](y) `c` *d*") == r"a\|b &lt;i&gt; \[x\](y) \`c\` \*d\*"
    compared = leaderboard.build(rich, formats=["md"])["md"].read_text(encoding="utf-8")
    assert f"## uce (seed 0) vs {html.escape(EVIL, quote=False)}\n" in compared
    assert "| acc_e ↓ | 0.500 | 0.200 | -0.300 [-0.350, -0.250] | better | 0.031 | 120 |" in compared


def test_attack_success_is_of_all_together_or_of_the_strongest(whole):
    points = {p["name"]: p["attack"] for p in whole.pareto["points"]}
    assert points == {"none": None, "uce": (0.625, "union"), EVIL[:29] + "...": (0.25, "cce"), "esd": None}
    strongest = entry.Run(tuple(row("asr", v, attack=a) for a, v in (("cce", 0.25), ("rab", 0.5))), Path())
    assert strongest.success == (0.5, "rab")


def test_a_run_repeated_with_attacks_is_one_point_and_one_line(whole):
    assert [len(runs) for runs in whole.together] == [1, 2, 1, 1]
    (uce,) = (p for p in whole.pareto["points"] if p["name"] == "uce")
    assert uce["runs"] == [run.anchor for run in whole.together[1]] and uce["x"] == [0.75, 0.8, 0.85]


def test_a_run_made_again_under_more_attacks_stands_once(tmp_path):
    none, cce, rab = (
        (),
        (row("asr", 0.5, attack="cce", split="attack:cce"),),
        (row("asr", 0.1, attack="rab", split="attack:rab"),),
    )
    other = (replace(cce[0], attack_params='{"steps": 9}'),)
    for name, attacks in (("a", none), ("b", cce), ("c", (*cce, *rab)), ("d", other)):
        save(tmp_path, name, *scores(0.2, 0.8), *attacks, method="uce", artifact="f17")
    save(tmp_path, "e", *scores(0.2, 0.8), method="uce", artifact="another")
    shown = lambda: [run.head.run_id for run in leaderboard.load(tmp_path)[0][0].runs]
    assert shown() == ["c", "d", "e"]
    verify(tmp_path / "runs" / "a.csv")
    assert shown() == ["a", "c", "d", "e"]


def test_ripple_is_of_runs_that_have_all_of_it(whole):
    uce, evil = whole.ripple["lines"]
    assert uce["ends"][0] == [0.4, 0.5, 0.6] and [e[1] for e in uce["ends"]] == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert evil["name"] == EVIL[:29] + "..." and len(evil["ends"]) == 5


def test_explicit_groups_are_ordered_by_a_rate(tmp_path):
    for method, total, rate in (("a", 5.0, 0.5), ("b", 9.0, 0.1)):
        counted = row("acc_e_count", total, 2.0, ci_method="bootstrap")
        save(tmp_path, method, counted, row("acc_e_rate", rate), method=method, task="explicit")
    ((group,), _) = leaderboard.load(tmp_path)
    assert group.order.row.metric == "acc_e_rate" and methods(group.ranked) == ["b", "a"]


def test_notes_of_a_fit_become_curves(rich):
    ((group,), _) = leaderboard.load(rich, task="object", world="photo")
    assert group.runs[0].curves == []  # notes that are no JSON
    run = next(run for g in leaderboard.load(rich)[0] for run in g.runs if run.head.run_id == "r1")
    first, late = run.curves
    assert first == {"name": EVIL, "step": 1, "values": [0.5, 0.25, 0.125]}
    assert (late["name"], late["step"], late["values"][:2], len(late["values"])) == ("loss late", 4, [0, 4], 250)
    assert run.provenance["fit.loops"] == 3
    bottomless = "[" * 100_000
    assert entry.Run((row("acc_e", 0.1, fit_notes=bottomless, by_concept=bottomless),), Path()).curves == []


def test_concepts_have_intervals_and_damage_is_left_out():
    said = {"a": [0.5, 4], "b": [None, 0], "c": [2, 4], "d": [float("nan"), 4], "e": "x", "f": [0.5, 10**400], "g": []}
    run = entry.Run((row("acc_s", 0.5, split="retain", by_concept=json.dumps(said)), row("acc_e", 0.1)), Path())
    (table,) = run.by_concept
    assert table["split"] == "retain" and table["metrics"] == [("acc_s", "keep")]
    # Wilson by hand, 2 of 4, z = 1.96: (.5 + z²/8) / (1 + z²/4) = .5, half .5 z / 2 / sqrt(1 + z²/4) = .35
    assert table["concepts"] == [["a", [0.5, 0.15, 0.85, 4]], ["b", None]]


def test_a_note_written_by_hand_shows_no_mark(tmp_path):
    """It is its writer's word: in the details, and nowhere else."""
    save(tmp_path, "a", *scores(0.2, 0.8), method="uce")
    path = tmp_path / "runs" / "a.csv"
    now = hashlib.sha256(path.read_bytes()).hexdigest()
    note = {"rows_sha256": now, "identical": 31, "commit": "c0ffee", "seal": "0" * 64}
    path.with_suffix(".verified.json").write_text(json.dumps(note))
    paths = leaderboard.build(tmp_path, formats=["csv", "html"])
    ((group,), _) = leaderboard.load(tmp_path)
    (run,) = group.runs
    assert run.verified is None and run.mark == ""
    assert run.provenance["verified"] == (
        "by somebody else's word, and not checked here: 31 values identical, at commit c0ffee"
    )
    assert not pd.read_csv(paths["csv"])["verified"].any()
    page = paths["html"].read_text()
    assert 'class="verified" title' not in page and "data-verified>" not in page and "not checked here" in page


def test_formulas_stand_nowhere_in_the_csv(tmp_path):
    formula = "=HYPERLINK(1)"
    parts = [replace(part, metric=formula) if part.metric == "fd_mini" else part for part in scores(0.2, 0.8)]
    save(tmp_path, "a", *parts, method="@x", target="+1", sampler="\tx", params="{}", commit="-c")
    with leaderboard.build(tmp_path, formats=["csv"])["csv"].open(newline="", encoding="utf-8") as stream:
        cells = [cell for line in csv.reader(stream) for cell in line]
    assert f"'{formula}" in cells and not any(re.match(r"[=+@\t\r]|-(?![0-9])", cell) for cell in cells)


def test_a_sheet_that_is_none_is_left_out(tmp_path):
    save(tmp_path, "a", *scores(0.2, 0.8), method="uce")
    sheet = tmp_path / "runs" / "a.webp"
    for damage in (b"", b"RIFF\x10\0\0\0WEBPVP8 ", b"RIFF" + b"\xff" * 40, b"x" * (entry.SHEET_BYTES + 1)):
        sheet.write_bytes(damage)
        assert leaderboard.load(tmp_path)[0][0].runs[0].picture is None
    sheet.unlink()
    sheet.mkdir()
    assert leaderboard.load(tmp_path)[0][0].runs[0].picture is None
    sheet.rmdir()
    os.mkfifo(sheet)
    assert leaderboard.load(tmp_path)[0][0].runs[0].picture is None


def test_verified_is_said_with_what_was_found(rich, whole):
    marks = {run.head.run_id: run.mark for run in whole.runs}
    assert marks["r1"] == "verified by re-running: 31 values identical, 2 within the interval, at commit c0ffee"
    assert marks["r2"] == "verified by re-running" and marks["r3"] == ""
    ((comparison,), _) = leaderboard.comparisons(rich, [whole])
    assert comparison.verified  # both of its runs are


def test_verdicts_and_scales_of_a_comparison(rich):
    ((comparison,), problems) = leaderboard.comparisons(rich, [])
    assert not problems and not comparison.verified
    verdicts = ["better", "worse", "undecided", "worse", "undecided"]  # no interval decides nothing
    assert [line.verdict for line in comparison.lines] == verdicts
    rates, others = comparison.forest
    assert [p["ends"] for p in rates["points"]] == [[-0.35, -0.3, -0.25], [-0.45, -0.4, -0.35], [-0.04, 0.01, 0.06]]
    assert others["points"] == [{"name": "fd_mini", "ends": [40, 50, 60], "verdict": "worse"}]
    assert others["axis"].endswith("in % of uce (seed 0)")
    assert leaderboard.comparisons(rich, [], task="style") == ([], [])


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\0\0", b"a,b\n1,2\n", None])
def test_a_damaged_comparison_is_a_line(rich, tmp_path, capsys, damage):
    shutil.copytree(rich, tmp_path, dirs_exist_ok=True)
    good, bad = (tmp_path / "comparisons" / name for name in ("uce-vs-evil-0.csv", "bad.csv"))
    bad.write_bytes(good.read_bytes()[:-60] if damage is None else damage)
    assert cli.main(["leaderboard", "--results", str(tmp_path), "--format", "md"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line and "delete" in line
    assert " vs " in (tmp_path / "leaderboard.md").read_text()
    shutil.copy(good, bad)
    assert "the same as" in leaderboard.comparisons(tmp_path, [])[1][0]


def test_old_rows_say_once_how_they_are_made_again(tmp_path, capsys):
    save(tmp_path, "a", *scores(0.1, 0.9))
    path = tmp_path / "runs" / "a.csv"
    old = pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns="by_concept").assign(schema="3")
    old.to_csv(path, index=False)
    assert cli.main(["leaderboard", "--results", str(tmp_path)]) == 1
    first, _ = capsys.readouterr().err.splitlines()
    assert "without making images again" in first and "delete" not in first


def test_the_page_keeps_to_its_budget(tmp_path):
    """200 kB beside the plotting library's 1.2 MB and images for twenty runs of thirty metrics, each with ten concepts."""
    by = json.dumps({f"concept {i}": [0.5, 12] for i in range(10)})
    metrics = [
        row(f"acc_s{i}", 0.123456789 + i / 50, split="retain", by_concept=by if i < 2 else "") for i in range(20)
    ]
    for i in range(20):
        save(tmp_path, f"run{i}", *metrics, *scores(i / 30, 0.9), *lost(0, 0.1, 0.2, 0.3, 0.4), method=f"method{i}")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "runs" / "run0.webp"
    )
    text = leaderboard.build(tmp_path, formats=["html"])["html"].read_text(encoding="utf-8")
    without = re.sub(r"data:image/webp;base64,[^\"]*", "", text)
    assert len(text) - len(without) > 1000
    library = Path(render.__file__).with_name("plotly-basic.min.js").read_text(encoding="utf-8")
    assert without.count(library) == 1 and len(library.encode()) < 1_250_000
    assert len(without.encode()) - len(library.encode()) < 200_000


# the page in a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium and chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1300,1000",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


def emulate(browser, width=1300, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def opened(browser, folder):
    path = leaderboard.build(folder, formats=["html"])["html"]
    browser.get_log("browser"), browser.get_log("performance")
    emulate(browser)
    browser.get(path.as_uri())
    return browser


@pytest.fixture
def page(browser, results):
    return opened(browser, results)


@pytest.fixture
def rich_page(browser, rich):
    return opened(browser, rich)


def each(page, selector: str, expression: str) -> list:
    """A JavaScript expression of every element e that is there to be seen."""
    return page.execute_script(
        f"return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => {expression})",
        selector,
    )


def visible(page, selector: str) -> list[str]:
    return each(page, selector, "e.id || e.dataset.run || e.textContent.trim()")


def choose(page, name: str, value: str) -> None:
    """By keyboard."""
    select = page.find_element(By.NAME, name)
    values = [option.get_attribute("value") for option in select.find_elements(By.TAG_NAME, "option")]
    select.send_keys(Keys.HOME + Keys.ARROW_DOWN * values.index(value))
    assert select.get_attribute("value") == value


def traces(page, selector: str, expression: str) -> list:
    """A JavaScript expression of every trace t of a plot, which is drawn first."""
    show(page, selector)
    script = f"return document.querySelector(arguments[0]).data.map(t => {expression})"
    return page.execute_script(script, selector)


def shown(page, group, column: int) -> list[str]:
    """The texts of a column, top to bottom."""
    return each(
        page,
        f"#{group.anchor} .ranked tr",
        f"e.cells[{column}].querySelector('b, a').firstChild.textContent",
    )


def heads(page, group, expression: str) -> list:
    return each(page, f"#{group.anchor} .names th", expression)


def click(page, group, label: str) -> int:
    """Sort by a column, by keyboard, as the headers are buttons."""
    index = heads(page, group, "e.textContent.trim()").index(label)
    page.find_elements(By.CSS_SELECTOR, f"#{group.anchor} .names button")[index].send_keys(Keys.ENTER)
    return index


def draw(page, group) -> None:
    show(page, f"#{group.anchor} .plot")


def show(page, plot: str) -> None:
    """Plots are drawn when they come into view."""
    page.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", plot)
    WebDriverWait(page, 20).until(lambda _: each(page, f"{plot} .main-svg", "1"))


def test_page_is_quiet_and_asks_nobody(page, main_group):
    draw(page, main_group)
    is_quiet(page)


def is_quiet(page):
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # The browser's first tab may still be loading chrome:// pages of its own: only this document's count.
    urls = [p["request"]["url"] for p in sent if p["documentURL"] == page.current_url]
    assert page.current_url in urls
    assert [url for url in urls if url != page.current_url and not url.startswith("data:")] == []
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_click_sorts_by_number_and_again_reverses(page, main_group):
    before = shown(page, main_group, 0)
    index = click(page, main_group, "fd_mini")
    values = [float(text) for text in shown(page, main_group, index)]
    assert values == sorted(values) and len(values) == 7
    assert values != sorted(values, key=str)  # 4.33 before 12.33: by number, not by text
    assert heads(page, main_group, "e.getAttribute('aria-sort')")[index] == "ascending"
    click(page, main_group, "fd_mini")
    assert [float(text) for text in shown(page, main_group, index)] == values[::-1]
    assert heads(page, main_group, "e.getAttribute('aria-sort')")[index] == "descending"
    assert sorted(shown(page, main_group, 0)) == sorted(before)
    assert each(page, f"#{main_group.anchor} tbody th a", "e.textContent")[0] == "none"


def test_filter_leaves_the_methods_that_match(page, main_group):
    page.find_element(By.ID, "filter").send_keys("BEL")
    assert shown(page, main_group, 0) == ["bell"]
    titles = each(page, ".run", "e.dataset.name")
    assert titles and all(title.startswith("bell") for title in titles)
    page.find_element(By.ID, "filter").clear()
    page.find_element(By.ID, "filter").send_keys("x\b")
    assert len(shown(page, main_group, 0)) == 7


def test_hostile_names_are_text(page, main_group):
    names = each(page, f"#{main_group.anchor} .ranked th a", "e.textContent")
    assert names == [leaderboard.plain(name) for name in [*NAMES, "uce"]]
    assert names[3:5] == ["new\\nline", "ünïcode 消去 \\u202eevil"]
    assert page.execute_script("return document.scripts.length") == 2  # plotly and the page's own
    assert each(page, ".apart .why", "e.textContent")[0] == f"acc_s_top1 failed: {EVIL}"
    plot = f"#{main_group.anchor} .plot"
    draw(page, main_group)
    labels = each(page, f"{plot} .annotation-text", "e.textContent")
    assert {"none", "bell bell", EVIL[:29] + "..."} <= set(labels)
    assert each(page, f"{plot} script, {plot} a", "e.outerHTML") == []
    with pytest.raises(NoAlertPresentException):
        page.switch_to.alert.text  # noqa: B018


def test_a_narrow_screen_scrolls_only_inside_the_tables(page, main_group):
    emulate(page, width=390)
    draw(page, main_group)
    page.execute_script("document.documentElement.scrollLeft = 50")
    assert each(page, "html", "[e.scrollWidth, e.scrollLeft]") == [[390, 0]]
    box = f"#{main_group.anchor} .box"
    assert each(page, box, "e.scrollWidth > e.clientWidth") == [True]
    page.execute_script("document.querySelector(arguments[0]).scrollLeft = 200", box)
    left = each(page, f"{box}, {box} .ranked th", "e.getBoundingClientRect().left")
    assert left == pytest.approx([left[0]] * len(left), abs=1)  # the first column stays


def test_dark_mode_is_dark(page):
    def brightness(of):
        (color,) = each(page, "body", f"getComputedStyle(e).{of}")
        return sum(map(int, color[color.index("(") + 1 : -1].split(",")[:3])) / 3

    assert brightness("backgroundColor") > 230 and brightness("color") < 60
    emulate(page, scheme="dark")
    assert brightness("backgroundColor") < 40 and brightness("color") > 200


def test_tooltips_sheets_and_published_values(page, main_group):
    tip = each(page, f"#{main_group.anchor} .ranked td", "e.title")[1]
    assert tip == "[0.05, 0.15] wilson\nn = 120, n_valid = 119, n_refused = 0"
    assert (
        "share of images of the erased concepts in which clip still recognises them, by first choices "
        "(lower is better); judge clip" in heads(page, main_group, "e.title")
    )
    pictures = each(page, ".run img", "[e.alt, e.src.slice(0, 22)]")
    assert len(pictures) == 2 and all(alt and src == "data:image/webp;base64" for alt, src in pictures)
    published = each(page, ".pub", "[e.textContent.trim(), e.classList[1]]")
    assert sorted(published) == [["≈ paper 0.300 (-0.050)", "in"], ["≠ paper 0.900 (-0.650)", "out"]]


def test_the_page_escapes_in_its_source(results):
    source = leaderboard.build(results, formats=["html"])["html"].read_text(encoding="utf-8")
    assert EVIL not in source and html.escape(EVIL) in source


def test_filters_leave_whole_tables_out(rich_page, rich, whole):
    page, groups = rich_page, leaderboard.load(rich)[0]
    by = {(group.runs[0].head.base, group.runs[0].head.task): group.anchor for group in groups}
    ((comparison,), _) = leaderboard.comparisons(rich, groups)
    output = page.find_element(By.CSS_SELECTOR, "output")
    options = lambda name: [
        o.get_attribute("value") for o in page.find_elements(By.CSS_SELECTOR, f"[name={name}] option")
    ]
    assert options("base") == ["", "mini", "sd14"] and options("world") == ["", "mini", "photo"]
    assert options("images") == ["", "40", "120"] and output.text == "7 runs"
    everything = visible(page, ".group")
    assert set(everything) == {*by.values(), comparison.anchor}
    choose(page, "base", "sd14")
    assert visible(page, ".group") == [by["sd14", "object"]] and output.text == "1 of 7 runs"
    assert visible(page, "nav a") == [f"object: {TEX}"]
    choose(page, "world", "mini")
    assert visible(page, ".group") == [] and output.text == "0 of 7 runs"
    choose(page, "base", "")
    choose(page, "images", "120")
    assert set(visible(page, ".group")) == {whole.anchor, comparison.anchor}  # n of the comparison is 120
    page.find_element(By.NAME, "verified").send_keys(" ")
    runs = {run.head.run_id: run.anchor for run in whole.runs}
    assert visible(page, ".run") == [runs["r1"], runs["r2"]] and output.text == "2 of 7 runs"
    assert visible(page, "tbody tr[data-run]") == [runs["r0"], runs["r1"], runs["r2"]]  # the base stays beside them
    assert visible(page, ".comparison") == [comparison.anchor]
    for name in ("world", "images"):
        choose(page, name, "")
    page.find_element(By.NAME, "verified").send_keys(" ")
    assert visible(page, ".group") == everything and output.text == "7 runs"


def test_a_filter_leaves_points_and_panels_out(rich_page, whole):
    pareto, ripple = (f"#{whole.anchor} [data-kind={kind}]" for kind in ("pareto", "ripple"))
    points = lambda: sum(traces(rich_page, pareto, "t.mode === 'markers' ? t.x.length : 0"))
    assert points() == 4 and len(traces(rich_page, ripple, "1")) == 2 * 3
    rich_page.find_element(By.ID, "filter").send_keys("uce")
    assert points() == 2 and len(traces(rich_page, ripple, "1")) == 3  # and the base


def test_color_is_attack_success_and_neutral_without(rich_page, whole):
    plot = f"#{whole.anchor} [data-kind=pareto]"
    found = traces(rich_page, plot, "[t.marker?.coloraxis, t.marker?.coloraxis ? t.marker.color : null, t.x?.length]")
    assert sorted(value for axis, values, _ in found if axis for value in values) == [0.25, 0.625]
    assert sum(n for axis, _, n in found if not axis and n) >= 2
    assert each(rich_page, f"{plot} .cbtitle", "e.textContent") == ["attack success"]
    other = next(a for a in visible(rich_page, ".group") if a != whole.anchor)
    traces(rich_page, f"#{other} [data-kind=pareto]", "1")
    assert each(rich_page, f"#{other} .cbtitle", "e.textContent") == []


def test_ripple_has_a_band_and_a_line_for_each_run(rich_page, whole):
    plot = f"#{whole.anchor} [data-kind=ripple]"
    _, band, line, _, _, evil = traces(rich_page, plot, "[t.x, t.y, t.fill]")
    assert line[0] == [1, 2, 3, 4, 5] and line[1] == [0.5, 0.4, 0.3, 0.2, 0.1]
    assert band[1] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0, 0.1, 0.2, 0.3, 0.4]) and band[2] == "toself"
    assert evil[1] == [0.2, 0.1, 0, 0, 0]
    assert each(rich_page, f"{plot} .annotation-text", "e.textContent") == ["uce", EVIL[:29] + "..."]


def test_hover_says_what_a_point_is(rich_page, whole):
    plot = f"#{whole.anchor} [data-kind=pareto]"
    show(rich_page, plot)
    place = """const plot = document.querySelector(arguments[0]), t = plot.data.find(t => t.customdata?.[0][0] === arguments[1]);
        const at = plot.getBoundingClientRect(), { xaxis: x, yaxis: y } = plot._fullLayout;
        return [at.left + x._offset + x.d2p(t.x[0]), at.top + y._offset + y.d2p(t.y[0])].map(Math.round)"""
    evil = f"{EVIL} (1 attack, seed 0)"
    for name, said in (("esd (seed 0)", "0.4, 0.4"), (evil, "attack success 0.250 (cce)")):
        x, y = rich_page.execute_script(place, plot, html.escape(name, quote=False))
        builder = ActionBuilder(rich_page)
        builder.pointer_action.move_to_location(x, y)
        builder.perform()
        texts = f"{plot} .hovertext"
        WebDriverWait(rich_page, 10).until(
            lambda _, at=texts, said=said: any(said in text for text in each(rich_page, at, "e.textContent"))
        )
        assert each(rich_page, texts, "e.textContent")[0].startswith(name)


def test_a_run_shows_its_fit_and_its_concepts(rich_page, whole):
    run = next(run for run in whole.runs if run.head.run_id == "r1")
    titles = each(rich_page, f"#{run.anchor} .curve figcaption", "e.textContent")
    assert titles == [f"{EVIL} of the fit, step by step", "loss late of the fit, step by step"]
    first, second = (f"#{run.anchor} [data-plot$='curve {i}']" for i in (0, 1))
    assert traces(rich_page, first, "[t.x, t.y]") == [[[1, 2, 3], [0.5, 0.25, 0.125]]]
    assert traces(rich_page, second, "[t.x[1], t.y[1], t.x.length]") == [[5, 4, 250]]
    assert rich_page.find_elements(By.CSS_SELECTOR, f"#{run.anchor} .concepts table") == []  # made when asked for
    rich_page.execute_script("document.querySelector(arguments[0]).open = true", f"#{run.anchor} .concepts")
    table = f"#{run.anchor} .concepts table"
    order = lambda: each(rich_page, f"{table} tbody th", "e.textContent")
    WebDriverWait(rich_page, 10).until(lambda _: order())
    assert order() == list(BY)
    assert each(rich_page, f"{table} td", "e.textContent") == ["0.500 of 4", "1.000 of 2", "0.250 of 8", "–"]
    rich_page.find_elements(By.CSS_SELECTOR, f"{table} button")[1].send_keys("\n")
    assert order() == [EVIL, "Bill Moss", "Ann Reed", "unseen"]
    rich_page.find_elements(By.CSS_SELECTOR, f"{table} button")[0].send_keys("\n")
    assert order() == sorted(BY, key=str.casefold)


def test_a_comparison_is_a_table_and_a_forest(rich_page):
    plot = ".comparison [data-plot$='forest 0']"
    names = traces(rich_page, plot, "[t.name, t.x, t.error_x.array, t.y]")
    assert [name for name, *_ in names] == ["the second is better", "the second is worse", "undecided"]
    assert names[0][1] == [-0.3] and names[0][2] == pytest.approx([0.05]) and [y for *_, y in names] == [[0], [1], [2]]
    colors = traces(rich_page, plot, "t.marker.color")
    assert len(set(colors)) == 3
    assert each(rich_page, f"{plot} .ytick text", "e.textContent") == ["acc_e", "acc_s", EVIL]
    low, high = rich_page.execute_script(
        "return document.querySelector(arguments[0]).layout.xaxis.range", ".comparison [data-plot$='forest 1']"
    )
    assert low < 0 < high  # the zero line is in sight, though all of it lies to the right
    cells = each(rich_page, ".comparison tbody tr", "[...e.cells].map(c => c.innerText)")
    assert cells[0] == ["acc_e\xa0↓", "0.500", "0.200", "-0.300 [-0.350, -0.250]", "better", "0.031", "120"]
    assert cells[2][0] == f"{EVIL}\xa0↓" and cells[4][3:] == ["-0.250", "undecided", "–", "–"]
    rich_page.find_elements(By.CSS_SELECTOR, ".comparison .names button")[3].send_keys("\n")
    assert [line[0] for line in each(rich_page, ".comparison tbody tr", "[...e.cells].map(c => c.innerText)")][
        0
    ] == "acc_s\xa0↑"


def test_costs_of_attacks_are_a_click_away(rich_page, whole):
    labels = lambda: heads(rich_page, whole, "e.textContent.trim()")
    explained = lambda: each(rich_page, f"#{whole.anchor} .meanings dt", "e.textContent")
    spans = lambda: each(rich_page, f"#{whole.anchor} .kinds th", "[e.textContent, e.colSpan]")
    assert "asr union" in labels() and "seconds_per_success" not in labels()
    assert dict(spans())["attack"] == 3
    rich_page.find_element(By.CSS_SELECTOR, f"#{whole.anchor} .wider").send_keys("\n")
    assert "seconds_per_success" in labels() and dict(spans())["attack"] == 4
    rich_page.find_element(By.CSS_SELECTOR, f"#{whole.anchor} .meanings summary").send_keys("\n")
    WebDriverWait(rich_page, 10).until(lambda _: explained() == labels()[1:])
    assert sum(n for _, n in spans()) == len(labels()) - 1


def test_the_new_parts_are_quiet_narrow_and_dark(rich_page, rich, whole):
    everything = each(rich_page, ".plot", "e.dataset.plot")
    assert len(everything) == 3 + 1 + 2 + 2
    for plot in everything:
        show(rich_page, f"[data-plot='{plot}']")
    is_quiet(rich_page)
    light = traces(rich_page, ".comparison .plot", "t.marker.color")
    emulate(rich_page, scheme="dark")
    assert all(a != b for a, b in zip(light, traces(rich_page, ".comparison .plot", "t.marker.color"), strict=True))
    emulate(rich_page, width=390)
    rich_page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    for plot in everything:
        show(rich_page, f"[data-plot='{plot}']")
    assert each(rich_page, "html", "e.scrollWidth") == [390]
    assert (
        each(rich_page, ".plot", "e.scrollWidth > e.clientWidth || e.getBoundingClientRect().right > 390")
        == [False] * 8
    )
    assert rich_page.execute_script("return document.scripts.length") == 2
    assert each(rich_page, "main script, main b script", "1") == []


def test_a_guard_that_refuses_everything_is_ranked(tmp_path):
    nothing = replace(row("acc_e_top1", None), metric="broken_target", group="quality", n=9, n_valid=0)
    for refused, status in ((9, "ok"), (8, "incomplete")):
        save(tmp_path, "g", *scores(0.0, 0.9), replace(nothing, n_refused=refused), method="guard")
        assert leaderboard.load(tmp_path)[0][0].runs[0].status == status


# what is broken


def share(metric: str, value: float | None, base: float | None = 0.0, **changes) -> rows.Row:
    """Of images that are no pictures, beside the base's."""
    known = {
        "metric": metric,
        "split": metric.split("_")[1],
        "group": "quality",
        "base_value": base,
        "higher_is_better": False,
    }
    return replace(row("acc_e", value, 0.01), **known | changes)


BROKEN = {  # -> what the row says, and whether the run is broken
    "all": (share("broken_target", 1.0, change_low=0.9, p_value=1e-9), True),
    "of any split": (share("broken_caption", 0.4, change_low=0.2), True),
    "beyond the base's": (share("broken_retain", 0.5, 0.1, change_low=0.3), True),
    "as many as the base's": (share("broken_target", 0.5, 0.5, change_low=-0.1), False),
    "fewer than the base's": (share("broken_target", 0.1, 0.5, change_low=-0.5), False),
    "within the interval": (share("broken_target", 0.1, change_low=0.0, p_value=0.25), False),
    "of two people in ten": (share("broken_target", 0.2, change_low=0.0, p_value=1e-8), True),
    "both of two": (share("broken_target", 1.0, n=2, change_low=-0.1, p_value=0.5), True),
    "one of two": (share("broken_target", 0.5, n=2, change_low=-0.4, p_value=1.0), False),
    "nothing of the base's": (share("broken_target", 0.5, None), True),
    "no verdict": (share("broken_target", None, n=9, n_valid=0, n_refused=9), False),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_is_listed_and_never_ranked(tmp_path, case):
    cell, is_broken = BROKEN[case]
    save(tmp_path, "n", *scores(0.9, 0.9), method="none")
    save(tmp_path, "u", *scores(0.2, 0.8), method="uce")
    save(tmp_path, "b", *scores(0.0, 1.0, 0.0), cell, method="bad")
    ((group,), problems) = leaderboard.load(tmp_path)
    (run,) = (run for run in group.runs if run.method == "bad")
    assert not problems and (run in group.ranked) != is_broken and bool(run.broken) == is_broken
    assert [run.status, group.broken] == (["broken", [run]] if is_broken else ["ok", []])
    assert all((run.head.run_id in column.rank) != is_broken for column in group.columns if column.kind < 3)
    for form in ("csv", "md", "tex", "html"):
        text = render.FILES[form]([group], []).decode()
        assert ("bad" in text) and ("broken" in text.replace("broken_", "").replace("macro", "")) >= is_broken
    assert ("broken, not ranked: bad" in render.as_text([group])) == is_broken


def test_the_reason_says_which_images_and_of_what_kind(tmp_path):
    blank = [share("broken_target", 1.0, change_low=0.9), share("same_target", 0.0)]
    copies = [share("broken_synonym", 0.9, 0.05, change_low=0.7), share("same_synonym", 0.9, 0.05)]
    save(tmp_path, "b", *scores(0.0, 1.0, 0.0), *blank, *copies, method="bad")
    (run,) = leaderboard.load(tmp_path)[0][0].broken
    said = [
        "100 % of target images are blank or noise (base 0 %)",
        "90 % of synonym images repeat one another (base 5 %)",
    ]
    assert run.broken == said
    line, *_ = csv.DictReader(render.as_csv(leaderboard.load(tmp_path)[0], []).decode().splitlines())
    assert (line["status"], line["reason"]) == ("broken", "; ".join(said))


def test_no_comparison_speaks_for_a_broken_side(tmp_path):
    found = [difference("acc_e", 0.5, 0.0), difference("acc_s", 0.9, 0.5, group="keep", higher_is_better=True)]
    verdicts = lambda: [
        line.verdict for line in leaderboard.comparisons(tmp_path, leaderboard.load(tmp_path)[0])[0][0].lines
    ]
    rows.write(found, tmp_path / "comparisons" / "c.csv", rows.Difference)
    save(tmp_path, "r1", *scores(0.5, 0.9), method="uce")
    save(tmp_path, "r2", *scores(0.0, 0.5, 0.0), method="bad")
    assert verdicts() == ["better", "worse"]
    save(tmp_path, "r2", *scores(0.0, 0.5, 0.0), BROKEN["all"][0], method="bad")
    assert verdicts() == ["undecided", "worse"]
    (compared,), _ = leaderboard.comparisons(tmp_path, leaderboard.load(tmp_path)[0])
    assert b"100 % of target images" in render.as_md([], [compared])
    alone = leaderboard.Comparison((*found, difference("broken_target", 0.0, 1.0)))  # of runs that are not there
    assert [line.verdict for line in alone.lines] == ["undecided", "worse", "worse"]
