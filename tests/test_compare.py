"""Paired comparison of two methods."""

import pytest
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench.compare import compare
from erasebench.contracts import ErasebenchError


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
