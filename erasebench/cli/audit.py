"""Check the judges. Without options: every judge of the embedded world against the ground truth of the shipped drawings.
With options of a run: agreement of first and second opinion on its images (Cohen's kappa), and the ranks of the
methods at every threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'audit',
    'audit task=object method=uce,esd',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("audit", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    from ..analysis import audit

    return audit.main(words)
