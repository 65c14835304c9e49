"""Intervals, harmonic means and the Frechet distance.

Every function here is a pure function of numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from .contracts import ErasebenchError, Metric

LEVEL = 0.95
RESAMPLES = 2000


def wilson(hits: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the Wilson score interval of a rate hits / n.

    Wilson, JASA 1927, Eq. 4. n = 0 gives (0, 1).
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # centre -+ half equals 0 or 1 exactly at the ends; rounding may leave it an ulp outside the rate itself
    return float(min(max(0.0, centre - half), p)), float(max(min(1.0, centre + half), p))


@dataclass(frozen=True)
class Part:
    """Values [N] of a split's images whose mean enters a metric.

    NaN means no verdict. The mean is the metric itself, or one of its terms. Images of one cluster (concept,
    caption) are not independent; a rate has only the values 0 and 1. `forgotten`: the value, or values [N], of
    images refused by a guard if refusing is to count as forgetting.
    """

    split: str
    values: np.ndarray
    clusters: Sequence[str]
    rate: bool = True
    forgotten: float | np.ndarray | None = None

    @property
    def judged(self) -> np.ndarray:
        return self.values[~np.isnan(self.values)]


@dataclass(frozen=True)
class Measure:
    """A metric before its interval.

    It is the mean of its part, or the value of `combine` for the means of several parts.
    """

    name: str
    group: str  # forget, keep, quality, overall, attack
    higher_is_better: bool
    parts: tuple[Part, ...]
    combine: Callable[..., np.ndarray | float] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            values, what = np.asarray(part.values), f"metric {self.name} ({part.split})"
            if values.dtype.kind not in "fiub" or values.shape != (len(part.clusters),):
                raise ErasebenchError(f"{what}: {len(part.clusters)} numbers are expected, one for each image")
            if np.isinf(values).any():
                raise ErasebenchError(f"{what}: {int(np.isinf(values).sum())} values are infinite")
            if part.rate and not np.isin(values[~np.isnan(values)], (0, 1)).all():
                raise ErasebenchError(f"{what}: a rate has values 0 and 1 alone")

    def of(self, means: Sequence[np.ndarray | float]) -> np.ndarray | float:
        return self.combine(*means) if self.combine else means[0]


def summarize(
    ours: Sequence[Measure | Metric], theirs: Sequence[Measure | Metric], concepts: Sequence[str] = ()
) -> list[Metric]:
    """Compute metrics with intervals and paired changes against `theirs`.

    `theirs` are the same measures of other images (the base's, or another method's) of the same prompts and seeds.
    Rates are also given for each of the `concepts`.

    Wilson's interval for a rate, else the bootstrap. The change is resampled with the same draw on both sides; for a
    rate there is McNemar's exact p as well. A part without any verdict leaves the metric empty, never 0.
    """
    our_draws, their_draws = (
        draws([p for m in side if isinstance(m, Measure) for p in m.parts]) for side in (ours, theirs)
    )
    made = []
    for measure, before in zip(ours, theirs, strict=True):
        if isinstance(measure, Metric):
            if any(
                v is not None and not np.isfinite(v) for v in (measure.value, measure.low, measure.high, before.value)
            ):
                raise ErasebenchError(f"metric {measure.name} is not finite: leave its value empty where there is none")
            made.append(replace(measure, base_value=before.value))
            continue
        metric, drawn = estimate(measure, our_draws)
        other, other_drawn = estimate(before, their_draws)
        if metric.value is not None and other.value is not None:
            low, high = interval(drawn - other_drawn, metric.value - other.value)
            single = measure.parts[0] if measure.combine is None and measure.parts[0].rate else None
            p = mcnemar(single.values, before.parts[0].values) if single else None
            metric = replace(metric, base_value=other.value, change_low=low, change_high=high, p_value=p)
        made.append(replace(metric, by_concept=by_concept(measure, concepts)))
    return made


def by_concept(measure: Measure, concepts: Sequence[str]) -> dict[str, tuple[float | None, int]]:
    """Return concept -> (rate among its images, number judged).

    The order is that of `concepts`. Applies if these rates make up a metric of forgetting or keeping; empty for any
    other metric, and if there is only one concept.

    Names come from `concepts` alone: clusters of prompts' texts are not concepts, and stay out.
    """
    part = measure.parts[0]
    clusters, shown = np.asarray(part.clusters), set(part.clusters)
    named = [name for name in concepts if name in shown]
    rate = measure.combine is None and part.rate and measure.group in ("forget", "keep")
    if not rate or shown - set(named):
        return {}
    own = {name: part.values[clusters == name] for name in named}
    judged = {name: values[~np.isnan(values)] for name, values in own.items()}
    if sum(len(values) > 0 for values in judged.values()) < 2:
        return {}
    return {name: (float(values.mean()) if len(values) else None, len(values)) for name, values in judged.items()}


def estimate(measure: Measure, drawn: Mapping[int, np.ndarray]) -> tuple[Metric, np.ndarray | None]:
    """Return (the metric with its interval, its bootstrap draws)."""
    sizes = {part.split: len(part.values) for part in measure.parts}
    valid = {split: min(len(part.judged) for part in measure.parts if part.split == split) for split in sizes}
    empty = Metric(
        name=measure.name,
        split="+".join(sizes),
        value=None,
        low=None,
        high=None,
        ci_method="",
        n=sum(sizes.values()),
        n_valid=sum(valid.values()),
        higher_is_better=measure.higher_is_better,
        group=measure.group,
        threshold=measure.threshold,
    )
    value = measure.of([p.judged.mean() for p in measure.parts]) if all(valid.values()) else np.nan
    if not np.isfinite(value):
        return empty, None
    value, own = float(value), measure.of([drawn[id(part)] for part in measure.parts])
    if measure.combine is None and measure.parts[0].rate:
        judged = measure.parts[0].judged
        low, high, method = *wilson(int(judged.sum()), len(judged)), "wilson"
    else:
        low, high, method = *interval(own, value), "bootstrap"
    return replace(empty, value=value, low=low, high=high, ci_method=method), own


def draws(parts: Sequence[Part], times: int = RESAMPLES) -> dict[int, np.ndarray]:
    """Return id of a part -> its bootstrap means [times].

    Parts of one split share their draws, so that a number computed from several of them, or compared between two
    sides, is computed from the same images; two splits share none.

    If every image of a rate agrees, the bootstrap cannot vary and would claim certainty: draws from Beta(hits + 1/2,
    misses + 1/2) (Jeffreys) stand in for it.
    """
    made: dict[int, np.ndarray] = {}
    for split in dict.fromkeys(part.split for part in parts):
        members = {id(part): part for part in parts if part.split == split}
        clusters = next(iter(members.values())).clusters
        values = np.stack([part.values for part in members.values()], 1).astype(float)
        judged = (~np.isnan(values)).astype(float)
        seed = zlib.crc32(split.encode())
        means = []
        for weights in resample(clusters, np.random.default_rng(seed), times):
            with np.errstate(invalid="ignore", divide="ignore"):
                means.append((weights @ np.nan_to_num(values)) / (weights @ judged))
        for (key, part), column in zip(members.items(), np.concatenate(means).T, strict=True):
            hits, n = np.nansum(part.values), len(part.judged)
            constant = part.rate and n and np.ptp(part.judged) == 0
            rng = np.random.default_rng(seed)
            made[key] = rng.beta(hits + 0.5, n - hits + 0.5, size=times) if constant else column
    return made


def resample(clusters: Sequence[str], rng: np.random.Generator, times: int, chunk: int = 250) -> Iterator[np.ndarray]:
    """Yield the number of draws of each image [some, N].

    Chunks follow until there are `times` rows. Clusters are drawn with replacement, then images within each drawn
    cluster. With a single cluster this is the plain bootstrap over images.
    """
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    groups = [np.flatnonzero(labels == g) for g in range(labels.max() + 1)]
    for start in range(0, times, chunk):
        size = min(chunk, times - start)
        picks = rng.multinomial(len(groups), [1 / len(groups)] * len(groups), size=size)
        if len(groups) == len(labels):
            yield picks[:, labels].astype(float)
            continue
        weights = np.zeros((size, len(labels)))
        for group, drawn in zip(groups, picks.T, strict=True):
            weights[:, group] = rng.multinomial(drawn * len(group), [1 / len(group)] * len(group))
        yield weights


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the exact two-sided p of McNemar's test (1947).

    The values are paired 0/1 values; pairs without both verdicts take no part.
    """
    better, worse = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n)


