"""The one command: `erasebench method=uce task=object` runs, `erasebench VERB ...` does everything else."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from types import ModuleType

from .. import interrupt
from . import parsing

VERBS = {  # verb, and module -> its line in the overview
    "run": "erase, sample, judge, attack; the verb may be left out",
    "verdict": "may this model ship: pass, fail or not enough images",
    "leaderboard": "rows as a page and as tables, ranked where they compare",
    "compare": "two methods on the same images, paired",
    "claims": "claims of papers beside your rows: they hold, do not hold, or are undecided",
    "published": "a paper's table, and the cells that can be measured here",
    "agreement": "rank correlation of your rows with published tables",
    "audit": "judges against the truth, and against each other",
    "moved": "words that an erasure moved without being asked to",
    "graph": "how far erasing each concept moves every other",
    "check": "your method, evaluator or attack against the contract",
    "doctor": "what is installed, what is missing, what can run now",
    "schedule": "how long a sweep takes on your GPUs, before it starts",
    "export": "an erased model as a diffusers folder or a LoRA file",
    "verify": "a file of rows before you share it; with --rerun, by running it again",
    "wandb": "rows to Weights & Biases",
    "store": "size, list and clean what is cached",
    "regress": "small runs against stored goldens",
    "reference": "the rows that this project publishes",
    "readme": "tables of methods, tasks and attacks",
}
OVERVIEW = """\
usage: erasebench VERB ...   or   erasebench OPTION=VALUE ...

Which method makes a text-to-image diffusion model forget a concept, what the forgetting breaks, whether somebody
can bring the concept back, and what it costs.

verbs (erasebench VERB --help: a paragraph and examples):
{verbs}

choices of the options of a run (erasebench run --help: how to change anything else):
{choices}

examples:
  erasebench method=uce task=object target=airplane
  erasebench -m method=none,uce,esd task=celebrity n=10
  erasebench leaderboard

--version, and tab completion: eval "$(register-python-argcomplete erasebench)"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words in (["-h"], ["--help"]):
        print(overview(), end="")
        return 0
    if words == ["--version"]:
        print(f"erasebench {metadata.version('erasebench')}")
        return 0
    verb, rest = split(words)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        print(f"error: no verb {verb!r}{f'; did you mean {near[0]!r}?' if near else ''} (erasebench help)", file=sys.stderr)
        return 2
    module = load(verb)
    if {"-h", "--help"} & set(rest):
        module.parser().print_help()
        return 0
    return interrupt.run(lambda: module.main(rest))


def overview() -> str:
    """All verbs, and the choices of every group of a run's options."""
    verbs = "\n".join(f"  {verb:12} {line}" for verb, line in VERBS.items())
    return OVERVIEW.format(verbs=verbs, choices=parsing.describe_choices())


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """-> (verb, its words); options of a run need no verb."""
    if "=" in words[0] or words[0].startswith("-"):
        return "run", list(words)
    return words[0], list(words[1:])


def load(verb: str) -> ModuleType:
    """The module of a verb, with `parser()` and `main(words)`."""
    return import_module(f"{__package__}.{verb}")


def complete() -> None:
    """Answer a shell's request for completions, and exit; only the parser of the verb in question is built."""
    import argcomplete

    line = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser(prog="erasebench")
    verbs = parser.add_subparsers()
    for verb in VERBS:
        chosen = len(line) > 1 and line[1] == verb
        verbs.add_parser(verb, parents=[load(verb).parser()] if chosen else [], add_help=False)
    if len(line) > 1 and ("=" in line[1] or line[1].startswith("-")):
        parser = load("run").parser()
    argcomplete.autocomplete(parser)
