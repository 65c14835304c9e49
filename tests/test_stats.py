"""Numbers against computations by hand and known results."""

import numpy as np
import pytest

from erasebench import stats


def test_wilson_against_published_values():
    # Newcombe, Statistics in Medicine 1998, Table I, method 3: 81/263, 15/148, 0/20, 1/29
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        got = stats.wilson(hits, n)
        assert got == pytest.approx((low, high), abs=5e-5)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(20, 20)[1] == 1.0


def part(values, clusters=None, split="target", rate=False):
    values = np.asarray(values, float)
    return stats.Part(split, values, clusters or ["a"] * len(values), rate)


def drawn(*parts):
    made = stats.draws(parts)
    return [made[id(p)] for p in parts]


def metric(*parts, combine=None, before=None):
    measure = lambda parts: stats.Measure("m", "keep", True, tuple(parts), combine)
    return stats.summarize([measure(parts)], [measure(before or parts)])[0]


def test_bootstrap_of_one_cluster_has_the_standard_error_of_the_mean():
    values = np.random.default_rng(1).normal(size=400)
    (draws,) = drawn(part(values))
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.1)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)


def test_clusters_widen_the_interval():
    values = np.repeat([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 50)
    (clustered,) = drawn(part(values, list(np.repeat(list("abcdefgh"), 50))))
    assert clustered.std() == pytest.approx(0.5 / np.sqrt(8), rel=0.1)  # eight opinions, not four hundred
    assert drawn(part(values))[0].std() < clustered.std() / 5


def test_a_draw_takes_whole_clusters_and_images_within_them():
    weights = np.concatenate([*stats.resample(list("aaabbb"), np.random.default_rng(0), 600)])
    assert weights.shape == (600, 6) and (weights.sum(1) == 6).all()
    halves = weights[:, :3].sum(1)
    assert set(halves) == {0, 3, 6} and np.mean(halves == 3) == pytest.approx(0.5, abs=0.07)
    assert weights[halves == 3][:, :3].max() == 3  # an image may be drawn three times within its cluster
    alone = np.concatenate([*stats.resample(list("abcd"), np.random.default_rng(0), 300)])
    assert (alone.sum(1) == 4).all() and alone.mean(0) == pytest.approx(np.ones(4), abs=0.2)


def test_no_verdict_takes_no_part():
    values = np.array([1.0, np.nan, 0.0, np.nan])
    got = metric(part(values, list("abab"), rate=True))
    assert (got.value, got.n, got.n_valid, got.ci_method) == (0.5, 4, 2, "wilson")
    nothing = part(np.full(3, np.nan), list("abc"), split="retain", rate=True)
    empty = metric(nothing)
    assert empty.value is None and empty.n_valid == 0 and empty.n == 3
    both = metric(part(values, list("abab"), rate=True), nothing, combine=lambda a, b: stats.harmonic(a, b))
    assert both.value is None and both.split == "target+retain" and both.n == 7


def test_equal_images_differ_by_exactly_nothing_and_unequal_ones_by_what_they_do():
    rng = np.random.default_rng(0)
    noisy, clusters = rng.integers(0, 2, 80), [f"c{i % 4}" for i in range(80)]
    same = metric(part(noisy, clusters, rate=True))
    assert (same.change_low, same.change_high, same.p_value) == (0, 0, 1.0)
    gone = metric(part(np.zeros(80), clusters, rate=True), before=[part(noisy, clusters, rate=True)])
    assert gone.value == 0 and gone.base_value == noisy.mean() and gone.change_high < 0
    # paired: a shift that every image shares is certain, however much the images differ
    values = rng.normal(size=200)
    shifted = metric(part(values + 1), before=[part(values)])
    assert (shifted.change_low, shifted.change_high) == pytest.approx((1, 1)) and shifted.p_value is None
    h = lambda e, s: stats.harmonic(1 - e, s)
    kept = part(noisy, clusters, "retain", rate=True)
    better = metric(
        part(np.zeros(80), clusters, rate=True), kept, combine=h, before=[part(noisy, clusters, rate=True), kept]
    )
    assert better.base_value == pytest.approx(h(noisy.mean(), noisy.mean())) and better.change_low > 0


def test_mcnemar_by_hand():
    # of five discordant pairs all go one way: 2 / 2^5
    ours, theirs = np.array([0.0] * 5 + [1, 1, np.nan]), np.array([1.0] * 5 + [1, 1, 0])
    assert stats.mcnemar(ours, theirs) == pytest.approx(2 / 32)
    assert stats.mcnemar(ours, ours) == 1.0


def test_harmonic_mean_of_mace_by_hand():
    # MACE Table 1, UCE, airplane: Acc_e 40.32, Acc_s 98.79, Acc_g 49.83 -> H_o 64.09
    assert 100 * stats.harmonic(1 - 0.4032, 0.9879, 1 - 0.4983) == pytest.approx(64.09, abs=0.005)
    assert stats.harmonic(0.0, 1.0) == 0.0
    np.testing.assert_allclose(stats.harmonic(np.array([0.5, 0.0]), np.array([1.0, 1.0])), [2 / 3, 0.0])


def test_unanimous_rates_do_not_claim_certainty():
    (draws,) = drawn(part(np.zeros(100), rate=True))
    assert 0 < np.quantile(draws, 0.975) < 0.05
    perfect = [part(np.zeros(50), rate=True), part(np.ones(50), split="retain", rate=True)]
    got = metric(*perfect, combine=lambda e, s: stats.harmonic(1 - e, s))
    assert got.value == 1.0 and 0.9 < got.low < 1.0 and got.high == 1.0


def test_frechet_of_known_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3))
    assert stats.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert stats.frechet(x, x + [1, 2, 0]) == pytest.approx(5)
    # diagonal covariances: sum of (s1 - s2)^2
    white = np.linalg.qr(rng.normal(size=(40, 4)) - 0)[0]
    white -= white.mean(0)
    white = np.linalg.qr(white)[0] * np.sqrt(39)
    a, b = white[:, :3] * [1, 2, 3], white[:, :3] * [2, 2, 1]
    assert stats.frechet(a, b) == pytest.approx(1 + 0 + 4)


