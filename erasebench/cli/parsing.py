"""Parsers of the verbs: help of a paragraph and examples, and completion of a run's options."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from importlib import resources

GROUPS = ("model", "world", "task", "method", "attack", "executor", "experiment", "kind")


def build_parser(verb: str, text: str | None, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Build a parser with help of a paragraph and examples; `text` is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"erasebench {verb}",
        description="\n".join(textwrap.wrap(" ".join((text or "").split()), 100)),
        epilog="examples:\n" + "\n".join(f"  erasebench {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def build_run_parser(verb: str, text: str | None, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Build a parser for help and completion of a run's options.

    Hydra parses the options themselves.
    """
    parser = build_parser(verb, text, examples)
    parser.add_argument("-m", "--multirun", action="store_true", help="a sweep: values separated by commas")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of configurations of your own")
    words = parser.add_argument("words", nargs="*", metavar="OPTION=VALUE", help="options of a run (erasebench run --help)")
    words.completer = complete_option  # type: ignore[attr-defined]  # argcomplete reads it
    return parser


def list_choices(group: str) -> list[str]:
    """Names of the files of a group of the configuration; empty for an option that is no group."""
    folder = resources.files("erasebench.conf") / group
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")) if folder.is_dir() else []


def describe_choices() -> str:
    """A line for each group of the configuration."""
    return "\n".join(f"{group}: {', '.join(list_choices(group))}" for group in GROUPS)


def list_options() -> list[str]:
    """First words of a run's options, in the order of conf/config.yaml."""
    import yaml

    given = yaml.safe_load((resources.files("erasebench.conf") / "config.yaml").read_text(encoding="utf-8"))
    return list(dict.fromkeys([*GROUPS, *(key for key in given if key not in ("defaults", "hydra"))]))


def complete_option(prefix: str, **_: object) -> list[str]:
    """List options, or the choices of the option in the prefix."""
    name, equals, _ = prefix.partition("=")
    if equals:
        return [f"{name}={choice}" for choice in list_choices(name)]
    return [f"{option}=" for option in list_options()]


def parse_days(text: str) -> float:
    """A number of days, from 0. Raises argparse.ArgumentTypeError."""
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not (math.isfinite(days) and days >= 0):
        raise argparse.ArgumentTypeError(f"{text}: a number of days, at least 0, is needed")
    return days
