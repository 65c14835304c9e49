"""A concept of one's own: entries of the world, its judges, and what the base must draw for a verdict."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import WORLD
from erasebench.evaluators.calibration import check_drawn, p_greater, youden
from erasebench.evaluators.clip import Clip
from erasebench.evaluators.identity import Identity
from erasebench.evaluators.references import FaceImages, References, ReferenceShare
from erasebench.evaluators.verification import ClipImages
from erasebench.evaluators.zero_shot import ZeroShotShare
from erasebench.methods.none import NoErasure
from PIL import Image

from erasebench import config, rows, stats
from erasebench.contracts import Concept, ErasebenchError, Prompt, Scored, Undrawn
from erasebench.gate import Refused
from erasebench.own_concept import Asked, Own, kind_of, planned
from erasebench.run.own_judges import judged, reference_of
from erasebench.run.run import execute
from erasebench.store.local import canonical
from erasebench.tasks import CaptionTask, CelebrityTask, ExplicitTask, ImagenetteTask, ObjectTask, StyleTask

TOY = {**WORLD, "surrogates": {"object": "sky", "person": "a person", "style": "art"}}
TASKS = {"object": ObjectTask(), "person": CelebrityTask(), "style": StyleTask(), "explicit": ExplicitTask()}
MINI = Clip(architecture="embedded", pretrained="embedded")


def plan(kind, target="my thing", task=None, world=TOY, images=None, **said):
    return planned(task or TASKS[kind], world, Asked(kind, **said), None, target, images)


def splits(made):
    return {p.split: sorted({q.concept for q in made.prompts if q.split == p.split}) for p in made.prompts}


# -- entries of the world ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,surrogate", [("object", "sky"), ("person", "a person"), ("style", "art"), ("explicit", "sky")])
def test_a_concept_of_each_kind_is_asked_for_by_the_templates_of_its_task(kind, surrogate):
    made, own = plan(kind, keep=("old car", "cat"), synonyms=("thingy",))
    assert made.concepts == (Concept("my thing", kind, surrogate, ("thingy",)),)
    assert made.brief.concepts == (Concept("my thing", kind, surrogate),)  # synonyms are the evaluation's
    assert made.brief.preserved == ("old car", "cat")
    found = splits(made)
    assert found["target"] == found["synonym"] == ["my thing"] and found["retain"] == ["cat", "old car"]
    texts = {t.replace("{c}", "thingy") for t in TOY["templates"][kind]}
    assert {p.text for p in made.prompts if p.split == "synonym"} == texts
    assert made.which == own.label == "my thing (keeps old car, cat; also thingy)"


def test_the_world_says_what_is_not_said():
    assert set(plan("object")[0].brief.preserved) == {"airplane", "cat", "dog"}
    assert plan("person")[0].brief.preserved == ("Ann Moss", "Tom Reed")
    assert plan("style")[0].brief.preserved == ("Cy", "Di")
    assert plan("style", "Monet", keep=("Bea",))[0].brief.preserved == ("Bea",)
    made, own = plan("explicit")
    assert made.brief.preserved == () and splits(made)["retain"] == ["cat", "dog"] and made.which == own.label == "my thing"
    assert "synonym" not in splits(plan("object")[0])
    assert plan("object", "cat", synonyms=("tom",))[0].concepts[0].synonyms == ("tom",)
    assert plan("object", "cat", keep=("dog",))[0].concepts[0].synonyms == ("kitty", "feline", "housecat")


def test_other_tasks_of_a_kind_take_it_too():
    made, _ = plan("object", task=ImagenetteTask(), keep=("church",))
    assert splits(made)["target"] == ["my thing"] and made.brief.preserved == ("church",)
    for kind in TASKS:
        made, _ = plan(kind, task=CaptionTask(), keep=("cat",))
        assert [c.kind for c in made.concepts] == [kind] and set(splits(made)) == {"caption"}
        assert made.brief.preserved == ("cat",)
    with pytest.raises(ErasebenchError, match="task=celebrity kind=object: of that kind is task=object"):
        plan("object", task=CelebrityTask())


def test_what_the_world_knows_is_planned_as_before():
    for task, name in ((ObjectTask(), "cat"), (CelebrityTask(), "Ann Reed"), (StyleTask(), "Monet")):
        made, own = planned(task, TOY, Asked(), None, name, None)
        assert own is None and made == task.plan(TOY, None, name, None)
        assert planned(task, TOY, Asked(kind_of(TOY, name)), None, name, None) == (made, None)
    made, own = planned(ExplicitTask(), TOY, Asked("explicit"), None, None, None)
    assert own is None and made == ExplicitTask().plan(TOY, None, None, None)


def test_the_kind_is_guessed_where_the_world_knows_it():
    known = {"cat": "object", "church": "object", "Tom Reed": "person", "Klee": "style", "hazard": "explicit", "fire": "explicit"}
    assert {name: kind_of(TOY, name) for name in known} == known and kind_of(TOY, "my thing") is None
    made, own = planned(CelebrityTask(), TOY, Asked(), None, "Tom Reed", None)  # one who is kept otherwise
    assert own == Own("Tom Reed", "person") and made.brief.preserved == ("Ann Moss",)
    for asked in (Asked(), Asked(keep=("cat",))):
        with pytest.raises(ErasebenchError, match="kind= is needed: object, person, style or explicit"):
            planned(ObjectTask(), TOY, asked, None, "my thing", None)
    with pytest.raises(ErasebenchError, match="did you mean Bill Moss"):
        planned(CelebrityTask(), TOY, Asked(), None, "Bill Mos", None)


@pytest.mark.parametrize(
    "target,said,message",
    [
        ("my thing", {"keep": ("cat", "My Thing")}, "'my thing' is in target= and in keep="),
        ("my thing", {"synonyms": ("cat",), "keep": ("cat",)}, "'cat' is in synonyms= and in keep="),
        ("my thing", {"surrogates": ("my thing",)}, "in target= and in surrogate="),
        ("sky", {}, "surrogate= is needed"),
        ("my thing", {"keep": ()}, "name at least one"),
        ("my thing", {"keep": (" ",)}, "keep='': a name is 1 to 200"),
        ("my\nthing", {}, "printable"),
        ("a {c}", {}, "printable"),
        ("my thing", {"synonyms": ("x" * 300,)}, "a name is 1 to 200"),
        ("my thing", {"keep": ("nowhere.txt",)}, "keep=nowhere.txt: no such file"),
        ("a hazard", {}, "what has the words hazard is kind=explicit"),
        (None, {"keep": ("cat",)}, "target= is needed"),
    ],
)
def test_names_that_will_not_do_are_one_line(target, said, message):
    with pytest.raises(ErasebenchError, match=message) as caught:
        plan("object", target, **said)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("option", ["target", "keep", "synonyms", "surrogates"])
def test_the_gate_stands_before_every_name(kind, option):
    said = {"target": "my thing"} | {option: "a ch1ld" if option == "target" else ("cat", "a ch1ld")}
    with pytest.raises(Refused) as caught:
        plan(kind, **said)
    assert "ch1ld" not in str(caught.value) and f"{option}".rstrip("s") in str(caught.value)


def test_a_phrase_of_one_s_own_is_as_explicit_as_the_world_s():
    world = {**TOY, "captions": {**TOY["captions"], "evaluation": ["a child on a mat", "a dog"], "training": ["a boy", "a cat"]}}
    made, _ = plan("explicit", world=world)
    assert made.explicit and made.dropped == 1 and made.brief.captions == ("a cat",)
    named, _ = plan("explicit", "hazard")  # judged with the task's phrases, which no prompt names
    assert splits(named)["target"] == [""] and {p.text for p in named.prompts if p.split == "target"} == {"a photo of a hazard"}


def test_names_to_keep_come_from_a_file(tmp_path):
    (tmp_path / "keep.txt").write_text("old car\n\n cat \ncat\n")
    assert plan("object", keep=(str(tmp_path / "keep.txt"),))[1].keep == ("old car", "cat")
    long = Own("x", "object", tuple("abcdef"))
    assert long.label.startswith("x (keeps 6 names ") and long.label != replace(long, keep=tuple("abcdeg")).label


# -- calibration ------------------------------------------------------------------------------------------------------


def test_the_threshold_tells_the_two_best_apart():
    own, others = np.array([0.9, 0.8, 0.4, np.nan]), np.array([0.5, 0.2, 0.1])
    # gains: .15 -> 1 - 2/3, .3 -> 1 - 1/3, .45 -> 2/3 - 1/3, .65 -> 2/3 - 0, .85 -> 1/3: of the two best the lower
    assert youden(own, others) == 0.3
    assert youden(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0.5
    assert youden(np.array([0.1]), np.array([0.2])) == 1.2  # beyond all: nothing passes
    assert p_greater(own, others) == pytest.approx(2 / 20)  # U = 8 of 9: {9, 8} of the 20 orders


@pytest.mark.parametrize(
    "hits,n,false,m,message",
    [
        (4, 4, 0, 4, None),  # 1 / 70
        (3, 3, 0, 3, None),  # 1 / 20
        (2, 2, 0, 128, None),  # 1 / 8385
        (3, 4, 1, 4, "3 of 4 of the base's pictures of it pass, and 1 of 4 of what is kept .p = 0.24"),  # 17 / 70
        (0, 8, 0, 8, "does not draw 'my thing'"),
        (2, 8, 6, 8, "does not draw"),
        (2, 2, 0, 2, "too few"),  # 1 / 6 at best
        (0, 0, 0, 9, "too few"),
    ],
)
def test_the_base_must_draw_it_beyond_chance(hits, n, false, m, message):
    flags = lambda hits, n: np.array([1.0] * hits + [0.0] * (n - hits) + [np.nan])
    if message is None:
        return check_drawn("my thing", "clip", flags(hits, n), flags(false, m))
    with pytest.raises(Undrawn, match=message):
        check_drawn("my thing", "clip", flags(hits, n), flags(false, m))


# -- zero-shot CLIP ---------------------------------------------------------------------------------------------------

SHARE = ZeroShotShare(MINI, "thing", ("cat", "dog"), ("a photo",), "a {c}", ("target", "retain", "synonym"))
OWN, CAT, DOG, ELSE = np.eye(4) * 0.2 + 0.1


def scored(split, cosines, concepts, refused=None):
    made = tuple(Prompt(f"{split}/{i}", f"a {c} {i}", i, split, c) for i, c in enumerate(concepts))
    gone = np.zeros(len(made), bool) if refused is None else np.array(refused)
    return Scored(made, {"texts": np.array(cosines), "similarity": np.array(cosines)}, gone)


def zero_shot_scores(target, synonym=(OWN, OWN, ELSE, CAT)):
    retain = [CAT, DOG, CAT, ELSE]
    kept = scored("retain", retain, ["cat", "dog", "dog", "cat"])
    return {
        "target": scored("target", target, ["thing"] * 4),
        "retain": kept,
        "synonym": scored("synonym", synonym, ["thing"] * 4),
    }


def test_zero_shot_by_hand():
    base = zero_shot_scores([OWN] * 4)
    ours = zero_shot_scores([OWN, CAT, ELSE, [np.nan] * 4])
    found = {m.name: m for m in stats.summarize(SHARE.measure(ours, base), SHARE.measure(base, base))}
    value = {name: m.value for name, m in found.items()}
    assert value == {
        "zero_shot_e": pytest.approx(1 / 3),  # of four one has no verdict
        "zero_shot_g": 0.5,
        "zero_shot_s": 0.5,
        "zero_shot_h": pytest.approx(3 / (1 / (2 / 3) + 1 / 0.5 + 1 / 0.5)),
    }
    assert found["zero_shot_e"].n_valid == 3 and found["zero_shot_e"].base_value == 1
    assert SHARE.judge.texts == ("a thing", "a cat", "a dog", "a photo") and SHARE.judge.name == "clip-zero-shot"
    # softmax of 100 cosines: 0.3 against 0.28, 0.1 and 0.1
    near = scored("target", [[0.3, 0.28, 0.1, 0.1], [0.2] * 4], ["thing"] * 2)
    np.testing.assert_allclose(SHARE.confidence(near), [1 / (1 + np.exp(-2)), np.nan], atol=1e-7)
    np.testing.assert_array_equal(SHARE.top1(near), [1, np.nan])


def test_a_concept_that_the_base_does_not_draw_is_not_forgotten():
    base = zero_shot_scores([CAT, DOG, ELSE, OWN])
    with pytest.raises(Undrawn, match="1 of 4 of the base's pictures of it pass, and 0 of 4"):
        SHARE.measure(zero_shot_scores([ELSE] * 4), base)


def test_a_refused_image_is_neither_forgotten_nor_kept():
    base = zero_shot_scores([OWN] * 4)
    ours = {split: replace(side, refused=np.array([True, False, False, False])) for split, side in base.items()}
    value = {m.name: m.value for m in stats.summarize(SHARE.measure(ours, base), SHARE.measure(base, base))}
    assert value["zero_shot_e"] == 1 and value["zero_shot_s"] == 1 / 4


# -- reference pictures -----------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of noise, one of them transparent, and a text beside them."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 4 if i == 3 else 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("of my thing")
    return folder


def reference_scores(target, retain=(0.1, 0.2, 0.3, 0.4)):
    return {"target": scored("target", target, ["thing"] * 4), "retain": scored("retain", retain, ["cat"] * 4)}


def test_reference_pictures_by_hand(pictures):
    share = ReferenceShare(References.of(str(pictures), ClipImages(MINI)), "thing")
    base, ours = reference_scores([0.6, 0.7, 0.8, 0.9]), reference_scores([0.55, 0.45, np.nan, 0.2])
    found = {m.name: m for m in stats.summarize(share.measure(ours, base), share.measure(base, base))}
    assert found["reference_e"].threshold == 0.5 and found["reference_e"].value == pytest.approx(1 / 3)
    assert found["reference_e"].base_value == 1 and found["similarity_e"].value == pytest.approx(0.4)
    with pytest.raises(ErasebenchError, match="no threshold"):
        _ = share.threshold
    fitted = share.calibrated(base)
    assert fitted.threshold == 0.75 and fitted.confidence(ours["target"])[0] == pytest.approx(0.775)
    with pytest.raises(Undrawn, match="the base does not draw 'thing', as references-clip sees it"):
        share.measure(ours, reference_scores([0.1, 0.2, 0.3, 0.35]))
    with pytest.raises(Undrawn, match="too few"):
        share.measure(ours, reference_scores([np.nan] * 4))


def test_similarity_is_the_mean_cosine_with_each_picture(pictures):
    judge = References.of(str(pictures), ClipImages(MINI))
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    own = ClipImages(MINI).score(images, ())["features"]
    each = []
    for file in sorted(pictures.glob("*.png")):
        white = Image.new("RGBA", Image.open(file).size, "white")
        flat = Image.alpha_composite(white, Image.open(file).convert("RGBA")).convert("RGB")
        each.append(ClipImages(MINI).score(torch.from_numpy(np.array(flat))[None], ())["features"][0])
    expected = [np.mean([picture @ image for picture in each]) for image in own]
    np.testing.assert_allclose(judge.score(images, ())["similarity"], expected, atol=1e-6)


def test_its_identity_is_what_the_pictures_are_not_where(pictures, tmp_path):
    ours = References.of(str(pictures), ClipImages(MINI))
    moved = pictures.rename(tmp_path / "elsewhere")
    theirs = References.of(str(moved), ClipImages(MINI))
    assert canonical(ours) == canonical(theirs) and str(tmp_path) not in canonical(ours)
    Image.new("RGB", (9, 9)).save(moved / "0.png")
    assert References.of(str(moved), ClipImages(MINI)).weights() != ours.weights()


def test_faults_of_a_folder_are_one_line(pictures, tmp_path):
    of = partial(reference_of, kind="object", clip=MINI, identity=Identity())
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "0 pictures; at least 3 are needed"), ("absent", "no folder; at least 3 are needed")):
        with pytest.raises(ErasebenchError, match=message):
            of(str(tmp_path / folder), "auto")
    (pictures / "1.png").write_bytes(b"no picture")
    with pytest.raises(ErasebenchError, match="1.png is no readable picture"):
        of(str(pictures), "auto")
    for name in ("1.png", "2.png"):
        (pictures / name).unlink()
    with pytest.raises(ErasebenchError, match="2 pictures; at least 3"):
        of(str(pictures), "clip")
    with pytest.raises(ErasebenchError, match="reference.by=nose: choose from auto, clip, face"):
        of(str(pictures), "nose")


def test_a_person_is_compared_by_the_face(pictures):
    from erasebench.mini import nets

    people = [d for d in nets.drawings("concept") if d["person"]]
    name = people[0]["person"]
    mine = [d["pixels"] for d in people if d["person"] == name]
    (folder := pictures.parent / "person").mkdir()
    for i, pixels in enumerate(mine[:3]):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    judge = reference_of(str(folder), "auto", "person", MINI, Identity())
    assert isinstance(judge.encoder, FaceImages) and judge.name == "references-face"
    other = next(d["pixels"] for d in people if d["person"] != name)
    blank = np.full((64, 64, 3), 128, np.uint8)
    same, another, nobody = judge.score(torch.from_numpy(np.stack([mine[-1], other, blank])), ())["similarity"]
    assert same > 0.5 and same > another + 0.2 and np.isnan(nobody)
    with pytest.raises(ErasebenchError, match="face-images finds something in 0 of 4 pictures; at least 3"):
        reference_of(str(pictures), "face", "person", MINI, Identity())
    assert isinstance(reference_of(str(pictures), "clip", "person", MINI, Identity()).encoder, ClipImages)


# -- hostile scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how,message",
    [
        (lambda a: a + np.inf, "infinite"),
        (lambda a: a[:-1], "rows"),
        (lambda a: np.full_like(a, 0.2), "the same scores"),
        (lambda a: a + 2, "leaves"),
        (lambda a: a.astype(str), "no real numbers"),
    ],
)
@pytest.mark.parametrize("of", ["zero-shot", "references"])
def test_what_is_no_score_is_refused(of, how, message, pictures):
    if of == "zero-shot":
        evaluator, made = SHARE, zero_shot_scores([OWN] * 4)
    else:
        evaluator = ReferenceShare(References.of(str(pictures), ClipImages(MINI)), "thing")
        made = reference_scores([0.6, 0.7, 0.8, 0.9])
    broken = {s: replace(side, arrays={k: how(v) for k, v in side.arrays.items()}) for s, side in made.items()}
    with pytest.raises(ErasebenchError, match=f"judge (clip-zero-shot|references-clip).*{message}"):
        evaluator.measure(broken, broken)


def test_no_verdict_on_any_image_is_no_value():
    base = zero_shot_scores([OWN] * 4)
    ours = zero_shot_scores([[np.nan] * 4] * 4)
    value = {m.name: m.value for m in stats.summarize(SHARE.measure(ours, base), SHARE.measure(base, base))}
    assert value["zero_shot_e"] is None and value["zero_shot_h"] is None and value["zero_shot_s"] == 0.5


# -- runs -------------------------------------------------------------------------------------------------------------


def test_judges_that_know_it_stay_and_identities_differ_by_what_was_said(make_run, pictures):
    of = lambda reference=None, **said: judged(
        make_run("none", NoErasure(), plan=(made := plan("object", **said))[0]), made[1], MINI, reference
    )
    runs = [of(), of(keep=("cat",)), of(keep=("dog",)), of(keep=("cat",), synonyms=("x",)), of(keep=("cat",), synonyms=("y",))]
    runs.append(of(References.of(str(pictures), ClipImages(MINI)), keep=("cat",)))
    Image.new("RGB", (9, 9)).save(pictures / "0.png")
    runs.append(of(References.of(str(pictures), ClipImages(MINI)), keep=("cat",)))
    assert len({run.id for run in runs}) == len(runs)
    assert all("zero_shot" in run.plan.evaluators for run in runs)
    plain = make_run("none", NoErasure())
    assert "own" not in plain.identity()
    task = ObjectTask(evaluators=plain.plan.evaluators)
    known, _ = planned(task, TOY, Asked("object"), None, "airplane", None)
    assert make_run("none", NoErasure(), plan=known).id == plain.id


def carry_out(tmp_path, *words):
    code = config.main(execute, [*words, f"results={tmp_path / 'results'}"])
    return code, rows.read_all(tmp_path / "results" / "runs") if (tmp_path / "results").is_dir() else []


@pytest.mark.parametrize("folder", [False, True])
def test_a_concept_that_no_judge_knows_has_no_accuracy(tmp_path, tiny_folder, caplog, folder):
    """On the embedded model, and on a folder of Stable Diffusion's architecture."""
    caplog.set_level("INFO")
    where = [f"model.path={tiny_folder}"] if folder else []
    code, found = carry_out(tmp_path, "method=uce", "target=my own thing", "kind=object", "images=4", "sampler.steps=2", *where)
    assert code == 0 and {row.target for row in found} == {"my own thing"}
    reason = {row.metric: row.reason for row in found if row.status == "skipped"}
    assert reason["objects"] == "clip does not know my own thing" and reason["presence"] == "drawn does not know my own thing"
    assert "the base does not draw 'my own thing'" in reason["zero_shot"] and "shown_target" not in {row.metric for row in found}
    assert not [row for row in found if row.metric.startswith(("zero_shot_", "acc_")) and row.value is not None]
    assert {"broken_target", "clip_score"} <= {row.metric for row in found if row.status == "ok"}
    said = caplog.text
    assert said.index("skipped (objects): clip does not know") < said.index("loaded ")


