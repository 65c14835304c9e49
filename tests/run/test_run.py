"""A whole run on a random model: rows, resuming, faults, and erasers that misbehave."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import WORLD, Brightness, Redness
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE
from PIL import Image

from erasebench import stats
from erasebench.contracts import Brief, Concept, ErasebenchError, Missing, Plan, Prompt, Sampler
from erasebench.model.model import Model
from erasebench.report import leaderboard, render
from erasebench.rows import read
from erasebench.run import images as generate
from erasebench.run.run import execute
from erasebench.store.local import Store
from erasebench.tasks import ExplicitTask

COST = {"fit_seconds", "sample_seconds", "peak_memory_mb"}
SPENT = ["fit_seconds", "fit_unet_calls", "peak_memory_mb", "artifact_bytes", "slowdown"]


def numbers(rows):
    """Rows without what differs between two honest runs: seconds and memory."""
    return [replace(row, **dict.fromkeys(COST)) for row in measured(rows)]


def measured(rows):
    """Rows without those that say what the run cost."""
    return [row for row in rows if row.group != "cost"]


def test_a_run_writes_rows_a_sheet_and_costs(make_run):
    run = make_run("uce", UCE())
    rows = execute(run)
    assert [row.metric for row in rows] == ["red", "red_change", *SPENT] and {row.status for row in rows} == {"ok"}
    file = run.results / "runs" / f"{rows[0].run_id}.csv"
    assert read(file) == rows
    with Image.open(file.with_suffix(".webp")) as sheet:
        assert sheet.width == 5 * 16  # as wide as what is shown
    images = 5 + 4 + 3 + 3
    assert rows[0].n == 5 and rows[0].unet_calls == images * 3 * 2  # steps, and both halves of guidance
    assert rows[0].target == "airplane" and json.loads(rows[0].params)["ridge"] == 0.5
    assert rows[1].value != 0


def test_the_base_is_its_own_reference(make_run):
    rows = execute(make_run("none", NoErasure()))
    assert rows[1].metric == "red_change" and (rows[1].value, rows[1].low, rows[1].high) == (0, 0, 0)


def test_a_repeated_run_computes_nothing(make_run, monkeypatch):
    run = make_run("uce", UCE())
    first = execute(run)
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    monkeypatch.setattr(Brightness, "score", lambda *a: pytest.fail("a judge was asked"))
    assert execute(run) == first


def test_originals_are_shared_and_a_smaller_cap_is_a_prefix(make_run, monkeypatch):
    monkeypatch.setattr(generate, "SHARD", 2)
    execute(make_run("none", NoErasure()))
    shards = len(list((Store().root / "images").iterdir()))
    capped = make_run("none", NoErasure(), images=2)
    rows = execute(capped)
    assert rows[0].subset and rows[0].n == 2
    assert len(list((Store().root / "images").iterdir())) == shards
    assert [p.id for p in capped.plan.prompts if p.split == "target"] == [
        p.id for p in make_run("none", NoErasure()).plan.prompts if p.split == "target"
    ][:2]


def test_shards_side_by_side_are_those_made_one_after_the_other(make_run, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "SHARD", 2)
    threads, made, calls = torch.get_num_threads(), {}, {}
    try:
        for count in (1, 3):
            monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / f"home {count}"))
            torch.set_num_threads(count)
            calls[count] = execute(make_run("uce", UCE()))[0].unet_calls
            entries = (Store().root / "images").iterdir()
            made[count] = {e.name: np.load(e / "images.npz")["images"].tobytes() for e in entries}
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(made[1]) > 10 and made[1] == made[3] and calls[1] == calls[3]


def test_damaged_images_are_made_again_with_the_same_result(make_run, caplog):
    run = make_run("uce", UCE())
    first = execute(run)
    entry = next((Store().root / "images").iterdir())
    (entry / "images.npz").write_bytes(b"rubbish")
    assert numbers(execute(run)) == numbers(first) and "damaged" in caplog.text


@dataclass(frozen=True)
class Idle:
    """Claims to erase and does nothing."""

    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        pass

    def apply(self, model, artifact):
        return nullcontext()


LEFT: list = []


@dataclass(frozen=True)
class Raises(Idle):
    where: str = "fit"

    def fit(self, model, brief, out, seed):
        if self.where == "fit":
            raise RuntimeError("first line\nlast line")
        if self.where == "pickle":
            (out / "weights.bin").write_bytes(b"")
        if self.where == "leaves":
            LEFT.append(self.apply(model, out))  # kept, or the garbage collector would leave it
            LEFT[-1].__enter__()

    @contextmanager
    def apply(self, model, artifact):
        with model.changed(guard=object()):
            if self.where == "apply":
                raise RuntimeError("in apply")
            yield


def test_an_eraser_that_changes_nothing_is_an_error(make_run):
    rows = execute(make_run("idle", Idle()))
    assert [row.status for row in rows] == ["failed"] and "changed no image" in rows[0].reason and rows[0].value is None


@dataclass(frozen=True)
class Rounds(Idle):
    """Moves one pixel of every picture by some grey levels."""

    levels: int = 1

    @contextmanager
    def apply(self, model, artifact):
        def sample(*given):
            made = Model.sample(model, *given)
            pixel = made.images[:, 0, 0, 0]
            pixel += torch.where(pixel < 128, self.levels, -self.levels).to(torch.uint8)
            return made

        model.sample = sample
        yield
        del model.sample


@pytest.mark.parametrize("write", ["run.images.np.savez_compressed", "toolbox.closed_form.save_file"])
def test_after_a_full_disk_the_same_command_gives_the_same_rows(make_run, monkeypatch, tmp_path, write):
    """In the middle of images, of a fit."""
    run = make_run("uce", UCE())
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "calm"))
    calm = execute(run)
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "full"))

    def full(*given, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(f"erasebench.{write}", full)
        (row,) = execute(run)
    assert row.status == "failed" and "free some space" in row.reason
    assert numbers(execute(run)) == numbers(calm)


def fail_to_judge(*given, **options):
    raise ValueError("no such detector")


@pytest.mark.parametrize("broken", ["judge", "disk"])
def test_a_repeat_that_fails_leaves_the_finished_rows_and_their_sheet(make_run, monkeypatch, tmp_path, broken):
    run = make_run("uce", UCE())
    first = execute(run)
    file = run.results / "runs" / f"{run.id}.csv"
    finished = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "another"))
    with monkeypatch.context() as patch:
        patch.setattr(Brightness, "score", fail_to_judge)
        if broken == "disk":
            patch.setattr("erasebench.run.images.np.savez_compressed", fail_to_judge)
        again = execute(run)
    assert "failed" in {row.status for row in again} and file.with_suffix(".failed").is_file()
    assert {name: (file.parent / name).read_bytes() for name in finished} == finished
    groups, problems = leaderboard.load(run.results)
    assert not problems and [shown.reasons for shown in groups[0].runs] == [[]]
    assert "a later repeat failed: ValueError: no such detector" in groups[0].repeats[0]
    for form in ("text", "md", "html"):
        made = render.as_text(groups) if form == "text" else render.FILES[form](groups, []).decode()
        assert "a later repeat failed" in " ".join(made.split())
    assert numbers(execute(run)) == numbers(first) and {path.name for path in file.parent.iterdir()} == {*finished}


def test_what_rounding_does_is_no_erasure(make_run):
    for levels, status in ((1, "failed"), (2, "ok")):
        assert execute(make_run("rounds", Rounds(levels)))[0].status == status


@pytest.mark.parametrize(
    "where,reason",
    [
        ("fit", "RuntimeError: last line"),
        ("apply", "in apply"),
        ("pickle", "safetensors and JSON only"),
        ("leaves", "left the model changed"),
    ],
)
def test_a_method_that_raises_is_a_failed_row_and_is_not_cached(make_run, where, reason):
    run = make_run("raises", Raises(where))
    for _ in range(2):
        rows = execute(run)
        assert [row.status for row in rows] == ["failed"] and reason in rows[0].reason
    assert read(run.results / "runs" / f"{rows[0].run_id}.csv") == rows


@dataclass(frozen=True)
class Breaks(Brightness):
    name: str = "breaks"

    def score(self, images, prompts):
        raise ValueError("no such detector")


def test_a_judge_that_raises_leaves_the_other_rows_whole(make_run):
    rows = measured(execute(make_run("uce", UCE(), {"bad": Redness(Breaks()), "good": Redness()})))
    assert [(row.status, row.metric) for row in rows] == [("ok", "red"), ("ok", "red_change"), ("failed", "bad")]
    assert rows[2].reason == "ValueError: no such detector" and rows[2].judge == "breaks" and rows[2].value is None


@dataclass(frozen=True)
class Blind(Brightness):
    name: str = "blind"

    def score(self, images, prompts):
        return {"red": np.full(len(images), np.nan)}


def test_no_verdict_is_an_empty_value_never_a_good_score(make_run):
    rows = measured(execute(make_run("uce", UCE(), {"blind": Redness(Blind())})))
    assert [(row.status, row.value, row.n, row.n_valid) for row in rows] == [("ok", None, 5, 0)] * 2


@dataclass(frozen=True)
class RefusesAll(Idle):
    def apply(self, model, artifact):
        return model.changed(guard=_Wall())


class _Wall:
    threshold = 0.0

    def __call__(self, model, context):
        return context.hidden.sum((1, 2)) * 0


def test_refusals_are_counted(make_run):
    rows = execute(make_run("wall", RefusesAll()))
    assert (rows[0].n, rows[0].n_refused, rows[0].value) == (5, 5, 0.0)


def test_out_of_memory_halves_the_batch_and_is_recorded(make_run, monkeypatch):
    whole = Model.sample

    def small(self, texts, seeds, sampler, scales):
        if len(texts) > 2:
            raise MemoryError
        return whole(self, texts, seeds, sampler, scales)

    expected = execute(make_run("none", NoErasure()))
    monkeypatch.setenv("ERASEBENCH_HOME", os.environ["ERASEBENCH_HOME"] + "2")
    monkeypatch.setattr(Model, "sample", small)
    rows = execute(make_run("none", NoErasure()))
    assert rows[0].batch == 2 and rows[0].value == pytest.approx(expected[0].value, abs=1e-3)
    monkeypatch.setattr(Model, "sample", lambda *a: (_ for _ in ()).throw(MemoryError()))
    monkeypatch.setenv("ERASEBENCH_HOME", os.environ["ERASEBENCH_HOME"] + "3")
    assert "out of memory even for one" in execute(make_run("none", NoErasure()))[0].reason


@pytest.mark.parametrize("name,message", [("\u0000", "tokenises to nothing"), ("x" * 40, "tokens, the context holds")])
def test_concepts_that_the_model_cannot_read_are_refused(make_run, name, message):
    run = make_run("uce", UCE())
    concept = replace(run.plan.concepts[0], name="" if name == "\u0000" else name)
    rows = execute(replace(run, plan=replace(run.plan, concepts=(concept,))))
    assert rows[0].status == "failed" and message in rows[0].reason


def test_hostile_names_stay_inside_the_results_folder(make_run):
    run = make_run("uce", UCE())
    rows = execute(replace(run, target='../../</script>\n"x"', method="../m"))
    assert [p.suffix for p in sorted((run.results / "runs").iterdir())] == [".csv", ".webp"]
    assert read(run.results / "runs" / f"{rows[0].run_id}.csv")[0].target == '../../</script>\n"x"'
    assert not list(run.results.parent.glob("*.csv"))


def test_identity_leaves_out_what_does_not_change_the_images(make_run):
    run = make_run("uce", UCE())
    same = replace(run, batch=1, device="cuda", results=Path("elsewhere"))
    assert same.identity() == run.identity()
    for other in (
        replace(run, seed=1),
        replace(run, eraser=UCE(ridge=1.0)),
        replace(run, sampler=Sampler("ddim", 4, 4.0)),
    ):
        assert other.identity() != run.identity()


SCRIPT = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import conftest
from erasebench.contracts import Sampler
from erasebench.methods.uce import UCE
from erasebench.run import images
from erasebench.run.run import execute
from erasebench.run.specification import Run
from erasebench.model.source import Source
from erasebench.tasks import ObjectTask
images.SHARD = 1
task = ObjectTask(evaluators={{"redness": conftest.Redness()}})
run = Run("uce", UCE(), Source("tiny", pathlib.Path({folder!r})), "toy", task.plan(conftest.WORLD, None, None, None),
          Sampler("ddim", 3, 4.0), target="airplane", results=pathlib.Path({results!r}))
print("ready", flush=True)
execute(run)
print("done", flush=True)
"""


