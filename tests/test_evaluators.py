"""Metrics from raw scores made by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
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


def test_a_refused_image_neither_shows_the_concept_nor_keeps_one():
    seen = [[0.3, 0.2, 0.1]] * 2
    evaluator, scores = objects(
        scored("target", ["airplane"] * 2, [True, False], texts=seen),
        scored("retain", ["cat"] * 2, [True, False], texts=[[0.1, 0.3, 0.2]] * 2),
        scored("synonym", ["airplane"] * 2, [True, True], texts=seen),
    )
    got = values(metrics(evaluator, scores))
    assert (got["acc_e_top1"], got["acc_s_top1"], got["acc_g_top1"], got["acc_g_prob"]) == (0.5, 0.5, 0.0, 0.0)


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
