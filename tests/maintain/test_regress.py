"""What regress notices: planted faults in small real runs, and every kind of difference in rows made by hand."""

import csv
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from erasebench.evaluators.spread import Drawn
from erasebench.methods.uce import UCE

from erasebench import config, provenance, tasks
from erasebench.contracts import ErasebenchError
from erasebench.maintain import regress
from erasebench.rows import Row

ROOT = Path(__file__).resolve().parents[2]
LIST = "common: device=cpu images=6 sampler.steps=4\nruns:\n  uce: task=object method=uce\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A few small pictures are made no faster by two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """A clean checkout; and Hydra reads sys.argv."""
    monkeypatch.setattr(provenance, "git", lambda: ("abc123", False))
    monkeypatch.setattr("sys.argv", ["erasebench.maintain.regress"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A list of one run, and its golden as the world is."""
    folder = tmp_path_factory.mktemp("regress")
    (folder / "list.yaml").write_text(LIST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "git", lambda: ("abc123", False))
        patch.setattr("sys.argv", ["erasebench.maintain.regress"])
        assert regress.carry_out_list(why="first", runs=folder / "list.yaml", goldens=folder / "goldens") == 0
    return folder


def again(folder, listed="list.yaml"):
    return regress.carry_out_list(runs=folder / listed, goldens=folder / "goldens")


# -- planted in a real run ------------------------------------------------------------------------------------------------


def test_unchanged_code_gives_the_same_numbers_bit_for_bit_and_leaves_no_trace(small, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "my results"
    assert regress.carry_out_list(results=kept, runs=small / "list.yaml", goldens=small / "goldens") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[0] == "uce" and out[-1] == "1 runs, 36 rows: 0 moved; 0 moved inside their intervals"
    assert [path.suffix for path in sorted((kept / "runs").iterdir())] == [".csv", ".webp"]
    assert list(tmp_path.iterdir()) == [kept]  # nor was the store of this user read or written


def test_an_eraser_that_does_nothing_is_caught(small, capsys, monkeypatch):
    monkeypatch.setattr(UCE, "apply", lambda *a: nullcontext())
    assert again(small) == 1
    out = capsys.readouterr().out
    assert "failed: method uce changed no image of the concept: nothing was erased" in out
    assert any(
        line.split()[2:] == ["(target)", "and", "35", "more", "row", "there", "missing", "MOVED"]
        for line in out.splitlines()
    )


def test_an_eraser_that_destroys_the_model_is_caught(small, capsys, monkeypatch):
    def noise(self, model, artifact):
        torch.manual_seed(0)
        return model.changed(weights={n: torch.randn_like(model.weight(n)) for n in model.names(r"^unet\..*weight$")})

    monkeypatch.setattr(UCE, "apply", noise)
    assert again(small) == 1
    moved = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.endswith("MOVED")]
    assert {"shown_retain", "clip_score"} <= set(moved)


def test_a_judge_with_a_flipped_label_is_caught(small, capsys, monkeypatch):
    honest = Drawn.score
    flipped = lambda *a: {name: 1 - values for name, values in honest(*a).items()}
    monkeypatch.setattr(Drawn, "score", flipped)
    assert again(small) == 1
    moved = {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.endswith("MOVED")}
    assert {"shown_target", "shown_retain"} <= moved and "acc_e_top1" not in moved  # CLIP's is not flipped


def test_a_changed_seed_of_the_fit_is_caught(small, capsys):
    (small / "seed.yaml").write_text(LIST.replace("method=uce", "method=uce seed=1"))
    assert again(small, "seed.yaml") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MOVED")]
    assert line.split() == [
        "uce",
        "shown_target",
        "(target)",
        "and",
        "35",
        "more",
        "seed",
        "0",
        "1",
        "MOVED",
    ]  # UCE uses no seed


def test_changed_seeds_of_the_images_are_caught(small, capsys, monkeypatch):
    honest = tasks.seed_of
    monkeypatch.setattr(tasks, "seed_of", lambda *parts: honest(*parts) + 1)
    assert again(small) == 1
    moved = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MOVED")]
    assert any("prompts_sha256" in line for line in moved)


# -- rows made by hand -----------------------------------------------------------------------------------------------------


ROW = replace(
    Row(**dict.fromkeys(Row.__dataclass_fields__, "")),
    schema=3,
    run_id="uce-1",
    status="ok",
    method="uce",
    method_version=1,
    params='{"ridge":0.5}',
    n_concepts=1,
    subset=True,
    threshold=0.5,
    metric="shown_target",
    split="target",
    judge="drawn",
    group="forget",
    higher_is_better=False,
    value=0.25,
    low=0.1,
    high=0.5,
    ci_method="wilson",
    n=16,
    n_valid=16,
    n_dropped=0,
    published=None,
    seed=0,
    prompts_sha256="a" * 64,
    fit_seconds=1.0,
    unet_calls=100,
)
KEPT = replace(ROW, metric="shown_retain", split="retain", value=0.9, low=0.7, high=1.0)
BYTES = replace(ROW, metric="artifact_bytes", split="", value=1024.0, low=None, high=None, n=None, n_valid=None)
ROWS = [ROW, KEPT, BYTES]