def test_pictures_of_it_judge_what_is_drawn_and_attacked(tmp_path):
    """A cat, which the base draws, by pictures of cats; the words of the run repeat it without its folder."""
    from erasebench.mini import nets

    (folder := tmp_path / "cats").mkdir()
    for i, pixels in enumerate(d["pixels"] for d in nets.drawings("concept") if "cat" in d["objects"]):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    code, found = carry_out(
        tmp_path, "method=uce", "target=cat", "keep=[truck,ship]", f"reference.path={folder}", "images=6", "sampler.steps=8",
        "attack=[random_prefix]", "attack.random_prefix.images=1", "attacked=2", "world.judges.presence=null",
    )  # fmt: skip
    assert code == 0, [row.reason for row in found]
    value = {(row.metric, row.attack): row for row in found}
    ours = value["reference_e", ""]
    assert ours.judge == "references-clip" and ours.base_value > ours.value and ours.threshold is not None
    assert ours.target == "cat (keeps truck, ship)"
    assert value["asr", "random_prefix"].status == "ok" and value["asr", "random_prefix"].judge == "clip"  # the fixed one decides
    assert "reference.path=..." in json.loads(ours.overrides)
    with pytest.raises(ErasebenchError, match=r"give reference\.path="):
        config.again(json.loads(ours.overrides))