@pytest.mark.parametrize("n, m", [(5, 7), (7, 5), (40, 7), (7, 40), (40, 50)])
def test_frechet_is_the_definition_s_with_fewer_or_more_images_than_features(n, m):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 16)), 2 * rng.normal(size=(m, 16)) + 1
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross
    assert stats.frechet(a, b) == pytest.approx(wanted, rel=1e-6)


def test_intervals_hold_their_value():
    assert stats.interval(np.array([1.0, 2.0, 3.0]), 5.0)[1] == 5.0


def test_a_rate_says_what_its_concepts_are_by_hand():
    nan, names = np.nan, ["cat", "dog", "owl", "cow"]  # nobody was asked for a cow
    shown = part([1, 0, nan, 1, 1, nan], ["dog", "cat", "dog", "cat", "cat", "owl"], rate=True)
    measure = stats.Measure("m", "keep", True, (shown,))
    assert stats.by_concept(measure, names) == {"cat": (2 / 3, 3), "dog": (1.0, 1), "owl": (None, 0)}
    assert list(stats.by_concept(measure, names[::-1])) == ["owl", "dog", "cat"]
    (found,) = stats.summarize([measure], [measure], names)
    assert found.by_concept["cat"] == (2 / 3, 3) and stats.summarize([measure], [measure])[0].by_concept == {}


@pytest.mark.parametrize(
    "changes, clusters",
    [
        ({}, ["cat", "a naked prompt", "dog"]),  # clusters that are no concepts, in whole or in part
        ({}, ["cat", "cat", "cat"]),  # one concept is the metric itself
        ({"group": "quality"}, ["cat", "dog", "dog"]),
        ({"combine": lambda mean: mean}, ["cat", "dog", "dog"]),
    ],
)
def test_nothing_else_is_said_by_concept(changes, clusters):
    known = {
        "name": "m",
        "group": "forget",
        "higher_is_better": False,
        "parts": (part([1, 0, 1], clusters, rate=True),),
    }
    assert stats.by_concept(stats.Measure(**known | changes), ["cat", "dog"]) == {}
    mean = part([0.5, 0.1, 0.2], ["cat", "dog", "dog"])
    assert stats.by_concept(stats.Measure("m", "keep", True, (mean,)), ["cat", "dog"]) == {}
