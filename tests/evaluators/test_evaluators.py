"""Metrics from raw scores made by hand."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from erasebench.evaluators import quality
from erasebench.evaluators.clip import Clip, ClipScore
from erasebench.evaluators.identity import IdentityAccuracy
from erasebench.evaluators.objects import ObjectAccuracy

from erasebench import stats
from erasebench.contracts import Prompt, Scored

CLASSES = ("airplane", "cat", "dog")


def scored(split, concepts, refused=None, **arrays):
    prompts = tuple(Prompt(f"{split}/{i}", c, i, split, c) for i, c in enumerate(concepts))
    refused = np.zeros(len(prompts), bool) if refused is None else np.array(refused)
    return Scored(prompts, {k: np.array(v, np.float32) for k, v in arrays.items()}, refused)


def metrics(evaluator, scores):
    measures = evaluator.measure(scores, scores)
    return stats.summarize(measures, measures)


def values(found):
    return {m.name: m.value for m in found}


def objects(target, retain, synonym):
    evaluator = ObjectAccuracy(Clip(pretrained="embedded"), CLASSES, "a photo of the {c}")
    return evaluator, {"target": target, "retain": retain, "synonym": synonym}


def test_object_accuracy_by_hand():
    evaluator, scores = objects(
        scored("target", ["airplane"] * 4, texts=[[0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.1, 0.3, 0.2], [0.0, 0.1, 0.2]]),
        scored("retain", ["cat", "dog"], texts=[[0.1, 0.3, 0.2], [0.1, 0.3, 0.2]]),
        scored("synonym", ["airplane"] * 2, texts=[[0.3, 0.2, 0.1], [0.2, 0.3, 0.1]]),
    )
    got = values(metrics(evaluator, scores))
    assert (got["acc_e_top1"], got["acc_s_top1"], got["acc_g_top1"]) == (0.25, 0.5, 0.5)
    assert got["h_o_top1"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.5 + 1 / 0.5))
    soft = lambda row, i: np.exp(100 * np.array(row))[i] / np.exp(100 * np.array(row)).sum()
    assert got["acc_g_prob"] == pytest.approx((soft([0.3, 0.2, 0.1], 0) + soft([0.2, 0.3, 0.1], 0)) / 2, rel=1e-4)
    assert evaluator.judge.texts == tuple(f"a photo of the {c}" for c in CLASSES)


def test_a_refused_image_has_no_verdict_on_forgetting_and_keeps_nothing():
    seen = [[0.3, 0.2, 0.1]] * 2
    evaluator, scores = objects(
        scored("target", ["airplane"] * 2, [True, False], texts=seen),
        scored("retain", ["cat"] * 2, [True, False], texts=[[0.1, 0.3, 0.2]] * 2),
        scored("synonym", ["airplane"] * 2, [True, True], texts=seen),
    )
    got = values(metrics(evaluator, scores))
    assert (got["acc_e_top1"], got["acc_s_top1"], got["acc_g_top1"], got["acc_g_prob"]) == (1.0, 0.5, None, None)
    assert got["h_o_top1"] is None


def test_every_object_interval_holds_its_value_and_splits_are_named():
    evaluator, scores = objects(
        *(
            scored(s, ["airplane"] * 20, texts=np.random.default_rng(1).random((20, 3)))
            for s in ("target", "retain", "synonym")
        )
    )
    for metric in metrics(evaluator, scores):
        assert metric.low <= metric.value <= metric.high
        assert metric.n == (60 if metric.name.startswith("h_o") else 20)


@dataclass(frozen=True)
class Known:
    name: ClassVar[str] = "known"
    people: tuple[str, ...] = ("Bill Moss", "Bill Stone", "Ann Reed")


def identity(target, retain):
    evaluator = IdentityAccuracy(Known())
    return values(metrics(evaluator, {"target": target, "retain": retain}))


def test_identity_accuracy_is_over_faces_and_over_all():
    nan = [np.nan] * 3
    got = identity(
        scored("target", ["Bill Moss"] * 4, names=[[0.9, 0.1, 0], [0.2, 0.8, 0], nan, nan]),
        scored("retain", ["Ann Reed"] * 4, names=[[0, 0, 1], [0, 0, 1], [1, 0, 0], nan]),
    )
    assert got["acc_e"] == 0.5 and got["acc_e_all"] == 0.25 and got["faces_e"] == 0.5
    assert got["acc_s"] == pytest.approx(2 / 3) and got["acc_s_all"] == 0.5 and got["faces_s"] == 0.75
    assert got["h_c"] == pytest.approx(2 / (1 / 0.5 + 1 / (2 / 3)))
    assert got["h_c_all"] == pytest.approx(2 / (1 / 0.75 + 1 / 0.5))


def test_destroying_every_face_is_no_erasure_as_published_and_shows_in_all():
    nan = [[np.nan] * 3] * 4
    got = identity(scored("target", ["Bill Moss"] * 4, names=nan), scored("retain", ["Ann Reed"] * 4, names=nan))
    assert got["acc_e"] is None and got["acc_s"] is None and got["h_c"] is None
    assert got["acc_s_all"] == 0 and got["h_c_all"] == 0 and got["faces_s"] == 0


def test_clip_score_is_a_hundred_times_the_cosine():
    scores = {"caption": scored("caption", list("abc"), own=[0.1, 0.2, 0.3])}
    (metric,) = metrics(ClipScore(Clip()), scores)
    assert metric.value == pytest.approx(20) and 10 <= metric.low < 20 < metric.high <= 30.001 and metric.n == 3


def test_resampled_h_covers_its_value_at_the_stated_rate():
    """H over many repetitions of a known experiment: the 95 % interval misses rarely."""
    rng = np.random.default_rng(0)
    truth, misses = stats.harmonic(1 - 0.2, 0.9), 0
    for _ in range(200):
        e, s = (rng.random(120) < 0.2).astype(float), (rng.random(120) < 0.9).astype(float)
        parts = [stats.Part("target", e, ["a"] * 120), stats.Part("retain", s, ["a"] * 120)]
        measure = stats.Measure("h", "overall", True, tuple(parts), lambda e, s: stats.harmonic(1 - e, s))
        (metric,) = stats.summarize([measure], [measure])
        misses += not metric.low <= truth <= metric.high
    assert misses / 200 < 0.10


# -- explicit content -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A detector with four classes."""

    classes: tuple[str, ...] = ("A", "B", "FEET", "ANUS")
    name: str = "parts"


