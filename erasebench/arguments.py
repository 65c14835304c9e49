"""Command line words: Hydra's grammar of values, and the list options."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from .contracts import ErasebenchError

VALUED = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c", "--info", "-i")
SCALARS = str | int | float | bool
SINGLE = (  # options that take a single text
    "target", "device", "results", "speed", "track", "model.path", "model.hub", "model.revision", "model.dtype",
    "world.captions.path", "prompts.path", "prompts.guidance", "pictures.path", "pictures.start", "reference.path", "reference.by",
    "store.url",
)  # fmt: skip
PARTS = {  # options of several parts -> the part that a single value sets
    "prompts": "path", "pictures": "path", "reference": "path", "store": "url", "sampler": "steps", "model": "path", "world.captions": "path",
}  # fmt: skip
LISTS = ("concepts", "other_words")  # options that are lists of words
WORLD_LISTS = (  # entries of a world that are lists of words; * is any name
    "objects.*.synonyms", "terms.*", "people.*", "artists.erase", "artists.keep", "artists.single", "everyday", "composed",
    "backgrounds", "hazards.classes", "hazards.mild", "hazards.implicit.*", "explicit.phrases", "explicit.named",
    "explicit.counted", "explicit.mild", "explicit.uncounted", "explicit.strict", "explicit.kept", "explicit.implicit.*",
    "templates.object", "templates.orr", "templates.imagenette", "templates.person", "templates.style", "templates.explicit",
    "templates.paraphrase.*", "templates.train.*",
)  # fmt: skip


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """Return the key=value words of a command line.

    Flags and their values are left out."""
    pairs = zip(("", *arguments), arguments, strict=False)
    return [word for before, word in pairs if not word.startswith("-") and before not in VALUED]


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return the command line with its flags before its overrides.

    argparse accepts no override after a flag that follows one.
    """
    overrides = overrides_of(arguments)
    pairs = zip(("", *arguments), arguments, strict=False)
    return [word for before, word in pairs if word.startswith("-") or before in VALUED] + overrides


