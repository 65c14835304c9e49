"""Forecast a sweep: makespan, GPU hours, size of the store and their breakdown for any command line on a number of GPUs.
Nothing runs, and what the store holds is not counted. `rate` is the number of U-Net evaluations of single latents
that one GPU does in a second (`make bench` measures it); every other assumption of conf/plan.yaml can be given as
well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'schedule experiment=everything gpus=8 rate=1000',
    'schedule -m method=none,uce,esd target=airplane gpus=2 rate=900',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("schedule", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    from ..analysis import schedule

    return schedule.main(words)
