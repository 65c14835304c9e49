"""Options of a command line, and the restricted set for rows.

The module defines which options decide a run, and which of them another user's row may set. A row is data: it may
give one value to an option that the configuration has, but may not name code or a place, or look anything up. Any
other option must be given by hand, beside the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException

from .contracts import ErasebenchError
from .defaults import complete
from .places import SCHEME, exists, is_absolute, is_place, strings

GROUPS = ("model", "task", "method", "attack", "executor", "experiment", "kind")
ELSEWHERE = (
    "results",
    "device",
    "judges",
    "batch",
    "together",
    "rate",
    "dry_run",
    "track",
    "executor",
    "store",
    "table",
)  # options of a machine, or of the use of rows: no part of a run
CHOICES = (*GROUPS, "world", "part")
# last words of options that may name a file, a folder or a repository, unless the configuration itself says the same
PLACES = ("path", "folder", "hub", "pretrained", "architecture", "real", "templates", "vocabulary", "url", "address")
LISTED = "keep"  # an option that is a list of names, or a text file of them
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
MOST_WORDS, MOST_CHARACTERS, MOST_BRACKETS = 200, 4000, 50  # limits of a row's command line, and of each of its words
ALONE = ("hydra.mode=RUN", "table=null")  # of an experiment, only the single run


def repeatable(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a command line that decide its rows.

    A place on this disk becomes `...`, as it exists nowhere else.
    """
    return tuple(
        f"{word.partition('=')[0]}=..." if gives_place(word) else word
        for word in overrides
        if first_key(word) not in ELSEWHERE
    )


def first_key(word: str) -> str:
    """Return the first key of an option: model of +model.path=x."""
    return re.split(r"[.=@/]", word.lstrip("+~"))[0]


def gives_place(word: str) -> bool:
    """Return whether a user's option names a local file or folder.

    Decided by its form, or because the file or folder exists.
    """
    key, _, text = word.partition("=")
    try:
        said = OverridesParser.create().parse_override(word)
        value = text.split(",") if said.is_sweep_override() else said.value()
    except (HydraException, RecursionError):
        value = text
    named = "." in key and key.rpartition(".")[2] in PLACES
    given = [
        text.strip("'\"") for text in strings(value) if not SCHEME.match(text)
    ]  # a URL is not on this disk
    named |= key == LISTED and any(map(is_list, given))
    return any(is_absolute(text) or (("/" in text or named) and exists(text)) for text in given)


def is_list(name: str) -> bool:
    """Return whether a name stands for a text file of names."""
    return name.endswith(".txt")


@cache
def run_keys() -> frozenset[str]:
    """Return the first words of the options that decide a run.

    They come from conf/config.yaml and its groups, without the options of a machine.
    """
    given = yaml.safe_load((resources.files("erasebench.conf") / "config.yaml").read_text(encoding="utf-8"))
    return frozenset({*given, *CHOICES} - {"defaults", "hydra", *ELSEWHERE})


@cache
def choices_of(group: str) -> frozenset[str]:
    return frozenset(
        f.name[:-5] for f in (resources.files("erasebench.conf") / group).iterdir() if f.name[-5:] == ".yaml"
    )


@cache
def own_words() -> dict[str, frozenset[str]]:
    """Return the values that the configuration itself gives for each of PLACES.

    Examples: embedded for a path, tokenizer for a vocabulary.
    """
    found: dict[str, set[str]] = {name: {""} for name in PLACES}

    def look(value: Any) -> None:
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list):
                look(inner)
            elif name in found and isinstance(inner, str):
                found[name].add(inner)

    for path in Path(str(resources.files("erasebench.conf"))).rglob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        look(complete(content) if path.parent.name in ("method", "attack") else content)
    return {name: frozenset(words) for name, words in found.items()}


