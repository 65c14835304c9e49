"""Test a plugin against the contract: a method on a base model (the default), an evaluator of a task (evaluator=), or an
attack on an erased model (attack=). Every clause that is broken is named, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'check method=uce',
    'check --config-dir my/conf method=mine',
    'check task=object evaluator=presence',
    'check attack=seed_search',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("check", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    from ..analysis import check

    return check.main(words)
