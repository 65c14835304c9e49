"""Hold claims of papers (conf/claims.yaml) beside rows: a claim holds, does not hold, or is undecided, by the interval
of what was measured. Each line names the paper, the world and the rows that decide.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'claims',
    'claims --results results/reference',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("claims", __doc__, EXAMPLES)
    made.add_argument("--results", type=Path, default=Path("results"), help="the folder of results")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..report.claims import report

    return report(given.results)
