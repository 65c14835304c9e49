"""Run everything that conf/reference.yaml lists and results/reference lacks, and pack the rows into rows.parquet.
Stopped anywhere, it resumes. A run whose method, values, versions, prompts, judges or base changed has another name
and is run again; runs that the list no longer asks for are named at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_parser

EXAMPLES = (
    'reference --dry-run',
    'reference --sheets',
    'reference --prune',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("reference", __doc__, EXAMPLES)
    made.add_argument("--dry-run", action="store_true", help="list the missing runs with an estimate of the time")
    made.add_argument("--prune", action="store_true", help="drop rows from rows.parquet that the list does not ask for")
    made.add_argument("--sheets", action="store_true", help="also make missing sheets of images")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..maintain.reference import bring_up_to_date

    return bring_up_to_date(given.dry_run, given.prune, given.sheets)
