"""Intervals, harmonic means and the Frechet distance. Everything here is a pure function of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .contracts import Metric

LEVEL = 0.95
RESAMPLES = 2000


def wilson(hits: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson score interval of a rate hits / n (Wilson, JASA 1927, Eq. 4). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # centre -+ half equals 0 or 1 exactly at the ends; rounding may leave it an ulp outside the rate itself
    return float(min(max(0.0, centre - half), p)), float(max(min(1.0, centre + half), p))


def resample(
    values: np.ndarray, clusters: Sequence[str], rng: np.random.Generator, times: int = RESAMPLES
) -> np.ndarray:
    """Bootstrap means [times]: clusters are drawn with replacement, then images within each drawn cluster.

    With a single cluster this is the plain bootstrap over images. NaN values (no verdict) take no part.
    """
    values = np.asarray(values, float)
    labels = np.asarray(clusters)
    keep = ~np.isnan(values)
    groups = [values[keep & (labels == c)] for c in dict.fromkeys(labels[keep])]
    sums, counts = np.zeros(times), np.zeros(times)
    # how often each cluster is drawn, then one draw of its images for every time it is
    picks = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), size=times)
    for group, times_drawn in zip(groups, picks.T, strict=True):
        for repeat in range(int(times_drawn.max())):
            rows = np.flatnonzero(times_drawn > repeat)
            sums[rows] += group[rng.integers(len(group), size=(len(rows), len(group)))].sum(1)
            counts[rows] += len(group)
    return sums / counts


def resample_rate(hits: np.ndarray, clusters: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """`resample` for a rate. Where every image agrees the bootstrap cannot vary and would claim certainty;
    draws from Beta(hits + 1/2, misses + 1/2) (Jeffreys) stand in for it."""
    draws = resample(hits, clusters, rng)
    if np.ptp(draws) == 0:
        n = int((~np.isnan(np.asarray(hits, float))).sum())
        k = draws[0] * n
        return rng.beta(k + 0.5, n - k + 0.5, size=len(draws))
    return draws


def interval(draws: np.ndarray, value: float, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval, widened to hold the value itself."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(min(low, value)), float(max(high, value))


def harmonic(*rates: np.ndarray | float) -> np.ndarray | float:
    """Harmonic mean, 0 where any rate is 0: MACE's H_o and H_c with 1 - Acc_e among the rates (MACE, Eq. 8)."""
    stacked = np.stack([np.asarray(rate, float) for rate in rates])
    with np.errstate(divide="ignore"):
        mean = np.where((stacked <= 0).any(0), 0.0, len(rates) / (1 / np.maximum(stacked, 1e-300)).sum(0))
    return float(mean) if mean.ndim == 0 else mean


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features [N, D] and [M, D] (Heusel et al., 2017, Eq. 6).

    The trace of (S1 S2)^1/2 comes from the eigenvalues of S1^1/2 S2 S1^1/2 in fp64, which are real.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    w, v = np.linalg.eigh(s1)
    root = (v * np.sqrt(np.clip(w, 0, None))) @ v.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ s2 @ root), 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross)


def bootstrap_se(statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator, times: int = 200) -> float:
    """Standard error of statistic(indices) over bootstrap resamples of n images.

    For statistics that resampling shifts (a Frechet distance grows with repeated images), the spread is still
    right where percentiles are not.
    """
    return float(np.std([statistic(rng.integers(n, size=n)) for _ in range(times)], ddof=1))


@dataclass(frozen=True)
class Part:
    """Values [N] of a split's images (NaN: no verdict) whose mean is a metric, or goes into a harmonic mean."""

    split: str
    values: np.ndarray

    @property
    def complement(self) -> Part:
        return Part(self.split, 1 - self.values)

    def estimate(self, index: np.ndarray | slice = slice(None)) -> float:
        judged = self.values[index]
        judged = judged[~np.isnan(judged)]
        return float(judged.mean()) if len(judged) else float("nan")


def mean_metric(
    name: str,
    split: str,
    values: np.ndarray,
    clusters: Sequence[str],
    higher_is_better: bool,
    group: str,
    *,
    rate: bool,
) -> Metric:
    """Mean over images with a verdict. Wilson's interval for a rate (values 0 and 1), else the bootstrap
    clustered by concept. No verdict at all gives an empty value, never 0."""
    values = np.asarray(values, float)
    judged = values[~np.isnan(values)]
    common = {"n": len(values), "n_valid": len(judged), "higher_is_better": higher_is_better, "group": group}
    if not len(judged):
        return Metric(name, split, None, None, None, "", **common)
    value = float(judged.mean())
    if rate:
        return Metric(name, split, value, *wilson(int(judged.sum()), len(judged)), "wilson", **common)
    low, high = interval(resample(values, clusters, np.random.default_rng(0)), value)
    return Metric(name, split, value, low, high, "bootstrap", **common)


def harmonic_metric(name: str, parts: Sequence[Metric], draws: Sequence[np.ndarray] | None) -> Metric:
    """Harmonic mean of parts (1 - value where lower is better), with the interval of the same mean over draws."""
    splits = "+".join(part.split for part in parts)
    common = {
        "n": sum(p.n for p in parts),
        "n_valid": sum(p.n_valid for p in parts),
        "higher_is_better": True,
        "group": "overall",
    }
    if draws is None or any(part.value is None for part in parts):
        return Metric(name, splits, None, None, None, "", **common)
    value = harmonic(*(part.value if part.higher_is_better else 1 - part.value for part in parts))
    return Metric(name, splits, value, *interval(harmonic(*draws), value), "bootstrap", **common)