def check_grammar(arguments: Sequence[str]) -> None:
    """Raise ErasebenchError for a word that Hydra cannot read.

    The message quotes the word correctly.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for word in overrides_of(arguments):
        try:
            override = parser.parse_override(word)
            override.value()
        except HydraException as error:
            key, equals, value = word.partition("=")
            if not equals or not re.fullmatch(r"[+~]{0,2}[\w./@:-]+", key):
                raise ErasebenchError(f"{word[:200]!r}: key=value is needed (see --help)") from error
            raise ErasebenchError(f"{word[:200]}: Hydra cannot read this value: {advice(key, value)}") from error


def advice(key: str, value: str) -> str:
    """Explain how to quote a value for Hydra and the shell.

    A list or object that is not closed cannot be quoted; the advice then shows how to write one.
    """
    if value[:1] in "[{" and value:
        return "a list is written '[a, \"b=c\"]', an object '{key: value}', names with signs in quotes"
    return f"quote it: {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    """Return the word that gives the key exactly this text.

    The text stands in double quotes for Hydra, and the word in quotes for the shell.
    """
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    inner = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', value.replace("${", "\\${"))
    inner += "\\" * (len(inner) - len(inner.rstrip("\\")))  # those at the end stand before the closing quote
    word = f'{key}="{inner}"'
    if "'" not in word:
        return f"'{word}'"
    return '"' + re.sub(r'([\\"$`])', r"\\\1", word) + '"'


def explained(error: Exception) -> str:
    """Summarize in one line why Hydra cannot compose a command line."""
    said = str(error)
    if found := re.search(r"Ambiguous value for argument '(.*?)'\n", said, re.DOTALL):
        key, _, value = found[1].partition("=")
        return (
            f"{found[1]}: a comma means a sweep, which needs -m; a list is {key}=[{value}]; a text with a comma is quoted: "
            f"{quoted(key, value)}"
        )
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [*said.strip().splitlines()[:1], *(str(error).strip().splitlines()[:1] if str(error) != said else ())]
    return ": ".join(lines)[:500] or type(error).__name__


def check_values(config: DictConfig) -> None:
    """Turn single words into lists, in place, for options that are lists.

    Refuses a list for an option that takes one word.
    """
    for name, part in PARTS.items():
        node = OmegaConf.select(config, name)
        if not isinstance(node, DictConfig):
            raise ErasebenchError(f"{name}={plain(node)}: it has several parts, {name}.{part}= is one")
    for name in SINGLE:
        check_text(config, name)
    for name in LISTS:
        OmegaConf.update(config, name, words(config[name], name), merge=False)
    if config.surrogate is not None and not isinstance(config.surrogate, str):
        OmegaConf.update(config, "surrogate", words(config.surrogate, "surrogate"), merge=False)
    for name in ("keep", "synonyms"):
        if config[name] is not None:
            OmegaConf.update(config, name, words(config[name], name), merge=False)
    for pattern in WORLD_LISTS:
        for parent, key, name in entries(config.world, pattern.split("."), "world"):
            made = words(parent[key], name)
            if made != parent[key]:
                parent[key] = made
    fill_lists(config, "task", "task", but=("evaluators",))


def check_plugins(config: DictConfig) -> None:
    """Check the options of methods, attacks, executors and the task like `check_values`.

    Imports the modules of these plugins.
    """
    for group in ("method", "attack", "executor", "task"):
        fill_lists(config, group, group)


def check_text(config: DictConfig, name: str) -> None:
    """Check an option that is one text; keep an integer as written.

    The spelling of a float or boolean is lost in parsing, so these are refused.
    """
    node = OmegaConf.select(config, name)
    if isinstance(node, DictConfig | ListConfig):
        hint = "; concepts=[...] erases others together with it" if name == "target" else ""
        raise ErasebenchError(f"{name}={plain(node)}: one value is needed, no list or object{hint}")
    if isinstance(node, bool | float):
        said = str(node).lower()
        raise ErasebenchError(f"{name}={said}: text is needed, which is quoted: {quoted(name, said)}")
    if isinstance(node, int):
        OmegaConf.update(config, name, str(node))


def words(node: Any, name: str) -> list[str]:
    """Return a list of words; a single word becomes a list of one."""
    made = [node] if isinstance(node, SCALARS) else node
    made = [] if made is None else made
    if isinstance(made, Mapping | DictConfig) or any(not isinstance(one, SCALARS) for one in made):
        raise ErasebenchError(f"{name}={plain(node)}: a list of words is needed, {name}=[a,b]")
    return [str(one) for one in made]


def plain(node: Any) -> str:
    """Format a value as on the command line."""
    made = OmegaConf.to_container(node) if isinstance(node, DictConfig | ListConfig) else node
    return re.sub(r"['\"]", "", str(made)).replace(", ", ",")[:200]


def entries(node: Any, path: Sequence[str], name: str) -> Iterator[tuple[DictConfig, str, str]]:
    """Yield (parent, key, full name) of each entry that matches a pattern.

    Interpolations, missing and null entries are left out: the config does not give them itself.
    """
    if not isinstance(node, DictConfig):
        return
    for key in [key for key in node if path[0] in ("*", key)]:
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if len(path) == 1:
            if node[key] is not None:
                yield node, key, f"{name}.{key}"
        else:
            yield from entries(node[key], path[1:], f"{name}.{key}")


def fill_lists(parent: DictConfig, key: Any, name: str, but: Sequence[str] = ()) -> None:
    """Turn single values into lists where a `_target_` dataclass declares a tuple.

    Descends everywhere except below the keys in `but`. Refuses values that do not fit. Interpolations are checked at
    the entry that they refer to.
    """
    if OmegaConf.is_interpolation(parent, key) or OmegaConf.is_missing(parent, key):
        return
    node = parent[key]
    if isinstance(node, ListConfig):
        for i in range(len(node)):
            fill_lists(node, i, f"{name}[{i}]")
    if not isinstance(node, DictConfig):
        return
    for field, kind in tuples(node.get("_target_")).items() if "_target_" in node else ():
        if field in node and not OmegaConf.is_interpolation(node, field) and node[field] is not None:
            made = sequence(node[field], kind, f"{name}.{field}")
            if made != node[field]:
                node[field] = made
    for key in [key for key in node if key not in but]:
        fill_lists(node, key, f"{name}.{key}")


def tuples(target: Any) -> dict[str, Any]:
    """Return tuple fields of a plugin's dataclass -> type of their entries.

    Fields that also accept a single word are left out.
    """
    from dataclasses import fields, is_dataclass

    from hydra.utils import get_class

    try:
        plugin = get_class(str(target))
        hints = typing.get_type_hints(plugin)
    except Exception:  # an error of a plugin's import is reported when the plugin is instantiated
        return {}
    if not is_dataclass(plugin):
        return {}
    of = {f.name: hints[f.name] for f in fields(plugin) if typing.get_origin(hints[f.name]) is tuple}
    return {name: typing.get_args(hint)[0] for name, hint in of.items()}


def sequence(node: Any, kind: Any, name: str) -> list[Any]:
    """Return a list of values of a type; a single value becomes a list of one."""
    made = [node] if isinstance(node, SCALARS) else list(node) if isinstance(node, ListConfig) else None
    allowed = {str: SCALARS, float: int | float, int: int}.get(kind)
    fits = lambda one: allowed is None or (isinstance(one, allowed) and (kind is str or not isinstance(one, bool)))
    if made is None or not all(map(fits, made)):
        wanted = getattr(kind, "__name__", str(kind))
        raise ErasebenchError(f"{name}={plain(node)}: a list of {wanted} is needed, {name}=[...]")
    return [str(one) if kind is str else one for one in made]


def check_lists(plugin: Any, name: str) -> None:
    """Raise ErasebenchError if a plugin's tuple field holds a single word."""
    for field in tuples(f"{type(plugin).__module__}.{type(plugin).__qualname__}"):
        if isinstance(value := getattr(plugin, field), str):
            raise ErasebenchError(f"{name}.{field}={value}: a list is needed, {name}.{field}=[{value}]")
