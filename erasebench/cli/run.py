"""Erase a concept from a model, sample the task's prompts, let judges score the images, attack the erased model, and write
one file of rows. Fits, images and scores of earlier runs are taken from the store. The verb may be left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .parsing import build_run_parser, describe_choices

if TYPE_CHECKING:
    from ..rows import Row
    from ..run.specification import Run

EXAMPLES = (
    "method=uce task=object target=airplane",
    "-m method=none,uce,esd task=celebrity n=10",
    'method=uce task=object "attack=[cce,udatk,random_prefix]"',
    "method=uce target='my own thing' kind=object",
    "experiment=mace_table1",
)


def parser() -> argparse.ArgumentParser:
    made = build_run_parser("run", __doc__, EXAMPLES)
    made.epilog = (
        f"choices:\n{describe_choices()}\n\n{made.epilog}\n\n"
        "every option: conf/config.yaml; a method's: conf/method/METHOD.yaml; --cfg job prints all as composed"
    )
    return made


def job(run: Run) -> list[Row]:
    """Carry out one run and print its answer; an experiment prints a table of all its runs instead."""
    from ..run.run import execute

    rows = execute(run)
    if rows and not any(word.startswith("experiment=") for word in run.overrides):
        from ..report import answer

        answer.tell(rows, run.results / "runs" / f"{rows[0].run_id}.csv")
    return rows


def main(words: Sequence[str]) -> int:
    from .. import config

    return config.main(job, list(words), launch=True)
