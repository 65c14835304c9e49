"""Measure how far rankings of methods carry over: Spearman's rank correlation of measured rows with every published
table that shares three or more methods with them, table by table and in the mean, each with a bootstrap interval.
Version 1 of the embedded world stands beside your rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'agreement',
    'agreement results',
    'agreement results/runs --keep mine.parquet',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("agreement", __doc__, EXAMPLES)
    made.add_argument("rows", nargs="*", type=Path, help="folders of runs, files of rows, Parquet files of kept rows")
    made.add_argument("--folder", type=Path, default=Path("results/agreement"), help="where the tables are written")
    made.add_argument("--keep", type=Path, metavar="FILE.parquet", help="only keep the rows, for a later comparison")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..report.agreement import report

    return report(given.rows, given.folder, given.keep)
