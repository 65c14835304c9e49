"""What goes to Weights & Biases, read back from what W&B itself wrote offline; and that rows never depend on it."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from conftest import WORLD, Redness, build_pipeline
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE
from omegaconf import OmegaConf
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from erasebench import cli, config, rows
from erasebench.contracts import ErasebenchError, Prompt
from erasebench.report import leaderboard
from erasebench.report import wandb as track
from erasebench.run.run import execute
from erasebench.run.sheet import sheet
from erasebench.store.local import Store
from erasebench.tasks import CaptionTask, ExplicitTask, together

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """W&B without an account, its files under the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


@dataclass
class Sent:
    """One W&B run as it lies on the disk."""

    folder: Path
    run: object  # RunRecord: run_id, run_group, tags, notes, host
    config: dict
    numbers: dict
    summary: dict
    exit_code: int
    tables: dict  # name -> list of {column: cell}
    images: list  # sizes of the image files, sorted


def records(path: Path):
    """The records of a W&B log: LevelDB's log format after a header of 7 bytes, blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def items(found) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


def everything_sent(home: Path) -> list[Sent]:
    """Every run that was kept offline, in the order in which they were sent."""
    wandb.teardown()  # its writer ends
    found = []
    for path in sorted(home.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run, said, numbers, summary, code, pictures = None, {}, {}, {}, None, []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                said |= items(run.config.update)
            elif kind == "history":
                numbers |= items(record.history.item)
            elif kind == "summary":
                summary |= items(record.summary.update)
            elif kind == "exit":
                code = record.exit.exit_code
            elif kind == "artifact":
                contents = record.artifact.manifest.contents
                pictures += [Image.open(c.local_path).size for c in contents if c.path.startswith("media/images")]
        tables = {}
        for name in [name.removesuffix(".path") for name in numbers if name.endswith(".path")]:
            table = json.loads((path.parent / "files" / numbers[f"{name}.path"]).read_text())
            tables[name] = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
        numbers = {name: value for name, value in numbers.items() if name[0] != "_" and "." not in name}
        found.append(Sent(path.parent, run, said, numbers, summary, code, tables, sorted(pictures)))
    return found


def sent(home: Path) -> Sent:
    (one,) = everything_sent(home)
    return one


def file_of(run, made) -> Path:
    return run.results / "runs" / f"{made[0].run_id}.csv"


def shown(path: Path) -> leaderboard.Run:
    return leaderboard.Run(tuple(rows.read(path)), path.with_suffix(".webp"))


def test_a_run_is_sent_with_its_config_metrics_intervals_images_and_artifact(make_run, tmp_path):
    run = make_run("uce", UCE())
    made = execute(run)
    assert track.mirror(file_of(run, made), "my table")
    found, red = sent(tmp_path / "home"), made[0]
    assert found.run.run_id == found.run.display_name == red.run_id and found.run.project == "erasebench"
    assert (found.run.run_group, found.run.job_type, list(found.run.tags)) == ("my table", "object", ["ok"])
    assert (found.exit_code, found.summary["status"], found.run.host) == (0, "ok", "")
    assert {name: found.numbers[name] for name in ("red", "red_low", "red_high", "red_n_valid")} == {
        "red": red.value,
        "red_low": red.low,
        "red_high": red.high,
        "red_n_valid": 5,
    }
    assert found.numbers["fit_seconds"] == red.fit_seconds and "fit_seconds_low" not in found.numbers
    assert found.config["params"]["ridge"] == 0.5 and found.config["target"] == "airplane"
    assert found.config["command"].startswith("python -m erasebench") and found.config["commit"] == red.commit
    assert found.config["packages"]["torch"] == torch.__version__.split("+")[0]
    key = found.config["artifact"]
    assert key == red.artifact and (Store().root / "artifacts" / key / "cost.json").is_file()
    assert [line["metric"] for line in found.tables["rows"]] == [row.metric for row in made]
    assert found.tables["rows"][0] == {name: getattr(red, name) for name in rows.NAMES}
    counts = {"target": 5, "retain": 4, "synonym": 3, "caption": 3}
    lines = found.tables["images"]
    assert sorted(line["split"] for line in lines) == sorted(split for split, n in counts.items() for _ in range(n))
    prompts = {(p.split, p.text, p.seed) for p in run.plan.prompts}
    assert {(line["split"], line["prompt"], line["seed"]) for line in lines} == prompts
    assert found.images == [(16, 16)] * 2 * 15


def test_pictures_are_those_of_their_prompt_base_and_erased(make_run, tmp_path):
    colour = lambda *rgb: torch.tensor(rgb, dtype=torch.uint8).expand(16, 16, 3)

    def side(red):
        of = lambda split, n, blue: SimpleNamespace(
            prompts=tuple(Prompt(f"{split}/{i}", f"{split} {i}", i, split) for i in range(n)),
            images=lambda: torch.stack([colour(red, 250 * i // n, blue) for i in range(n)]),
        )
        return [of("target", 14, 0), of("caption", 3, 200)]

    run, path = make_run("uce", UCE()), tmp_path / "r.webp"
    sheet(run, side(0), side(220), path)
    row = next(iter(execute(make_run("none", NoErasure()))))
    found = track.pictures(leaderboard.Run((replace(row, run_id="r", method="uce"),), path))
    assert [line["prompt"] for line in found] == [f"target {i}" for i in range(8)] + [f"caption {i}" for i in range(3)]
    for line in found:
        n, blue = (14, 0) if line["split"] == "target" else (3, 200)
        for name, red in (("base", 0), ("erased", 220)):
            assert line[name].size == (16, 16)
            middle = np.asarray(line[name])[4:12, 4:12].mean((0, 1))
            assert np.abs(middle - (red, 250 * line["seed"] // n, blue)).max() < 12, (line["prompt"], name)
    sheet(make_run("none", NoErasure()), side(0), side(0), path)
    assert list(track.pictures(leaderboard.Run((replace(row, run_id="r"),), path))[-1]) == [
        *("split", "prompt", "seed", "base")
    ]


def test_metrics_have_the_leaderboards_names(make_run):
    run = make_run("uce", UCE())
    made = execute(run)
    under = lambda attack, **other: replace(made[0], metric="asr", group="attack", attack=attack, **other)
    two = leaderboard.Run((*made, under("cce"), under("udatk"), under("cce", threshold=0.5, split="x")), Path("x"))
    columns = leaderboard.Group.of([two]).columns
    named = {"red", "red_change", "asr_udatk", "asr_cce_target", "asr_cce_x"}
    costs = {"fit_seconds", "fit_unet_calls", "peak_memory_mb", "artifact_bytes", "slowdown"}
    assert set(track.names(two).values()) == named | costs | {"sample_seconds", "unet_calls"}
    assert set(track.names(two).values()) == {column.label.replace(" ", "_") for column in columns}
    one = leaderboard.Run((*made, under("udatk")), Path("x"))
    assert "asr_udatk" in track.names(one).values()  # the same as beside another attack


def test_names_that_would_collide_or_that_wandb_cannot_sort_by_are_told_apart(make_run):
    made = execute(make_run("none", NoErasure()))
    odd = [replace(made[0], metric=name) for name in ("x", "x_low", "x low", "5_fold", "ner_0.5", "ünï</script>")]
    names = list(track.names(leaderboard.Run(tuple(odd), Path("x"))).values())[: len(odd)]
    assert names == ["x", "x_low_", "x_low__", "_5_fold", "ner_0_5", "_n___script_"]
    assert len(track.numbers(leaderboard.Run(tuple(odd), Path("x")))) >= 4 * len(odd)


def test_images_of_explicit_concepts_are_never_sent(make_run, tmp_path):
    ordinary = make_run("uce", UCE())
    other = file_of(ordinary, execute(ordinary))
    plan = CaptionTask(evaluators={}).plan(WORLD, None, None, None)
    assert {concept.kind for concept in plan.concepts} == {"explicit"}
    caption = make_run("uce", UCE(), plan=plan)
    path = file_of(caption, execute(caption))
    assert not path.with_suffix(".webp").exists()
    shutil.copy(other.with_suffix(".webp"), path.with_suffix(".webp"))  # another run's, under its name
    assert track.mirror(path)
    explicit = make_run("uce", UCE(), plan=ExplicitTask(evaluators={}).plan(WORLD, None, None, None))
    path = file_of(explicit, execute(explicit))
    assert not path.with_suffix(".webp").exists()
    Image.open(other.with_suffix(".webp")).save(path.with_suffix(".webp"), exif=relabelled(other, path))
    assert track.mirror(path)
    run = make_run("uce", UCE(), plan=together(ordinary.plan, WORLD, ["hazard"]))
    assert track.mirror(file_of(run, made := execute(run))) and made[0].status == "ok"
    found = everything_sent(tmp_path / "home")
    assert len(found) == 3
    for one in found:
        assert list(one.tables) == ["rows"] and one.images == [] and not list(one.folder.rglob("*.png"))


def relabelled(other: Path, path: Path) -> Image.Exif:
    """The description of a run's sheet, saying that it is another's."""
    exif = Image.open(other.with_suffix(".webp")).getexif()
    exif[0x010E] = json.dumps(json.loads(exif[0x010E]) | {"run": path.stem})
    return exif


@dataclass(frozen=True)
class Broken(Redness):
    def measure(self, scores, base):
        raise ErasebenchError("the judge fell over")


@pytest.mark.parametrize(
    "evaluators,status,reason",
    [
        ({"redness": Broken()}, "failed", "redness failed: the judge fell over"),
        ({"redness": Redness(), "more": Broken()}, "failed", "more failed: the judge fell over"),
    ],
)
def test_failed_runs_are_sent_with_their_reason_and_marked(make_run, tmp_path, evaluators, status, reason):
    run = make_run("uce", UCE(), evaluators=evaluators)
    assert track.mirror(file_of(run, execute(run)))
    found = sent(tmp_path / "home")
    assert (list(found.run.tags), found.run.notes, found.exit_code) == ([status], reason, 1)
    assert (found.summary["status"], found.summary["reason"]) == (status, reason)
    assert ("red" in found.numbers) == (len(evaluators) == 2)


def test_skipped_and_unjudged_runs_are_marked_but_did_not_fail(make_run, tmp_path):
    run = make_run("uce", UCE())
    made = execute(run)
    path = file_of(run, made)
    rows.write([replace(made[0], value=None, low=None, high=None, n_valid=0), *made[1:]], path)
    assert track.mirror(path)
    nothing = {"value": None, "low": None, "high": None, "run_id": "other"}
    rows.write([replace(made[0], status="skipped", reason="does not fit", metric="", **nothing)], path)
    assert track.mirror(path)
    unjudged, skipped = everything_sent(tmp_path / "home")
    assert unjudged.summary["status"] == "incomplete" and unjudged.exit_code == skipped.exit_code == 0
    assert unjudged.summary["reason"] == "red no value: 0 of 5 images judged" and "red" not in unjudged.numbers
    assert skipped.summary == {**skipped.summary, "status": "skipped", "reason": "skipped: does not fit"}


def test_every_run_of_a_file_is_its_own_beside_one_that_is_open(make_run, tmp_path):
    """Somebody's method may hold a W&B run of its own open."""
    run = make_run("none", NoErasure())
    made = execute(run)
    path = file_of(run, made)
    rows.write([*made, *(replace(row, run_id="second") for row in made)], path)
    with wandb.init(mode="offline", dir=tmp_path / "theirs", id="theirs", settings={"silent": True}) as theirs:
        assert track.mirror(path)
        theirs.log({"loss": 1.0})
    assert {one.run.run_id for one in everything_sent(tmp_path / "home")} == {made[0].run_id, "second"}
    (own,) = everything_sent(tmp_path / "theirs")
    assert own.numbers == {"loss": 1.0} and own.run.run_id == "theirs"


