"""Say what is installed, which weights are here, what is missing and how to get it. Without options: this machine; exits
with 0 if the embedded world can run whole. With options of a run: every file that it needs; exits with 0 if none must
be supplied. Nothing is downloaded and no weights are loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .parsing import build_run_parser

EXAMPLES = (
    'doctor',
    'doctor model=sd14 method=mace task=style',
)


def parser() -> argparse.ArgumentParser:
    return build_run_parser("doctor", __doc__, EXAMPLES)


def main(words: Sequence[str]) -> int:
    given = parser().parse_intermixed_args(words)
    from ..analysis import doctor

    flags = ["-m"] * given.multirun + (["--config-dir", given.config_dir] if given.config_dir else [])
    return doctor.main([*flags, *given.words])
