"""Send row files to Weights & Biases: rows, intervals and images (never images of an explicit task), one W&B run for
each file under its own id. A run sends its own rows with track=wandb. WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are
respected.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'wandb results/runs/*.csv',
    'wandb results/runs/ID.csv --group mine',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("wandb", __doc__, EXAMPLES)
    made.add_argument("files", type=Path, nargs="+", help="row files, results/runs/*.csv")
    made.add_argument("--group", default="", help="the name under which W&B shows them together")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..report.wandb import mirror

    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    return int(not all([mirror(path, given.group) for path in given.files]))
