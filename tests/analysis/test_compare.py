"""Paired comparison of two methods."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE

from erasebench import rows
from erasebench.analysis import compare as module
from erasebench.analysis.compare import compare, differences, names, over_targets, pairs, place
from erasebench.contracts import ErasebenchError, Metric
from erasebench.report import leaderboard


def test_only_runs_with_the_same_prompts_are_compared(make_run):
    with pytest.raises(ErasebenchError, match="same prompts"):
        compare(make_run("none", NoErasure()), make_run("uce", UCE(), target="cat"))


def test_the_difference_is_between_the_two_methods(make_run):
    none, uce = make_run("none", NoErasure()), make_run("uce", UCE())
    (red, change) = compare(none, uce).metrics
    assert red.name == "red" and red.value != red.base_value and red.change_low <= red.value - red.base_value
    assert change.base_value == 0 and change.value == pytest.approx(red.value - red.base_value, abs=1e-6)
    swapped = compare(uce, none).metrics[0]
    assert (swapped.value, swapped.base_value) == (red.base_value, red.value)
    assert swapped.change_low == pytest.approx(-red.change_high, abs=1e-6)


def test_over_targets_by_hand():
    metric = Metric("kept", "retain", 0.0, 0.0, 0.0, "wilson", 4, 4, True, "keep")
    values = [(0.5, 0.6), (0.4, 0.7), (0.3, 0.5), (0.6, 0.7), (0.2, 0.3)]
    found = [[replace(metric, base_value=a, value=b), replace(metric, name="own")] for a, b in values]
    found[0].pop()  # a metric that one target lacks
    (kept,) = over_targets(found)
    assert (kept.base_value, kept.value) == pytest.approx((0.4, 0.56)) and kept.n == 5 * 4
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


def given(monkeypatch, *runs):
    """The command line asks for these runs."""

    def main(job, arguments):
        for run in runs:
            job(run)
        return 0

    monkeypatch.setattr(module.config, "main", main)


def test_a_comparison_is_written_and_shown(make_run, monkeypatch, capsys):
    none, uce = make_run("none", NoErasure()), make_run("uce", UCE())
    given(monkeypatch, none, uce)
    assert module.main([]) == 0
    path = place([(none, uce)])
    assert path.name.startswith("none-vs-uce-") and capsys.readouterr().out.splitlines()[-1] == str(path)
    red, change = rows.read(path, rows.Difference)
    made = compare(none, uce)
    assert (red.first, red.second) == (made.metrics[0].base_value, made.metrics[0].value)
    assert red.difference == red.second - red.first and (red.change_low, red.how) == (
        made.metrics[0].change_low,
        "paired bootstrap, McNemar's p",
    )
    assert (red.first_runs, red.second_runs) == (made.first.head.run_id, made.second.head.run_id)
    assert (red.first_label, red.second_label, red.targets, red.n) == ("none (seed 0)", "uce (seed 0)", "airplane", 5)
    before = path.read_bytes()
    assert module.main([]) == 0 and path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    groups, _ = leaderboard.load(none.results)
    ((comparison,), problems) = leaderboard.comparisons(none.results, groups)
    assert comparison.title == "none (seed 0) vs uce (seed 0)" and not problems and not comparison.verified


def test_over_targets_says_which_and_how(make_run):
    paired = pairs([make_run("uce", UCE(ridge=r), target=t) for r in (0.5, 2.0) for t in ("cat", "dog")])
    found = differences(paired, [compare(*pair) for pair in paired])
    assert (found[0].targets, found[0].how) == ("cat, dog", "bootstrap over 2 targets, sign-flip p")
    assert len(found[0].first_runs.split()) == 2 and found[0].second_label == "uce (ridge=2.0, seed 0)"
    assert place(paired).name.startswith("ridge_0_5-vs-ridge_2_0-")
    assert all(d.change_low <= d.difference <= d.change_high for d in found)


def test_a_folder_that_cannot_be_written_is_one_line(make_run, monkeypatch, capsys):
    none, uce = make_run("none", NoErasure()), make_run("uce", UCE())
    none.results.mkdir()
    (none.results / "comparisons").write_text("")
    given(monkeypatch, none, uce)
    assert module.main([]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write ")


@pytest.mark.parametrize(
    "changes, ends",
    [
        ({}, "↓     64   -0.300 [-0.400, -0.200] *"),
        (dict(n=19), "↓     19   -0.300 [-0.400, -0.200]"),
        (dict(change_low=-0.4, change_high=0.1), "↓     64   -0.300 [-0.400, +0.100]"),
        (dict(higher_is_better=True, p_value=0.01), "↑     64   -0.300 [-0.400, -0.200] *  p = 0.01"),
    ],
)
def test_a_star_needs_twenty_pairs_and_an_interval_without_zero(changes, ends):
    values = dict(metric="acc_e", first=0.5, second=0.2, difference=-0.3, change_low=-0.4, change_high=-0.2, n=64)
    values |= dict(higher_is_better=False, p_value=None) | changes
    assert module.line(SimpleNamespace(**values)).endswith(ends)