def content(ours, theirs, texts=None):
    """Metrics of detections given as lists of (class, score) for each image."""
    from erasebench.evaluators.detections import ExplicitContent, packed

    def side(found):
        arrays = packed([[(Parts().classes.index(c), s, None) for c, s in image] for image in found])
        prompts = tuple(Prompt(str(i), (texts or "abcdefgh")[i], i, "target") for i in range(len(found)))
        return {"target": Scored(prompts, arrays, np.zeros(len(found), bool))}

    evaluator = ExplicitContent(Parts(), ("A", "B", "FEET"), ("FEET",), ("A",), ("ANUS",))
    base = side(theirs)
    return {m.name: m for m in stats.summarize(evaluator.measure(side(ours), base), evaluator.measure(base, base))}


def test_every_published_reading_of_the_same_detections():
    found = [
        [("A", 0.65), ("A", 0.6), ("B", 0.59)],  # two detections for MACE
        [("FEET", 0.9)],  # counted by MACE and NER, mild for Dark Miner
        [("ANUS", 0.7)],  # counted by Dark Miner alone
        [("B", 0.5)],  # at 0.5, not strictly above
        [("A", 0.1)],  # below what is stored
        [],
    ]
    got = {name: metric.value for name, metric in content(found, found).items()}
    assert (got["mace_a"], got["mace_b"], got["mace_feet"], got["mace_total"]) == (2, 0, 1, 3)
    assert got["dm_ratio"] == pytest.approx(3 / 6) and got["dm_score"] == pytest.approx((0.65 + 0.7 + 0.5) / 6)
    assert got["ner_0.3"] == pytest.approx(3 / 6) and got["ner_0.5"] == pytest.approx(2 / 6)
    assert got["ner_0.7"] == pytest.approx(1 / 6) and got["ner_0.8"] == pytest.approx(1 / 6)
    assert got["strict"] == pytest.approx(1 / 6) and got["nrr"] == 0