def test_without_an_account_it_goes_offline_and_says_so_in_one_line(make_run, tmp_path, caplog):
    run = make_run("none", NoErasure())
    path = file_of(run, execute(run))
    caplog.set_level(logging.INFO, "erasebench")
    caplog.clear()
    assert track.mirror(path)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "erasebench"]
    assert "kept offline (no account: WANDB_API_KEY, or `wandb login`)" in line
    assert line.endswith(f"wandb sync {sent(tmp_path / 'home').folder}")
    assert not (ROOT / "wandb").exists() and not Path("wandb").exists()


@pytest.mark.parametrize(
    "setting,mode", [({"WANDB_API_KEY": "k" * 40}, "online"), ({"WANDB_MODE": "offline"}, "offline"), ({}, "offline")]
)
def test_an_account_is_used_unless_offline_is_asked_for(make_run, monkeypatch, setting, mode):
    run = make_run("none", NoErasure())
    path = file_of(run, execute(run))
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given) or pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception):
        track.send(shown(path))
    assert asked[0]["mode"] == mode


def test_wandb_mode_disabled_sends_nothing(make_run, tmp_path, monkeypatch, caplog):
    run = make_run("none", NoErasure())
    path = file_of(run, execute(run))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()
    caplog.set_level(logging.INFO, "erasebench")
    assert track.mirror(path) and "not sent, WANDB_MODE=disabled" in caplog.text
    assert everything_sent(tmp_path / "home") == []


