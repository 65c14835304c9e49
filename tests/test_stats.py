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


def test_bootstrap_of_one_cluster_has_the_standard_error_of_the_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    draws = stats.resample(values, ["a"] * 400, np.random.default_rng(0))
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.1)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)


def test_clusters_widen_the_interval():
    values = np.repeat([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0], 50)
    labels = np.repeat(list("abcdefgh"), 50)
    clustered = stats.resample(values, labels, np.random.default_rng(0)).std()
    assert clustered == pytest.approx(0.5 / np.sqrt(8), rel=0.1)  # eight opinions, not four hundred
    assert stats.resample(values, ["one"] * 400, np.random.default_rng(0)).std() < clustered / 5


def test_no_verdict_takes_no_part():
    values = np.array([1.0, np.nan, 0.0, np.nan])
    metric = stats.mean_metric("m", "s", values, ["a", "b", "a", "b"], True, "keep", rate=True)
    assert (metric.value, metric.n, metric.n_valid, metric.ci_method) == (0.5, 4, 2, "wilson")
    empty = stats.mean_metric("m", "s", np.full(3, np.nan), list("abc"), True, "keep", rate=True)
    assert empty.value is None and empty.n_valid == 0 and empty.n == 3
    assert stats.harmonic_metric("h", [metric, empty], None).value is None


def test_harmonic_mean_of_mace_by_hand():
    # MACE Table 1, UCE, airplane: Acc_e 40.32, Acc_s 98.79, Acc_g 49.83 -> H_o 64.09
    assert 100 * stats.harmonic(1 - 0.4032, 0.9879, 1 - 0.4983) == pytest.approx(64.09, abs=0.005)
    assert stats.harmonic(0.0, 1.0) == 0.0
    np.testing.assert_allclose(stats.harmonic(np.array([0.5, 0.0]), np.array([1.0, 1.0])), [2 / 3, 0.0])


def test_unanimous_rates_do_not_claim_certainty():
    draws = stats.resample_rate(np.zeros(100), ["a"] * 100, np.random.default_rng(0))
    assert 0 < np.quantile(draws, 0.975) < 0.05
    part = lambda name, value, better: stats.mean_metric(
        name, "s", np.full(50, value), ["a"] * 50, better, "x", rate=True
    )
    metric = stats.harmonic_metric("h", [part("acc_e", 0.0, False), part("acc_s", 1.0, True)], [1 - draws, 1 - draws])
    assert metric.value == 1.0 and 0.9 < metric.low < 1.0 and metric.high == 1.0


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


def test_frechet_of_fewer_images_than_features_is_finite():
    rng = np.random.default_rng(0)
    assert 0 < stats.frechet(rng.normal(size=(5, 16)), rng.normal(size=(7, 16))) < 100


def test_intervals_hold_their_value():
    assert stats.interval(np.array([1.0, 2.0, 3.0]), 5.0)[1] == 5.0
