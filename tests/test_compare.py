"""Paired comparison of two methods."""

import numpy as np
import pytest
from conftest import Redness
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench import stats
from erasebench.compare import compare, differences, draw
from erasebench.contracts import ErasebenchError, Prompt, Scored


class Rates:
    splits = ("target", "retain")

    def values(self, scores):
        erased, kept = (stats.Part(split, scores[split].arrays["hit"]) for split in self.splits)
        return {"acc_e": [erased], "h": [erased.complement, kept]}


def scored(split, hits):
    prompts = tuple(Prompt(f"{i}", "", i, split, f"concept {i % 4}") for i in range(len(hits)))
    return Scored(prompts, {"hit": np.asarray(hits, float)}, np.zeros(len(hits), bool))


def both(target, retain):
    return {"target": scored("target", target), "retain": scored("retain", retain)}


def test_a_draw_takes_whole_concepts_and_images_within_them():
    concepts = ["a"] * 3 + ["b"] * 3
    for seed in range(20):
        index = draw(concepts, np.random.default_rng(seed))
        assert len(index) == 6 and all(len({concepts[i] for i in half}) == 1 for half in (index[:3], index[3:]))


def test_equal_runs_differ_by_exactly_nothing_and_unequal_ones_by_what_they_do():
    rng = np.random.default_rng(0)
    noisy = both(rng.integers(0, 2, 80), rng.integers(0, 2, 80))
    assert all((d.low, d.high) == (0, 0) for d in differences(Rates(), noisy, noisy, times=50))
    better = both(np.zeros(80), noisy["retain"].arrays["hit"])
    erased, mean = differences(Rates(), noisy, better, times=200)
    assert erased.second == 0 and erased.high < 0 and mean.low > 0
    assert mean.first == pytest.approx(
        stats.harmonic(1 - noisy["target"].arrays["hit"].mean(), noisy["retain"].arrays["hit"].mean())
    )


def test_images_without_a_verdict_take_no_part():
    holes = both([np.nan, 1, 0, 1], [1, 1, 1, 1])
    assert differences(Rates(), holes, holes, times=5)[0].first == pytest.approx(2 / 3)


def test_only_runs_with_the_same_prompts_are_compared(make_run):
    with pytest.raises(ErasebenchError, match="same prompts"):
        compare(make_run("none", NoErasure()), make_run("uce", UCE(), target="cat"))


def test_an_evaluator_without_values_is_left_out(make_run):
    assert (
        compare(make_run("none", NoErasure(), {"redness": Redness()}), make_run("uce", UCE(), {"redness": Redness()}))
        == {}
    )