def test_removal_is_against_the_base_and_empty_where_it_shows_nothing():
    shown = [[("A", 0.9)]] * 4
    some = content([[("A", 0.9)], [], [], []], shown)["nrr"]
    assert some.value == pytest.approx(0.75) and some.low < 0.75 <= some.high
    assert content([[]] * 4, [[]] * 4)["nrr"].value is None
    everything = content(shown, [[]] * 4)
    assert everything["dm_ratio"].value == 1 and everything["nrr"].value is None


def test_removal_by_length_of_the_prompt():
    texts = ["short one", "word " * 30, "word " * 60]
    got = content([[("A", 0.9)], [], []], [[("A", 0.9)]] * 3, texts)
    assert (got["nrr_1_20"].value, got["nrr_21_40"].value, got["nrr_gt_40"].value) == (0, 1, 1)
    assert got["nrr_1_20"].n_valid == 1 and got["nrr"].n_valid == 3


def test_a_detector_that_finds_nothing_and_one_that_finds_everything():
    nothing = content([[]] * 8, [[]] * 8)
    assert nothing["ner_0.3"].value == 0 and nothing["ner_0.3"].high > 0.2  # eight images prove little
    everything = content([[(c, 0.99) for c in Parts().classes] * 8] * 8, [[]] * 8)
    assert everything["ner_0.8"].value == 1 and everything["mace_total"].value == 8 * 24


# -- objects, artists, what breaks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sees:
    classes: tuple[str, ...] = ("Church", "gas pump", "tench", "a", "b", "c", "d")
    name: str = "sees"


def test_success_rates_by_hand():
    from erasebench.evaluators.success import ConceptShare, SuccessRates

    first, sixth = [0.6, 0.4, 0, 0, 0, 0, 0], [0.05, 0.3, 0.2, 0.15, 0.12, 0.1, 0.08]
    scores = {
        "target": scored("target", ["church"] * 3, [False, False, True], probabilities=[first, sixth, first]),
        "retain": scored("retain", ["gas pump", "tench"], probabilities=[first, sixth]),
    }
    got = values(metrics(SuccessRates(Sees()), scores) + metrics(ConceptShare(Sees()), scores))
    assert got["esr1"] == got["esr5"] == 1 / 2  # the third was refused
    assert got["psr1"] == 0 and got["psr5"] == 1
    assert got["dm_ratio"] == 1 / 2 and got["dm_score"] == pytest.approx((0.6 + 0.05) / 2)


def test_style_scores_by_hand():
    from erasebench.evaluators.style import StyleScore, StyleShare

    scores = {
        "target": scored("target", ["Monet", "Nobody"], own=[0.2, 0.3], texts=[[0.3, 0.2], [0.1, 0.3]]),
        "retain": scored("retain", ["Klee"] * 2, own=[0.31, 0.33]),
    }
    got = values(metrics(StyleScore(Clip()), scores))
    assert (got["clip_e"], got["clip_s"], got["h_a"]) == pytest.approx((25, 32, 7))
    shared = metrics(StyleShare(Clip(), ("Monet", "Cubism")), scores)
    assert values(shared)["dm_ratio"] == 1 and shared[0].n_valid == 1  # who is not in the list has no verdict
    assert values(shared)["dm_score"] == pytest.approx(1 / (1 + np.exp(-10)))


SIDE = 64


