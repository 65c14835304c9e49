"""Look after the store, the cache of fits, images and scores: its size by kind, a list of entries, or a clean-up (gc) of
what killed processes left, of damaged entries and, with --older, of entries that were not used for some days.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_parser, parse_days

EXAMPLES = (
    'store',
    'store list',
    'store gc --older 30',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("store", __doc__, EXAMPLES)
    made.set_defaults(command="size", older=None)
    commands = made.add_subparsers(dest="command")
    commands.add_parser("size", help="entries and bytes by kind (default)")
    commands.add_parser("list", help="one line an entry: kind, key, size, days since last use")
    collect = commands.add_parser("gc", help="remove what killed processes left, damaged entries, and old ones")
    collect.add_argument("--older", type=parse_days, metavar="DAYS", help="also remove entries not used for so many days")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..store.local import look_after

    return look_after(given.command or "size", given.older)
