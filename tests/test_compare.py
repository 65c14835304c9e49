"""Paired comparison of two methods."""

from dataclasses import replace

import pytest
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench.compare import compare, names, over_targets, pairs
from erasebench.contracts import ErasebenchError, Metric


def test_only_runs_with_the_same_prompts_are_compared(make_run):
    with pytest.raises(ErasebenchError, match="same prompts"):
        compare(make_run("none", NoErasure()), make_run("uce", UCE(), target="cat"))


def test_the_difference_is_between_the_two_methods(make_run):
    none, uce = make_run("none", NoErasure()), make_run("uce", UCE())
    (red, change) = compare(none, uce)
    assert red.name == "red" and red.value != red.base_value and red.change_low <= red.value - red.base_value
    assert change.base_value == 0 and change.value == pytest.approx(red.value - red.base_value, abs=1e-6)
    swapped = compare(uce, none)[0]
    assert (swapped.value, swapped.base_value) == (red.base_value, red.value)
    assert swapped.change_low == pytest.approx(-red.change_high, abs=1e-6)


def test_over_targets_by_hand():
    metric = Metric("kept", "retain", 0.0, 0.0, 0.0, "wilson", 4, 4, True, "keep")
    values = [(0.5, 0.6), (0.4, 0.7), (0.3, 0.5), (0.6, 0.7), (0.2, 0.3)]
    found = [[replace(metric, base_value=a, value=b), replace(metric, name="own")] for a, b in values]
    found[0].pop()  # a metric that one target lacks
    (kept,) = over_targets(found)
    assert (kept.base_value, kept.value) == pytest.approx((0.4, 0.56))
    assert kept.p_value == 2 / 32  # all five the same way: one of 32 sign patterns, and its mirror
    assert 0.1 - 1e-9 <= kept.change_low < 0.16 < kept.change_high <= 0.3
    even = over_targets([[replace(metric, base_value=0.5, value=0.5 + d)] for d in (0.1, -0.1)])[0]
    assert even.p_value == 1 and even.change_low < 0 < even.change_high


def test_runs_are_paired_by_what_they_were_shown(make_run):
    runs = [make_run("uce", UCE(ridge=r), target=t) for r in (0.5, 2.0) for t in ("cat", "dog")]
    assert [(a.target, a.eraser.ridge, b.eraser.ridge) for a, b in pairs(runs)] == [
        ("cat", 0.5, 2.0),
        ("dog", 0.5, 2.0),
    ]
    assert (
        names(runs[0], runs[2]) == ("ridge=0.5", "ridge=2.0")
        and names(runs[0], make_run("none", NoErasure()))[1] == "none"
    )
    with pytest.raises(ErasebenchError, match="not 1 of dog"):
        pairs(runs[:3])
