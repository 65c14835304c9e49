"""Build the leaderboard from rows: a page (HTML), CSV, Parquet, Markdown and LaTeX, and the same tables on the terminal.
Runs are ranked only among runs that compare: the same task, target, base, sampler and number of images. Broken and
incomplete runs are listed apart, each with its reason. No model and no GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'leaderboard',
    'leaderboard --results results/reference',
    'leaderboard --task object --world mini --format tex',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("leaderboard", __doc__, EXAMPLES)
    made.add_argument("--results", type=Path, default=Path("results"), help="the folder that holds runs/ or rows.parquet")
    made.add_argument("--task", help="only this task")
    made.add_argument("--world", help="only this world")
    made.add_argument(
        "--format",
        action="append",
        choices=("csv", "parquet", "md", "tex", "html", "text", "all"),
        help="a file leaderboard.<format>, or text to print the tables; may be given several times (default: all)",
    )
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..report.leaderboard import publish

    return publish(given.results, given.task, given.world, given.format or ["all"])