def again(overrides: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """Return the command line of another user's rows, with overrides from `more`.

    Raises ErasebenchError if it sets anything but options that decide a run, or needs a place that rows do not keep.
    """
    if not isinstance(overrides, list | tuple) or not all(isinstance(word, str) for word in overrides):
        raise ErasebenchError("overrides: a list of options is needed")
    if len(overrides) > MOST_WORDS:
        raise ErasebenchError(f"overrides: {len(overrides)} options are more than a run has ({MOST_WORDS})")
    mine = {}
    for word in more:
        if "=" not in word or word.startswith("-"):
            raise ErasebenchError(f"{brief(word)}: no option; key=value is needed")
        mine[word.partition("=")[0].lstrip("+")] = word
    theirs = {}
    for word in overrides:
        key = word.partition("=")[0].lstrip("+")
        if first_key(word) not in ELSEWHERE and key not in mine:
            refuse_foreign(word)
            theirs[key] = word
    for key, word in (theirs | mine).items():
        if word.endswith("=..."):
            raise ErasebenchError(f"rows do not keep where something was: give {brief(key).strip(chr(39))}=")
    return list((theirs | mine).values())


def command_of(file: Path, overrides: str, more: Sequence[str] = ()) -> list[str]:
    """Return the command line of the rows in a file, as `again`.

    The error names the file.
    """
    try:
        return again(json.loads(overrides or "[]"), more)
    except (ValueError, RecursionError) as error:
        raise ErasebenchError(f"{file}: overrides that are not JSON") from error
    except ErasebenchError as error:
        raise ErasebenchError(f"{file}: {error}") from error


def refuse_foreign(word: str) -> None:
    """Refuse an option of another user's rows that is unknown or unsafe.

    Unsafe options could load, reach or read anything; unknown options are not options of a run.
    """
    no = lambda why: ErasebenchError(f"{brief(word)}: rows may not say {why}")
    nested = sum(map(word.count, "[{("))
    if len(word) > MOST_CHARACTERS or nested > MOST_BRACKETS or CONTROL.search(word) or "${" in word:
        raise no("what is to be looked up" if "${" in word else "this")
    try:
        said = OverridesParser.create().parse_override(word)
        value = None if said.is_delete() or said.is_sweep_override() else said.value()
    except (HydraException, RecursionError, ValueError) as error:
        raise no("this") from error
    key = said.key_or_group
    if "_target_" in word or word.startswith("-"):
        raise no("what code to load")
    if said.type is not OverrideType.CHANGE or said.package is not None or said.is_sweep_override():
        raise no("this: one value of an option that is there")
    if first_key(word) not in run_keys() or not re.fullmatch(r"[a-z]\w*(\.[a-zA-Z0-9]\w*)*", key, re.ASCII):
        raise no("this: it is no option that decides a run")
    if any(isinstance(name, str) and name.startswith("_") for name in names_in(value)):
        raise no("what code to load")
    if key in CHOICES:
        for choice in value if isinstance(value, list) else [value]:
            free = key == "part" and re.fullmatch(r"\w+", str(choice), re.ASCII)  # a part without a file is an object
            if choice is not None and str(choice) not in choices_of(key) and not free:
                raise no(f"this: there is no {key} of that name here")
        return
    named = any(name in PLACES and text not in {"...", *own_words()[name]} for name, text in named_texts(key, value))
    named |= key == LISTED and any(map(is_list, strings(value)))
    texts = [text for text in strings(value) if text != "..."]
    if named or any(is_place(text) or ("/" in text and exists(text)) for text in texts):
        raise no(f"where something lies: give {key}= if you trust it")


def named_texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (last word of key, text) of an option and its entries."""
    if isinstance(value, str):
        yield key.rpartition(".")[2], value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from named_texts(str(name), inner)


def names_in(value: Any) -> Iterator[Any]:
    """Yield the keys of dictionaries at any depth of a value."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from names_in(inner)
    if isinstance(value, dict):
        yield from value


def brief(word: str) -> str:
    return ascii(word if len(word) <= 80 else f"{word[:77]}...")