def _start(tiny_folder, results, home):
    code = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tiny_folder), results=str(results))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "ERASEBENCH_HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _rows(results):
    return numbers([row for file in (results / "runs").glob("*.csv") for row in read(file)])


def test_kill_9_anywhere_and_two_at_once_give_the_undisturbed_rows(tiny_folder, tmp_path):
    """Three kills, at random moments, then the same run twice at once. ERASEBENCH_CHAOS sets the number of kills."""
    undisturbed = _start(tiny_folder, tmp_path / "calm", tmp_path / "home_calm")
    assert undisturbed.wait(timeout=120) == 0, undisturbed.stderr.read()
    generator = random.Random(0)
    for _ in range(int(os.environ.get("ERASEBENCH_CHAOS", "3"))):
        process = _start(tiny_folder, tmp_path / "wild", tmp_path / "home_wild")
        process.stdout.readline()
        time.sleep(generator.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    both = [_start(tiny_folder, tmp_path / "wild", tmp_path / "home_wild") for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert _rows(tmp_path / "wild") == _rows(tmp_path / "calm")
    keys = lambda home: sorted(p.name for p in (tmp_path / home / "store" / "images").iterdir() if p.name[0] != ".")
    assert keys("home_wild") == keys("home_calm")


def test_unwritable_results_are_found_before_any_work(make_run, tmp_path, monkeypatch):
    (tmp_path / "results").write_text("")
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    with pytest.raises(ErasebenchError, match="choose another folder with results="):
        execute(make_run("uce", UCE()))


@dataclass(frozen=True)
class Absent(Brightness):
    name: str = "absent"
    wrong: bool = False

    def weights(self):
        if self.wrong:
            raise ErasebenchError("weights.bin: sha256 is 1, expected 2")
        raise Missing("weights.bin is not here: fetch it")


def test_wrong_weights_end_a_run_before_any_model_is_loaded(make_run, monkeypatch):
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    with pytest.raises(ErasebenchError, match="sha256 is 1, expected 2"):
        execute(make_run("uce", UCE(), {"wrong": Redness(Absent(wrong=True))}))


def test_what_the_world_cannot_judge_is_skipped_with_the_reason(make_run):
    nowhere = Redness(splits=("target", "attack:none"))
    judges = {"none": None, "blind": Redness(None), "nowhere": nowhere, "absent": Redness(Absent()), "good": Redness()}
    rows = measured(execute(make_run("uce", UCE(), judges)))
    assert [(row.status, row.metric) for row in rows] == [
        ("ok", "red"),
        ("ok", "red_change"),
        ("skipped", "none"),
        ("skipped", "blind"),
        ("skipped", "nowhere"),
        ("skipped", "absent"),
    ]
    assert "no judge" in rows[2].reason and "attack:none prompts" in rows[4].reason
    assert rows[5].reason == "weights.bin is not here: fetch it"


def test_what_erasing_cost_is_rows_of_its_own(make_run):
    run = make_run("uce", UCE())
    spent = {row.metric: row for row in execute(run) if row.group == "cost"}
    artifact = Store().get("artifacts", run.fit_identity())
    assert spent["artifact_bytes"].value == (artifact / "edit.safetensors").stat().st_size
    assert spent["fit_seconds"].value == json.loads((artifact / "cost.json").read_text())["seconds"] > 0
    assert spent["slowdown"].value > 0 and spent["slowdown"].n is None and spent["slowdown"].low is None
    base = {row.metric: row.value for row in execute(make_run("none", NoErasure())) if row.group == "cost"}
    assert base["slowdown"] == 1 and base["artifact_bytes"] == base["fit_seconds"] == 0


def test_a_metric_added_to_a_finished_run_takes_no_image_and_no_judge(make_run, monkeypatch):
    execute(make_run("uce", UCE()))
    monkeypatch.setattr(Model, "load", classmethod(lambda *a: pytest.fail("a model was loaded")))
    monkeypatch.setattr(Brightness, "score", lambda *a: pytest.fail("a judge was asked"))
    rows = execute(make_run("uce", UCE(), {"redness": Redness(), "more": Darkness()}))
    found = {row.metric: row.value for row in rows}
    assert found["dark"] == pytest.approx(1 - found["red"])


@dataclass(frozen=True)
class Darkness:
    """Another metric of the same judge's scores."""

    judge: Brightness = Brightness()
    splits: tuple[str, ...] = ("target",)

    def measure(self, scores, base):
        shown = scores["target"]
        part = stats.Part("target", 1 - shown.arrays["red"].astype(float), shown.concepts, rate=False)
        return [stats.Measure("dark", "forget", True, (part,))]


def test_a_guidance_of_their_own_makes_other_prompts_and_another_run(make_run):
    """Else task.guidance=row of I2P would take the place of task.guidance=fixed in the results."""
    run = make_run("none", NoErasure())
    rowwise = replace(run, plan=replace(run.plan, prompts=tuple(replace(p, guidance=2.0) for p in run.plan.prompts)))
    ours, theirs = execute(run)[0], execute(rowwise)[0]
    assert ours.run_id != theirs.run_id and ours.prompts_sha256 != theirs.prompts_sha256


def test_prompts_that_the_gate_dropped_are_counted_in_every_row(make_run):
    run = make_run("none", NoErasure())
    rows = execute(replace(run, plan=replace(run.plan, dropped=3)))
    assert {row.n_dropped for row in rows} == {3} and rows[0].n == 5


@dataclass(frozen=True)
class Bright(Redness):
    """Rates of every split, by concept, and one by prompt."""

    splits: tuple[str, ...] = ("target", "retain")

    def measure(self, scores, base):
        hits = {split: (scores[split].arrays["red"] > 0.4) * 1.0 for split in self.splits}
        part = lambda split, clusters: stats.Part(split, hits[split], clusters)
        return [
            stats.Measure("erased", "forget", False, (part("target", scores["target"].concepts),)),
            stats.Measure("kept", "keep", True, (part("retain", scores["retain"].concepts),)),
            stats.Measure("asked", "keep", True, (part("retain", [p.text for p in scores["retain"].prompts]),)),
        ]


def test_a_row_says_what_its_rate_is_made_of_and_never_a_prompt(make_run):
    run = make_run("uce", UCE(), {"bright": Bright()})
    rows = {row.metric: row for row in execute(run)}
    assert rows["erased"].by_concept == "" == rows["asked"].by_concept == rows["slowdown"].by_concept
    made = json.loads(rows["kept"].by_concept)
    assert list(made) == ["cat", "dog"] and sum(n for _, n in made.values()) == rows["kept"].n == 4
    assert sum(rate * n for rate, n in made.values()) == pytest.approx(rows["kept"].value * 4)


def test_explicit_prompts_are_in_no_row(make_run):
    plan = ExplicitTask(evaluators={"bright": Bright()}).plan(WORLD, None, None, None)
    texts = {prompt.text for prompt in plan.prompts}
    for row in execute(make_run("uce", UCE(), plan=plan)):
        assert set(json.loads(row.by_concept or "{}")) <= {"fire", "bomb", "cat", "dog"}
        assert not any(text in str(value) for text in texts for value in vars(row).values())


def test_a_judge_that_does_not_know_the_concept_is_left_out_before_anything_is_drawn(make_run):
    """No verdict on a unicorn: neither of the judge of what is drawn, nor of the embedded CLIP, whose list of classes has it."""
    from erasebench.evaluators.clip import Clip
    from erasebench.evaluators.objects import ObjectAccuracy
    from erasebench.evaluators.spread import Drawn, Neighbours, Presence
    from erasebench.evaluators.success import OtherWords

    from erasebench.analysis.forecast import planned

    embedded = Clip(architecture="embedded", pretrained="embedded")
    accuracy = lambda clip: ObjectAccuracy(clip, ("cat", "unicorn"), "a photo of the {c}", splits=("target",))
    ours = accuracy(embedded)
    evaluators = {
        "presence": Presence(Drawn(), ("target",)),
        "objects": ours,
        "neighbours": Neighbours(ours, "acc_s_top1", embedded),
        "other": OtherWords(ours, ("target",)),
    }
    prompts = lambda name: (Prompt("target/0", f"a photo of {name}", 1, "target", name),)
    plan = lambda name: Plan("object", 1, (Concept(name, "object", "sky"),), prompts(name), Brief(()), evaluators=evaluators)
    run = make_run("none", NoErasure(), plan=plan("unicorn"))
    assert {n: run.skips(e) for n, e in evaluators.items()} == {
        "presence": "drawn does not know unicorn", **dict.fromkeys(("objects", "neighbours", "other"), "clip does not know unicorn"),
    }  # fmt: skip
    assert "objects: clip does not know unicorn" in planned(run).missing
    assert not any(make_run("none", NoErasure(), plan=plan("cat")).skips(e) for e in evaluators.values())
    assert accuracy(Clip()).recognises("unicorn") and not accuracy(Clip()).recognises("whale")