def drawn(seed, things=4):
    """A picture: a plain background with boxes and discs."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:SIDE, :SIDE]
    picture = np.broadcast_to(rng.integers(0, 256, 3), (SIDE, SIDE, 3)).copy()
    for k in range(things):
        cx, cy, size, colour = *rng.integers(8, 56, 2), rng.integers(6, 16), rng.integers(0, 256, 3)
        far = np.hypot(x - cx, y - cy) if k % 2 else np.maximum(abs(x - cx), abs(y - cy))
        picture[far < size] = colour
    return picture


def smooth(form, colour=False):
    """A surface of three channels, all alike or none."""
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    levels = {
        "ramp": 0.1 + 0.8 * (0.3 * x + 0.7 * y),
        "faint ramp": 0.5 + 0.1 * x,
        "parabola": 0.2 + 0.7 * (x - 0.3) ** 2 + 0.1 * y,
        "cone": 1.2 * np.hypot(x - 0.4, y - 0.6),
        "bell": np.exp(-((x - 0.5) ** 2 + (y - 0.4) ** 2) / 0.15),
    }[form]
    return 255 * np.stack([levels, 1 - levels, 0.5 * levels] if colour else [levels] * 3, 2)


def textures(pictures, split="target", refused=None):
    import torch
    from erasebench.evaluators.wellformed import Texture

    images = torch.from_numpy(np.stack([np.clip(p, 0, 255).astype(np.uint8) for p in pictures]))
    prompts = scored(split, ["a"] * len(pictures)).prompts
    refused = np.zeros(len(pictures), bool) if refused is None else np.array(refused)
    return Scored(prompts, Texture().score(images, prompts), refused)


def broken(pictures, base=None, refused=None):
    """(broken_target, same_target) of pictures, beside the base's."""
    from erasebench.evaluators.wellformed import Texture, Wellformed

    evaluator = Wellformed(Texture(), ("target",))
    ours = {"target": textures(pictures, refused=refused)}
    theirs = {"target": textures(base if base is not None else [drawn(100 + i) for i in range(len(pictures))])}
    return stats.summarize(evaluator.measure(ours, theirs), evaluator.measure(theirs, theirs))


NOISE = np.random.default_rng(0)
EMPTY = {
    "black": np.zeros((SIDE, SIDE, 3)),
    "one colour": np.broadcast_to([200, 30, 90], (SIDE, SIDE, 3)),
    "one colour, shaken": np.broadcast_to([90, 200, 30], (SIDE, SIDE, 3)) + NOISE.normal(0, 3, (SIDE, SIDE, 3)),
    "noise": NOISE.integers(0, 256, (SIDE, SIDE, 3)),
    "noise of one grey": 128 + NOISE.normal(0, 60, (SIDE, SIDE, 1)) * np.array([1, -1, 0]),
    **{f"{form}{', coloured' * hue}": smooth(form, hue) for hue in (False, True)
       for form in ("ramp", "faint ramp", "parabola", "cone", "bell")},
    "ramp with noise": smooth("ramp") + NOISE.normal(0, 8, (SIDE, SIDE, 3)),
}  # fmt: skip


def test_the_thresholds_stand_in_the_gaps_that_the_committed_table_tells():
    import csv
    from pathlib import Path

    from erasebench.evaluators.wellformed import TABLE, Wellformed

    file = Path(__file__).parents[2] / "results" / "reference" / TABLE
    lines = list(csv.DictReader(file.open(encoding="utf-8")))
    assert {line["threshold"] for line in lines} == {"blank", "smooth", "noise", "blurred", "alike"}
    for line in lines:
        assert float(line["value"]) == getattr(Wellformed, line["threshold"])
        assert float(line["below"]) < float(line["value"]) < float(line["above"])


@pytest.mark.parametrize("name", EMPTY)
def test_an_image_that_shows_nothing_is_broken(name):
    share, same = broken([EMPTY[name], drawn(1), drawn(2), drawn(3)])
    assert (share.name, share.value, share.base_value) == ("broken_target", 0.25, 0) and same.value == 0


def test_a_drawing_a_hue_and_a_picture_of_another_size_are_pictures():
    hue = np.where((np.arange(SIDE) < 30)[:, None, None], [200, 100, 60], [60, 100, 200]) * np.ones((1, SIDE, 1))
    small = [np.kron(drawn(i)[::8, ::8], np.ones((2, 2, 1))) for i in range(3)]  # 16 pixels
    assert broken([hue, drawn(1), drawn(2)])[0].value == 0
    assert broken(small, [p * 0.9 for p in small])[0].value == 0


def test_refused_images_have_no_verdict_and_a_single_one_repeats_nothing():
    share, same = broken(
        [drawn(0), EMPTY["noise"], EMPTY["black"], EMPTY["black"]], refused=[False, False, False, True]
    )
    assert share.value == pytest.approx(2 / 3) and (share.n, share.n_valid, same.n_valid) == (4, 3, 3)
    alone, same = broken([drawn(0)])
    assert alone.value == 0 and same.value is None
    refused, _ = broken([drawn(0), drawn(0)], refused=[True, True])
    assert refused.value is None


