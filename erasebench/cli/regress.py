"""Run small versions of every method, task and attack and compare their rows with stored goldens. Rows, versions,
prompts and U-Net evaluations must be equal, values must lie in the golden's interval. Exits with 0 if nothing moved
out of its interval, 1 if something did or a run failed, 2 on bad use.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'regress',
    'regress --only object_uce --results out',
    'regress --accept "CLIP judges at 336 px"',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("regress", __doc__, EXAMPLES)
    made.add_argument("--only", action="append", metavar="RUN", help="a run of the list; may be given several times")
    made.add_argument("--results", type=Path, metavar="DIR", help="keep rows and pictures in DIR/runs")
    made.add_argument("--accept", metavar="WHY", help="write the goldens anew, and the reason")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..maintain.regress import carry_out_list

    return carry_out_list(given.only, given.results, given.accept)
