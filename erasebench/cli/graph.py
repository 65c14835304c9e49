"""Erase each concept in turn and measure how far every other moved. Prints and draws the matrix of changes, and tests
two claims about it: nearer concepts move more, and the change is not symmetric.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'graph -m method=uce target=bird,cat,dog',
    'graph -m method=esd target=airplane,ship,truck',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("graph", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    from ..analysis import graph

    return graph.main(list(words))