def moved(rows, before=ROWS):
    golden = [regress.line_of(row) for row in before]
    return [(m.rows, m.what, m.was, m.now, m.fault) for m in regress.compare("run", golden, rows)]


def value_of(row, before=ROW):
    return [fault for *_, fault in moved([row], [before])]


def test_a_value_may_move_inside_its_interval_and_is_listed():
    assert moved(ROWS) == []
    assert moved([replace(ROW, value=0.5), KEPT, BYTES]) == [
        (("shown_target (target)",), "value", "0.25", "0.5", False)
    ]
    assert value_of(replace(ROW, value=0.5000001)) == value_of(replace(ROW, value=0.0999)) == [True]
    assert value_of(replace(ROW, value=None)) == value_of(ROW, replace(ROW, value=None)) == [True]
    assert value_of(replace(ROW, value=float("nan"))) == [True]


@pytest.mark.parametrize(
    "row,within",
    [
        (replace(ROW, low=0.25, high=0.25), (0.25 - 1 / 16, 0.25 + 1 / 16)),  # one image of sixteen
        (replace(ROW, low=0.24, high=0.26), (0.24 - 1 / 16 + 0.02, 0.26 + 1 / 16 - 0.02)),
        (replace(ROW, low=None, high=None, n_valid=None, n=4), (0.0, 0.5)),
        (replace(ROW, n_valid=4, low=0.25, high=0.25), (0.0, 0.5)),  # of which four could be judged
        (replace(ROW, metric="mace_fire", value=3.0, low=3.0, high=3.0), (2.0, 4.0)),  # a count
        (ROW, (0.1, 0.5)),
    ],
)
def test_where_all_images_agree_one_may_differ(row, within):
    assert regress.allowed(regress.line_of(row)) == pytest.approx(within)


def test_what_is_not_of_images_may_not_move():
    (move,) = moved([ROW, KEPT, replace(BYTES, value=1025.0)])
    assert move == (("artifact_bytes",), "value", "1024", "1025", True)


def test_seconds_memory_and_provenance_are_not_compared():
    clocked = [replace(BYTES, metric=name) for name in regress.CLOCKED]
    slower = [replace(row, value=1e9, fit_seconds=1e9, commit="b", device="x", run_id="y") for row in clocked]
    assert moved(slower, clocked) == []
    assert moved(slower[1:], clocked)[0][1:] == ("row", "there", "missing", True)  # but they must be there


@pytest.mark.parametrize("column", [name for name in regress.EXACT if name not in ("params", "prompts_sha256", "n")])
def test_every_other_column_must_be_the_same_and_is_told_once(column):
    other = [replace(row, **{column: 7}) for row in ROWS]
    (move,) = moved(other)
    assert len(move[0]) == 3 and move[1] == column and move[3:] == ("7", True)


def test_hyperparameters_that_differ_are_named():
    (move,) = moved([replace(row, params='{"ridge":1.0,"new":2}') for row in ROWS])
    assert move[1:] == ("params", "ridge=0.5, new=None", "ridge=1.0, new=2", True)


def test_missing_and_new_rows_are_faults():
    assert moved([ROW, KEPT]) == [(("artifact_bytes",), "row", "there", "missing", True)]
    other = replace(KEPT, threshold=0.6)
    assert [move[2:4] for move in moved([ROW, other, BYTES])] == [("not there", "there"), ("there", "missing")]
    broken = replace(ROW, metric="presence", split="", judge="", status="failed", reason="ValueError: x", value=None)
    assert ("not there", "failed: ValueError: x") in [move[2:4] for move in moved([broken, BYTES])]


def test_two_rows_that_could_not_be_told_apart_are_an_error():
    with pytest.raises(ErasebenchError, match="two rows of shown_target"):
        moved([ROW, ROW])


def test_the_table_puts_faults_first_and_shows_hostile_text_as_text():
    rows = [replace(ROW, value=0.3), replace(KEPT, target="\x1b[31m\n", value=0.95), BYTES]
    lines = regress.table(regress.compare("run", [regress.line_of(row) for row in ROWS], rows)).splitlines()
    assert lines[0].split() == ["run", "row", "what", "was", "is", "may", "be"] and "\\x1b[31m\\n" in lines[1]
    assert [line.split()[-1] for line in lines[1:]] == ["MOVED", "inside", "inside"]
    assert lines[2].split()[4:8] == ["0.25", "0.3", "[0.1,", "0.5]"]


