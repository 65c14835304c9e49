"""Print a published table as its paper has it: values by setting, the method that measures each row here, the number of cells
that can be measured, and the commands for the embedded world and for Stable Diffusion. Without a name: all tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .parsing import build_parser

EXAMPLES = (
    "published",
    "published mace_table1",
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("published", __doc__, EXAMPLES)
    made.add_argument("table", nargs="?", help="an experiment with a published table")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..contracts import ErasebenchError
    from ..report import printed

    try:
        lines = printed.list_tables() if given.table is None else printed.describe(given.table)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    return 0