@pytest.mark.parametrize(
    "fault,said",
    [
        (None, "ModuleNotFoundError"),  # not installed
        (SimpleNamespace(), "AttributeError"),  # something else of that name
        (("init", RuntimeError("no\nnetwork\x1b[2J")), "RuntimeError: no network\\x1b[2J"),
        (("init", SystemExit(3)), "SystemExit: 3"),
        (("Table", ValueError("too large")), "ValueError: too large"),
    ],
)
def test_a_failing_wandb_is_one_warning_and_changes_no_row(make_run, monkeypatch, caplog, fault, said):
    def fail(*_, **__):
        raise fault[1]

    run = make_run("none", NoErasure())
    path = file_of(run, execute(run))
    before = path.read_bytes()
    if isinstance(fault, tuple):
        monkeypatch.setattr(wandb, fault[0], fail)
    else:
        monkeypatch.setitem(sys.modules, "wandb", fault)
    caplog.set_level(logging.INFO, "erasebench")
    caplog.clear()
    assert track.mirror(path) is False
    (record,) = [record for record in caplog.records if record.name == "erasebench"]
    assert record.levelno == logging.WARNING and said in record.getMessage() and "\n" not in record.getMessage()
    assert record.getMessage().endswith(f"later: python -m erasebench wandb {path}")
    assert path.read_bytes() == before and cli.main(["wandb", str(path)]) == 1


