"""List the words that an erasure moved without being asked to: a world's vocabulary, ranked by the change of its noise
predictions in units of the spread between words. All words are tried on two draws of noise, the quarter that moved
most on twice as many, and so on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'moved method=uce target=cat',
    'moved method=checkpoint method.path=erased target=cat',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("moved", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    from .. import config
    from ..analysis.moved import job

    return config.main(job, list(words))
