"""Print the tables of methods, tasks and attacks, as the first lines of their configuration files describe them, or
write them into a Markdown file between the marks `<!-- methods -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'readme',
    'readme --write README.md',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("readme", __doc__, EXAMPLES)
    made.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file with the marks, to bring up to date")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..maintain.readme import report

    return report(given.write)