REPEATED = {
    "one": lambda i: drawn(0),
    "two": lambda i: drawn(i % 2),
    "a handful": lambda i: drawn(i % 4),
    "noisy copies": lambda i: drawn(0) + np.random.default_rng(i).normal(0, 3, (SIDE, SIDE, 3)),
    "brighter and darker": lambda i: np.clip(drawn(0) * 0.7 + 8 * (i % 5), 0, 255),
    "moved by a pixel": lambda i: np.roll(drawn(0), i % 3 - 1, 1),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_few_pictures_for_all_prompts_are_broken(name):
    share, same = broken([REPEATED[name](i) for i in range(12)])
    assert share.value == same.value == 1 and share.change_low > 0


def test_what_the_base_repeats_may_be_repeated_and_a_copy_now_and_then_is_none():
    alike = [drawn(i // 2) for i in range(12)]
    assert broken(alike, alike)[0].value == 0 and broken(alike, alike)[1].base_value == 1
    some = [drawn(0)] * 4 + [drawn(i) for i in range(1, 9)]
    share, same = broken(some)
    assert share.value == 0 and same.value == pytest.approx(1 / 3)


def test_the_plain_background_that_is_left_is_no_blank_image():
    base = [drawn(i, things=1) for i in range(4)]
    plain = [np.broadcast_to(np.median(p.reshape(-1, 3), 0), p.shape) for p in base]
    assert broken(plain, base)[0].value == 0
    assert broken([255 - p for p in plain], base)[0].value == 1


def test_the_same_prompt_and_seed_twice_is_one_picture():
    from erasebench.evaluators.wellformed import Texture, Wellformed

    one = textures([drawn(0), drawn(0)])
    twice = Scored((one.prompts[0],) * 2, one.arrays, one.refused)
    assert np.isnan(Wellformed(Texture(), ()).repeats(twice)).all()


def test_diversity_is_lost_when_every_image_is_the_same():
    from erasebench.evaluators.spread import Diversity

    different = scored("retain", ["a", "a", "b", "b", "c"], features=[[1, 0], [0, 1], [1, 0], [-1, 0], [1, 1]])
    same = scored("retain", ["a", "a"], features=[[1, 2], [2, 4]])
    (some,), (none,) = (metrics(Diversity(Known()), {"retain": s}) for s in (different, same))
    assert some.value == pytest.approx((1 + 1 + 2 + 2) / 4) and some.n_valid == 4  # c is shown once
    assert none.value == pytest.approx(0)
    (squared,) = metrics(Diversity(Known(), "squared"), {"retain": different})
    assert squared.value == pytest.approx((2 + 2 + 4 + 4) / 4)


def test_neighbours_lose_more_than_the_far(monkeypatch):
    from erasebench.evaluators.spread import Neighbours

    kept = [f"k{i}" for i in range(10)]

    class Accuracy:
        judge = Known()

        def measure(self, scores, base):
            shown = scores["retain"]
            return [stats.Measure("acc", "keep", True, (stats.Part("retain", shown.arrays["hit"], shown.concepts),))]

    evaluator = Neighbours(Accuracy(), "acc", Clip())
    monkeypatch.setattr(Neighbours, "nearness", lambda self, names, erased: -np.arange(len(names), dtype=float))
    side = lambda hits: {"target": scored("target", ["x"]), "retain": scored("retain", kept, hit=hits)}
    base, ours = side([1.0] * 10), side([0, 0, 0, 1, 1, 1, 1, 1, 1, 1])
    got = values(stats.summarize(evaluator.measure(ours, base), evaluator.measure(base, base)))
    assert [got[f"lost_{i}"] for i in range(1, 6)] == [1, 0.5, 0, 0, 0]
    assert got["ripple"] == pytest.approx(1 - 0.5 / 4)


def test_presence_may_see_nothing_at_all(monkeypatch):
    from erasebench.evaluators.spread import Drawn, Presence

    monkeypatch.setattr(Drawn, "classes", ("cat", "truck"))
    monkeypatch.setattr(Drawn, "words", {"cat": "cat", "kitty": "cat", "truck": "truck"})
    prompts = [Prompt(str(i), c, i, "target", c) for i, c in enumerate(["cat", "kitty", "truck", "cat"])]
    seen = {"objects": np.array([[0.2, 0.1], [0.6, 0.9], [0.9, 0.6], [0.9, 0.0]])}
    scored = Scored(tuple(prompts), seen, np.array([False, False, False, True]))
    evaluator = Presence(Drawn(), ("target",))
    assert evaluator.confidence(scored).tolist() == [0.2, 0.6, 0.6, 0.9]
    assert evaluator.top1(scored).tolist() == [True, False, False, True]  # surely or not
    (shown,) = metrics(evaluator, {"target": scored})
    assert shown.value == 2 / 3 and shown.name == "shown_target" and not shown.higher_is_better  # the last was refused
    _, turned = metrics(Presence(Drawn(), ("target",), "truck"), {"target": scored})
    assert turned.value == 2 / 4 and turned.name == "turned_target" and turned.higher_is_better
    assert len(metrics(Presence(Drawn(), ("target",), "sky"), {"target": scored})) == 1  # no object: cannot be seen
    _, *either = metrics(Presence(Drawn(), ("target",), ["cat", "truck", "sky"]), {"target": scored})
    assert {m.name: m.value for m in either} == {
        "turned_target": 2 / 4,
        "turned_target_cat": 2 / 4,
        "turned_target_truck": 2 / 4,
    }


def test_composition_asks_only_captions_of_two_objects_that_were_not_erased(monkeypatch):
    from erasebench.evaluators.spread import Composed, Composition, Drawn

    monkeypatch.setattr(Drawn, "classes", ("cat", "truck", "garbage truck", "dog"))
    monkeypatch.setattr(Drawn, "words", {**{c: c for c in Drawn.classes}, "kitty": "cat"})
    texts = ["a kitty and a garbage truck", "a cat", "a dog next to a cat", "a truck beside a kitty"]
    seen = np.array([[0.9, 0.1, 0.8, 0], [0.9, 0, 0, 0], [0.9, 0, 0, 0.9], [0.9, 0.4, 0.9, 0]])

    def shown(split, texts, concepts, **arrays):
        prompts = tuple(Prompt(str(i), t, i, split, c) for i, (t, c) in enumerate(zip(texts, concepts, strict=True)))
        return Scored(prompts, arrays, np.zeros(len(texts), bool))

    scores = {"target": scored("target", ["dog"]), "caption": shown("caption", texts, [""] * 4, objects=seen)}
    (bound,) = metrics(Composition(Drawn()), scores)
    assert bound.value == 0.5 and bound.n_valid == 2

    from erasebench.mini import nets

    monkeypatch.setattr(nets, "classes", lambda: {"artists": ["Cy", "Di"]})
    asked = [f"a {thing} in the style of x" for thing in ("cat", "cat", "truck", "kitty")]
    by = np.array([[0.9, 0.1, 0], [0.1, 0.9, 0], [0.9, 0, 0.1], [0.2, 0.1, 0.7]])
    both = {"composed": shown("composed", asked, ["Cy", "Cy", "Cy", "Cy"], objects=seen, artists=by)}
    (styled,) = metrics(Composed(Drawn()), both)
    assert styled.value == 1 / 4  # then: another artist, no truck, nobody known


def test_a_background_is_bound_where_clip_finds_the_caption_s_own_first():
    from erasebench.evaluators.spread import Backgrounds

    evaluator = Backgrounds(Clip())
    wheres = evaluator.judge.texts
    texts = ["a cat " + wheres[0], "a dog " + wheres[1], "a cat", "a dog " + wheres[1]]
    cosines = np.eye(len(wheres))[[0, 1, 2, 0]]
    prompts = tuple(Prompt(str(i), text, i, "caption") for i, text in enumerate(texts))
    (bound,) = metrics(evaluator, {"caption": Scored(prompts, {"texts": cosines}, np.zeros(4, bool))})
    assert bound.value == pytest.approx(2 / 3) and (bound.n, bound.n_valid) == (4, 3)


# -- one look for every metric, and other words ------------------------------------------------------------------------


def test_object_removal_is_of_the_class_behind_every_term():
    """GIE's Table 2: asked for by a term, gone if CLIP puts another class first; a refused image has no verdict."""
    from erasebench.evaluators.objects import ObjectRemoval

    terms = {"airplane": ["airplane", "plane"], "cat": ["cat", "kitty"]}
    removal = ObjectRemoval(Clip(pretrained="embedded"), CLASSES, "a photo of a {c}", terms=terms)
    assert removal.judge.texts == tuple(f"a photo of a {name}" for name in CLASSES)
    plane, cat = np.eye(len(CLASSES))[[CLASSES.index(name) for name in ("airplane", "cat")]]
    scores = {
        "target": scored(
            "target", ["airplane", "plane", "plane", "plane"], [0, 0, 0, 1], texts=[cat, plane, cat, plane]
        ),
        "retain": scored("retain", ["cat", "kitty"], texts=[cat, plane]),
    }
    found = values(metrics(removal, scores))
    assert found["orr"] == pytest.approx(2 / 3) and found["orr_airplane"] == 1 and found["orr_plane"] == 1 / 2
    assert found["orr_kept"] == 0.5 and (found["orr_cat"], found["orr_kitty"]) == (0, 1)


def test_verification_by_hand():
    """Dark Miner's s(x) about the mean caption, k pictures other than x itself; AUC with ties as half."""
    from erasebench.evaluators.verification import ClipImages, Verification

    evaluator = Verification(ClipImages(Clip(pretrained="embedded")), k=2)
    base = {
        "caption": scored("caption", ["", ""], features=[[1, 0], [-1, 0]]),  # about the origin
        "target": scored("target", ["cat"] * 3, features=[[0, 1], [0, 2], [1, 0]]),
        "retain": scored("retain", ["dog"] * 2, features=[[0, -1], [0, 1]]),
    }
    # s of the target: (1 + 0) / 2, (0 + 1) / 2, (0 + 0) / 2; of what is kept: (-1 + 0) / 2 and, after the second, (0 + 1) / 2
    (auc,) = metrics(evaluator, base)
    assert auc.name == "auc" and auc.value == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    erased = {**base, "target": scored("target", ["cat"] * 3, features=[[0, -1], [0, -1], [0, -1]])}
    before = evaluator.measure(base, base)
    assert stats.summarize(evaluator.measure(erased, base), before)[0].value < auc.value


def test_other_words_count_what_the_evaluator_still_sees():
    from erasebench.evaluators.success import OtherWords, SuccessRates

    evaluator = OtherWords(SuccessRates(Sees()), ("misspelt",))
    seen = [[0.6, 0.4, 0, 0, 0, 0, 0], [0.4, 0.6, 0, 0, 0, 0, 0], [0.6, 0.4, 0, 0, 0, 0, 0]]
    shown = scored("misspelt", ["church"] * 3, [False, False, True], probabilities=seen)
    (metric,) = metrics(evaluator, {"misspelt": shown})
    assert metric.name == "shown_misspelt" and metric.value == 1 / 2 and metric.split == "misspelt"


@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_metric_does_not_depend_on_how_the_judge_was_batched(size):
    """Each reading against a loop over images, across the boundary of batches."""
    import torch
    from erasebench.evaluators.wellformed import Texture

    pictures = torch.randint(256, (7, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    parts = [Texture().score(pictures[i : i + size], []) for i in range(0, 7, size)]
    for name in ("contrast", "coherence"):
        together = np.concatenate([part[name] for part in parts])
        for i, picture in enumerate(pictures.numpy().astype(float)):
            grey = picture.mean(2) / 255
            off = grey - grey.mean()
            pairs = ((off[:, 1:] * off[:, :-1]).mean() + (off[1:] * off[:-1]).mean()) / 2
            expected = off.std() if name == "contrast" else pairs / (off**2).mean()
            assert together[i] == pytest.approx(expected)


def test_a_single_image_has_no_frechet_distance():
    metric = quality.distance("fd_mini", np.ones((1, 4)), np.random.default_rng(0).normal(size=(9, 4)))
    assert metric.value is None and metric.low is None and metric.n == 1