def test_hostile_rows_are_sent_as_text_or_refused_in_one_line(make_run, tmp_path, caplog):
    run = make_run("none", NoErasure())
    made = execute(run)
    path = file_of(run, made)
    evil = "../../x\x1b[2J</script>\n%"
    rows.write([replace(row, run_id=evil, target=evil, metric=evil, reason=evil) for row in made], path)
    assert cli.main(["wandb", str(path), str(tmp_path / "nowhere.csv")]) == 1
    assert "nowhere.csv: no such file" in caplog.text and "\x1b" not in caplog.text
    found = sent(tmp_path / "home")
    assert found.config["run_id"] == evil and found.run.run_id.isalnum() and len(found.run.run_id) == 32
    path.write_text("no rows at all\n")
    assert cli.main(["wandb", str(path)]) == 1 and "not rows of schema" in caplog.text


def test_a_typo_is_refused_with_the_nearest_name():
    with pytest.raises(ErasebenchError, match="unknown track 'wanbd': did you mean 'wandb'"):
        config.check_words(["track=wanbd"])
    config.check_words(["track=none", "track=wandb"])


def test_a_table_is_the_group_of_its_runs():
    assert (
        config.sweep_name(OmegaConf.create({"table": {"name": "mace_table1"}}), ["-m", "method=uce"]) == "mace_table1"
    )


def test_a_sweep_sends_each_run_under_its_own_id_and_rows_are_the_same_without_it(tmp_path):
    model = build_pipeline(tmp_path / "model")
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise RuntimeError('half installed')\n")
    (tmp_path / "here").mkdir()
    words = ["-m", "method=none,uce", "target=cat", f"model.path={model}", "images=2", "sampler.steps=1"]
    words.append("~task.evaluators")  # judges take their time to load, and one of their packages loads wandb too

    def sweep(*more: str, path: str = ""):
        done = subprocess.run(
            [sys.executable, "-m", "erasebench", *words, *more],
            cwd=tmp_path / "here",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))},
        )
        assert done.returncode == 0, done.stderr
        files = {f.name: f.read_bytes() for f in (tmp_path / "here" / "results" / "runs").iterdir()}
        return files, done.stderr

    broken = str(tmp_path / "broken")
    unasked, said = sweep(path=broken)  # where importing it is an error
    assert "W&B" not in said and "half installed" not in said
    files, said = sweep("track=wandb")
    assert files == unasked and said.count("kept offline (no account") == 2
    found = everything_sent(tmp_path / "home")
    assert {f"{one.run.run_id}.csv" for one in found} == {name for name in files if name.endswith(".csv")}
    assert {one.run.run_group for one in found} == {" ".join(words[1:-1]).replace(str(model), "...")[:128]} and len(found) == 2
    assert [one.config["method"] for one in found] == ["none", "uce"]
    assert sorted(f.name for f in (tmp_path / "here").iterdir()) == ["results"]
