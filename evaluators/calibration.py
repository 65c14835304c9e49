"""Tests of whether the base draws a concept, according to a judge.

They compare its images of the concept with its images of kept concepts.
"""

from __future__ import annotations

import math

import numpy as np

from erasebench.contracts import Undrawn

CHANCE = 0.05  # largest one-sided p at which the two sides differ
DIGITS = 4  # of a threshold, so that it is the same on every machine


def check_drawn(concept: str, judge: str, own: np.ndarray, others: np.ndarray, p: float | None = None) -> None:
    """Raise Undrawn if the concept's images do not pass beyond chance.

    The test is Fisher's exact test, one-sided, unless `p` is given. Undrawn is also raised if there are too few
    images.

    own [N], others [M]: 1 where an image passes for the concept, 0 where not, NaN without a verdict.
    """
    from scipy.stats import fisher_exact

    own, others = own[~np.isnan(own)], others[~np.isnan(others)]
    n, m, hits, false = len(own), len(others), int(own.sum()), int(others.sum())
    counts = f"{hits} of {n} of the base's pictures of it pass, and {false} of {m} of what is kept"
    if not n or not m or 1 / math.comb(n + m, n) > CHANCE + 1e-9:
        raise Undrawn(f"{judge} cannot say whether the base draws {concept!r}: {counts} are too few (images=)")
    if p is None:
        p = float(fisher_exact([[hits, n - hits], [false, m - false]], alternative="greater").pvalue)
    if p > CHANCE + 1e-9:  # three against three give 1 in 20, up to rounding
        raise Undrawn(f"the base does not draw {concept!r}, as {judge} sees it: {counts} (p = {p:.2g}); no verdict")


def youden(own: np.ndarray, others: np.ndarray) -> float:
    """Return the threshold that best separates two samples (Youden, 1950).

    It lies midway between two neighbouring values; of equally good thresholds it is the lowest.

    own [N], others [M]: similarities; NaN are ignored. If nothing separates them, the threshold is above all values.
    """
    own, others = own[~np.isnan(own)], others[~np.isnan(others)]
    values = np.unique(np.concatenate([own, others]))
    between = [*((values[1:] + values[:-1]) / 2), values[-1] + 1]
    gain = [(own >= t).mean() - (others >= t).mean() for t in between]
    return round(float(between[int(np.argmax(gain))]), DIGITS)


def p_greater(own: np.ndarray, others: np.ndarray) -> float:
    """Return the one-sided p of the Mann-Whitney U test.

    The alternative is that own [N] are above others [M]; NaN are ignored.
    """
    from scipy.stats import mannwhitneyu

    own, others = own[~np.isnan(own)], others[~np.isnan(others)]
    return float(mannwhitneyu(own, others, alternative="greater").pvalue)
