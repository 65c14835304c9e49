"""Decide whether a model may ship. The model (a checkpoint by method.path=, or any method) is measured and attacked within the
budget of a profile (conf/profile: quick, hour or day), and each requirement of the profile is decided by its 95 % interval: pass,
fail, or not enough images. A model that was not attacked never passes. Writes one HTML page; exits with 0 (pass), 1 (fail or broken) or 2
(undecided, or an error).
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from .parsing import build_run_parser, list_choices

if TYPE_CHECKING:
    from ..rows import Row
    from ..run.specification import Run

EXAMPLES = (
    "verdict method.path=erased.safetensors target=cat",
    "verdict method=uce target=cat profile=hour",
    "verdict model=sd14 method.path=erased task=explicit profile=day",
)
UNDECIDED = 2  # exit code, also of errors


def parser() -> argparse.ArgumentParser:
    made = build_run_parser("verdict", __doc__, EXAMPLES)
    made.epilog = f"profiles: {', '.join(list_choices('profile'))}\n\n{made.epilog}"
    return made


def split_profile(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split words -> (name of the profile, options of the run).

    A path without a method means the method `checkpoint`.
    """
    names = [word.partition("=")[2] for word in words if word.startswith("profile=")]
    options = [word for word in words if not word.startswith("profile=")]
    given = {word.partition("=")[0] for word in options}
    if "method.path" in given and "method" not in given:
        options = ["method=checkpoint", *options]
    return (names[-1] if names else "quick"), options


def read_profile(name: str, options: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """Read a profile -> (options of the run, limits).

    The user's own options win over the profile's. Raises ErasebenchError for an unknown name.
    """
    import yaml

    from ..contracts import ErasebenchError

    known = list_choices("profile")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ErasebenchError(f"unknown profile {name!r}{f': did you mean {near[0]!r}?' if near else ''} ({', '.join(known)})")
    text = (resources.files("erasebench.conf") / "profile" / f"{name}.yaml").read_text(encoding="utf-8")
    profile = yaml.safe_load(text)
    given = {word.partition("=")[0] for word in options}
    return [*(word for word in profile["words"] if word.partition("=")[0] not in given), *options], profile["limits"]


def main(words: Sequence[str]) -> int:
    from .. import config
    from ..contracts import ErasebenchError
    from ..report import runs, verdict

    name, options = split_profile(words)
    try:
        every, limits = read_profile(name, options)
    except ErasebenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNDECIDED
    made: list[tuple[Run, list[Row]]] = []

    def job(run: Run) -> list[Row]:
        from ..run.run import execute

        made.append((run, execute(run)))
        return made[-1][1]

    code = config.alone(job, every)
    if not code and "dry_run=true" in every:
        return 0
    if code or not made or not made[0][1]:
        return UNDECIDED
    run, rows = made[0]
    folder = run.results / "runs"
    decided = verdict.judge(runs.Run(tuple(rows), folder / f"{rows[0].run_id}.webp"), name, limits)
    page = write(decided, run.results / "verdicts" / f"{rows[0].run_id}.{name}.html", [["verdict", *words], every])
    print(*(d.text for d in decided.decisions), f"{decided.word}: {page}", sep="\n")
    return verdict.CODES[decided.outcome]


def write(decided, page: Path, commands: Sequence[Sequence[str]]) -> Path:
    """Write the page with the commands of the verdict and its run."""
    from ..report.verdict import write_page

    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(decided, page, [shlex.join(["erasebench", *command]) for command in commands])
    return page
