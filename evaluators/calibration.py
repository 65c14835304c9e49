"""Does the base draw a concept at all, as a judge sees it? Its pictures of the concept against its pictures of what is kept."""

from __future__ import annotations

import math

import numpy as np

from erasebench.contracts import Undrawn

CHANCE = 0.05  # one-sided p from which on the two sides are not told apart
DIGITS = 4  # of a threshold: the same on every machine


def check_drawn(concept: str, judge: str, own: np.ndarray, others: np.ndarray, p: float | None = None) -> None:
    """Raises Undrawn where the concept's pictures do not pass beyond chance: Fisher's exact test, one-sided, or a given p.

    own [N], others [M]: 1 where a picture passes for the concept, 0 where not, NaN without a verdict.
    """
    from scipy.stats import fisher_exact

    own, others = own[~np.isnan(own)], others[~np.isnan(others)]
    n, m, hits, false = len(own), len(others), int(own.sum()), int(others.sum())
    counts = f"{hits} of {n} of the base's pictures of it pass, and {false} of {m} of what is kept"
    if not n or not m or 1 / math.comb(n + m, n) > CHANCE + 1e-9:
        raise Undrawn(f"{judge} cannot say whether the base draws {concept!r}: {counts} are too few (images=)")
    if p is None:
        p = float(fisher_exact([[hits, n - hits], [false, m - false]], alternative="greater").pvalue)
    if p > CHANCE + 1e-9:  # of three against three it is 1 in 20, to rounding
        raise Undrawn(f"the base does not draw {concept!r}, as {judge} sees it: {counts} (p = {p:.2g}); no verdict")


def youden(own: np.ndarray, others: np.ndarray) -> float:
    """The threshold that tells the two best apart (Youden, 1950): midway between two neighbours, the lowest of equals.

    own [N], others [M]: similarities, of which NaN take no part. Where nothing tells them apart, beyond all of them.
    """
    own, others = own[~np.isnan(own)], others[~np.isnan(others)]
    values = np.unique(np.concatenate([own, others]))
    between = [*((values[1:] + values[:-1]) / 2), values[-1] + 1]
    gain = [(own >= t).mean() - (others >= t).mean() for t in between]
    return round(float(between[int(np.argmax(gain))]), DIGITS)


def p_greater(own: np.ndarray, others: np.ndarray) -> float:
    """One-sided p of the Mann-Whitney U test that own [N] are above others [M]; NaN take no part."""
    from scipy.stats import mannwhitneyu

    own, others = own[~np.isnan(own)], others[~np.isnan(others)]
    return float(mannwhitneyu(own, others, alternative="greater").pvalue)