# -- goldens ---------------------------------------------------------------------------------------------------------------


def test_goldens_come_back_as_written_and_know_columns_by_name(tmp_path):
    hostile = replace(ROW, target='a "b",\n〃 c', low=None, value=1 / 3)
    lines = [regress.line_of(row) for row in (hostile, hostile, KEPT, BYTES)]
    lines[1]["metric"] = "other"
    regress.write(lines, tmp_path / "x.csv")
    assert regress.read(tmp_path / "x.csv") == lines
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        header, first, second, *_ = csv.reader(file)
    assert set(header) < set(Row.__dataclass_fields__)  # rows may get columns that goldens do not have
    assert first[header.index("prompts_sha256")] == "a" * 64 and second[header.index("prompts_sha256")] == "〃"


def damage(text):
    head, first, rest = text.split("\n", 2)
    return {
        "cells that do not make a row": f"{head}\n{first[:40]}",
        "a.csv:2: damaged": f"{head}\n{rest}",
        "column n holds 'x'": text.replace(",16,16,", ",x,16,", 1),
        "column params holds": text.replace("ridge", "\\"),
        "not a golden of this version (columns that differ: schema)": text.replace(",schema,", ",", 1),
        "a.csv: not a golden": "",
        "not a golden ('utf-8'": "\udcff",
    }


@pytest.mark.parametrize("message", damage("a\nb\nc"))
def test_a_damaged_golden_is_one_clear_line_before_anything_runs(tmp_path, capsys, monkeypatch, message):
    monkeypatch.setattr(regress, "carry_out", lambda *a: pytest.fail("something ran"))
    (tmp_path / "list.yaml").write_text("common: ''\nruns: {a: method=none}\n")
    path = tmp_path / "goldens" / "a.csv"
    path.parent.mkdir()
    regress.write([regress.line_of(row) for row in ROWS], path)
    path.write_text(damage(path.read_text(encoding="utf-8"))[message], encoding="utf-8", errors="surrogateescape")
    assert again(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line and message in line


def test_missing_goldens_and_those_of_no_run_are_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regress, "carry_out", lambda *a: pytest.fail("something ran"))
    (tmp_path / "list.yaml").write_text("common: ''\nruns: {a: method=none}\n")
    said = []
    for make in (lambda: None, (tmp_path / "goldens").mkdir, (tmp_path / "goldens" / "b.csv").touch):
        make()
        assert again(tmp_path) == 2
        said += capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "an installed package does not" in said[0]
    assert "a.csv: no such golden; a first one is made with --accept" in said[1]
    assert "b.csv: there is no such run any more; --accept removes it" in said[2]
    assert regress.carry_out_list(["aa"], runs=tmp_path / "list.yaml", goldens=tmp_path / "goldens") == 2
    assert "unknown run 'aa': did you mean 'a'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "why,git,message",
    [
        ("x", ("abc", True), "changes that are not committed"),
        ("x", ("", None), "this is no git checkout"),
        (" \n", ("abc", False), "--accept needs a reason"),
        ("", ("abc", False), "--accept needs a reason"),
    ],
)
def test_goldens_are_made_with_a_reason_from_a_clean_checkout(tmp_path, capsys, monkeypatch, why, git, message):
    monkeypatch.setattr(regress, "carry_out", lambda *a: pytest.fail("something ran"))
    monkeypatch.setattr(provenance, "git", lambda: git)
    (tmp_path / "list.yaml").write_text("common: ''\nruns: {a: method=none}\n")
    assert regress.carry_out_list(why=why, runs=tmp_path / "list.yaml", goldens=tmp_path / "goldens") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not (tmp_path / "goldens").exists()


def test_accepting_writes_goldens_and_why_and_removes_what_is_no_more(tmp_path, capsys, monkeypatch):
    made = {"a": ROWS, "b": ROWS}
    monkeypatch.setattr(regress, "carry_out", lambda chosen, results: {name: made[name] for name in chosen})
    runs, goldens = tmp_path / "list.yaml", tmp_path / "goldens"
    runs.write_text("common: ''\nruns: {a: method=none, b: method=uce}\n")
    accept = lambda why, only=None: regress.carry_out_list(only, None, why, runs, goldens)
    assert accept("the\nfirst \x1b[31m") == 0 and again(tmp_path) == 0
    made = {"a": [replace(ROW, n=15), *ROWS[1:]], "b": ROWS[1:]}
    assert again(tmp_path) == 1
    assert accept("only a", ["a"]) == 0
    runs.write_text("common: ''\nruns: {a: method=none}\n")
    assert accept("no b") == 0 and again(tmp_path) == 0
    capsys.readouterr()
    assert accept("nothing") == 0 and "nothing to accept" in capsys.readouterr().out
    assert sorted(path.name for path in goldens.iterdir()) == ["CHANGES.md", "a.csv"]
    _, _, *history = (goldens / "CHANGES.md").read_text().splitlines()
    assert [line.split(", at ")[1] for line in history] == [
        r"abc123: the first \x1b[31m (a, b)",
        "abc123: only a (a)",
        "abc123: no b (b)",
    ]


