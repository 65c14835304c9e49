"""Check a file of rows before you share it: what is wrong with it, and the cost of verifying it. With --rerun the run is
repeated here, and the file is marked as verified if the same numbers come out. A submission is one file,
results/runs/ID.csv, with its sheet of images beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'verify results/runs/ID.csv',
    'verify results/runs/ID.csv --rerun',
    'verify results/runs/ID.csv --rerun model.path=/base',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("verify", __doc__, EXAMPLES)
    made.add_argument("rows", type=Path, help="results/runs/<id>.csv")
    made.add_argument("--rerun", action="store_true", help="run it again, and note that it is verified")
    made.add_argument("more", nargs="*", help="options that the rows do not keep, such as model.path=")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_intermixed_args(words)
    from ..report.submission import report

    return report(given.rows, given.rerun, given.more)
