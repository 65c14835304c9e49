"""Write an erased model as a diffusers folder that loads without erasebench and draws the same images, or as a LoRA file
if the method is one, with a model card of what was measured. Options that rows do not keep, such as the place of a
base, follow the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .parsing import build_parser

EXAMPLES = (
    'export results/runs/ID.csv erased',
    'export results/runs/ID.csv erased.safetensors',
    'export results/runs/ID.csv erased model.path=/base',
)


def parser() -> argparse.ArgumentParser:
    made = build_parser("export", __doc__, EXAMPLES)
    made.add_argument("rows", type=Path, help="the file of rows of a run")
    made.add_argument("out", type=Path, help="a folder that is not there yet, or a file that ends with .safetensors")
    made.add_argument("more", nargs="*", help="options that the rows do not keep, such as model.path=")
    return made


def main(words: Sequence[str]) -> int:
    given = parser().parse_args(words)
    from ..report.export import export

    return export(given.rows, given.out, given.more)