def test_a_failed_run_is_never_accepted(tmp_path, capsys, monkeypatch):
    failed = [replace(ROW, metric="", status="failed", reason="ValueError: x", value=None)]
    (tmp_path / "list.yaml").write_text("common: ''\nruns: {a: method=none, b: method=uce}\n")
    for rows, why in ((failed, "ValueError: x"), ([], "it could not be carried out")):
        monkeypatch.setattr(regress, "carry_out", lambda *a, rows=rows: {"a": ROWS, "b": rows})
        assert regress.carry_out_list(why="x", runs=tmp_path / "list.yaml", goldens=tmp_path / "goldens") == 1
        assert f"b failed: {why}" in capsys.readouterr().out and not (tmp_path / "goldens").exists()


@pytest.mark.parametrize("words", ["method=ucee", "sampler.stepz=3", "target=zeppelin"])
def test_a_run_that_cannot_be_started_does_not_stop_the_others(tmp_path, capsys, words):
    (tmp_path / "list.yaml").write_text(f"common: ''\nruns: {{a: '{words}', b: '{words}'}}\n")
    for name in "ab":
        (tmp_path / "goldens").mkdir(exist_ok=True)
        regress.write([regress.line_of(row) for row in ROWS], tmp_path / "goldens" / f"{name}.csv")
    assert again(tmp_path) == 1
    out = capsys.readouterr().out
    assert out.count("missing") == 2 and "2 runs, 6 rows: 2 moved" in out


# -- the list that ships ---------------------------------------------------------------------------------------------------


def test_every_method_and_every_task_is_run_or_left_out_with_a_reason():
    chosen = [
        dict(word.split("=", 1) for word in words if "." not in word) for words in regress.listed(regress.LIST).values()
    ]
    names = lambda group: {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert names("method") - {run["method"] for run in chosen} == {"checkpoint", "esd_2025"}
    for task in names("task"):
        methods = {run["method"] for run in chosen if run["task"] == task}
        assert {"none", "uce"} < methods, task
    assert any("attack" in run for run in chosen)


def test_a_method_is_run_as_its_first_lines_say_or_on_the_task_that_every_method_has(tmp_path, monkeypatch):
    said = {
        "plain": "# here: x",
        "long": "# here: x\n# regress: method.steps=3 method.lr=1e-3",
        "people": "# regress: task=celebrity n=5 method.steps=3",
        "other": "# regress: left out, for a reason",
    }
    for name, head in said.items():
        (tmp_path / f"{name}.yaml").write_text(f"{head}\n_target_: x.X\n")
    (tmp_path / "list.txt").write_text("common: device=cpu\nevery: task=object\nruns: {object_plain: task=object method=plain seed=1}\n")
    monkeypatch.setattr(regress, "METHODS", tmp_path)
    assert {name: " ".join(words) for name, words in regress.listed(tmp_path / "list.txt").items()} == {
        "object_long": "device=cpu task=object method=long method.steps=3 method.lr=1e-3",
        "celebrity_people": "device=cpu task=celebrity n=5 method=people method.steps=3",
        "object_plain": "device=cpu task=object method=plain seed=1",
    }


def test_every_run_that_ships_is_small_and_is_asked_for_in_words_that_are_known():
    asked = list(regress.listed(regress.LIST).values())
    for words in asked:
        config.check_words(words)
        assert "device=cpu" in words and any(word.startswith("images=") for word in words)
    assert len({tuple(words) for words in asked}) == len(asked)


def test_the_goldens_that_ship_are_of_the_runs_that_ship():
    names = regress.listed(regress.LIST)
    golden = regress.opened(names, names, regress.GOLDENS)
    assert all(len(lines) > 5 for lines in golden.values())
    assert sum(path.stat().st_size for path in regress.GOLDENS.iterdir()) < 350_000
    methods = {name: dict(w.split("=", 1) for w in words)["method"] for name, words in names.items()}
    assert {name: lines[0]["method"] for name, lines in golden.items()} == methods
    assert (regress.GOLDENS / regress.CHANGES).is_file()
    assert all(line["status"] != "failed" for lines in golden.values() for line in lines)
