"""Compare two methods, or two settings of one, on the same prompts and seeds. Differences are resampled in pairs:
concepts first, then images within them. With several targets the targets are paired: mean difference, bootstrap over
targets, exact sign-flip test. Runs that are not in the store are made. The comparison is written to
results/comparisons and shown by the leaderboard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'compare method=uce,mace task=celebrity n=10',
    'compare method=ap method.search=random,gumbel target=cat,dog,horse,ship,truck',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("compare", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    from ..analysis import compare

    return compare.main(words)