def interval(draws: np.ndarray, value: float, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval, widened to hold the value itself."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(min(low, value)), float(max(high, value))


def harmonic(*rates: np.ndarray | float) -> np.ndarray | float:
    """Return the harmonic mean, 0 if any rate is 0.

    These are MACE's H_o and H_c with 1 - Acc_e among the rates (MACE, Eq. 8).
    """
    stacked = np.stack([np.asarray(rate, float) for rate in rates])
    with np.errstate(divide="ignore"):
        mean = np.where((stacked <= 0).any(0), 0.0, len(rates) / (1 / np.maximum(stacked, 1e-300)).sum(0))
    return float(mean) if mean.ndim == 0 else mean


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of features.

    The features are [N, D] and [M, D] (Heusel et al., 2017, Eq. 6).
    """
    return frechet_to(b)(a)


def frechet_to(b: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return a function of features [N, D]: their Frechet distance to `b` [M, D].

    The terms of `b` are computed once.

    The trace of (S1 S2)^1/2 is the sum of the roots of the eigenvalues of S1 S2. In fp64 they come from S2^1/2 S1
    S2^1/2; if one side has fewer images than features, with X for its centred features, they come from X S X', which
    has the same eigenvalues except zeros and is smaller.
    """
    b = np.asarray(b, np.float64)
    mean, y = b.mean(0), (b - b.mean(0)) / math.sqrt(len(b) - 1)
    covariance = cache(lambda: y.T @ y)

    @cache
    def root() -> np.ndarray:
        w, v = np.linalg.eigh(covariance())
        return (v * np.sqrt(np.clip(w, 0, None))) @ v.T

    def distance(a: np.ndarray) -> float:
        a = np.asarray(a, np.float64)
        x = (a - a.mean(0)) / math.sqrt(len(a) - 1)
        if len(a) < a.shape[1]:
            square = x @ covariance() @ x.T
        elif len(b) < a.shape[1]:
            square = y @ (x.T @ x) @ y.T
        else:
            square = root() @ (x.T @ x) @ root()
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(square), 0, None)).sum()
        return float(((a.mean(0) - mean) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross)

    return distance


def bootstrap_se(statistic: Callable[[np.ndarray], float], n: int, rng: np.random.Generator, times: int = 200) -> float:
    """Return the standard error of statistic(indices) over bootstrap resamples of n images.

    For statistics that resampling shifts (a Frechet distance grows with repeated images), the spread is still right
    although percentiles are not.
    """
    return float(np.std([statistic(rng.integers(n, size=n)) for _ in range(times)], ddof=1))