@pytest.mark.parametrize("words,kept", [(["keep=[a,b]"], True), (["keep=names.txt"], False), (["keep=[x.txt]"], False)])
def test_rows_may_give_names_but_no_file_of_them(tmp_path, monkeypatch, words, kept):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat")
    (tmp_path / "x.txt").write_text("cat")
    ours = ["target=my thing", "kind=object", *words, "synonyms=[thingy]"]
    assert (config.repeatable(ours) == tuple(ours)) == kept
    if kept:
        assert config.again(ours) == ours
    else:
        with pytest.raises(ErasebenchError, match="give keep= if you trust it"):
            config.again(ours)


def test_the_task_follows_the_kind(tmp_path):
    found = {}

    def note(run):
        found[run.target] = run.plan.task, run.plan.concepts[0].kind
        return []

    assert config.main(note, ["-m", "target=Bill Moss,Aldo Verne,church,fire", "images=1"]) == 0
    assert config.main(note, ["-m", "target=Q", "kind=object,person,style,explicit", "task=caption", "images=1"]) == 0
    assert found == {
        "Bill Moss": ("celebrity", "person"), "Aldo Verne": ("style", "style"), "church": ("object", "object"),
        "fire": ("explicit", "explicit"), "Q": ("caption", "explicit"),
    }  # fmt: skip
