"""Defaults of a plugin's dataclass, read from its source.

A configuration may leave them out, and reading them imports nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FACTORIES = {"list": [], "tuple": [], "dict": {}}
DEEPEST = 8  # longest chain of imports that is followed


class Unreadable(Exception):
    """A default that is not a literal: the configuration has to give it."""


def complete(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a configuration with the defaults of every `_target_` in it.

    A configuration that builds on others gets its defaults from them.
    """
    own = {key: complete(value) if isinstance(value, dict) else value for key, value in given.items()}
    if "_target_" not in own or "defaults" in own:
        return own
    made = {"_target_": own["_target_"], **defaults_of(str(own["_target_"]))}
    for key, value in own.items():
        nested = isinstance(value, dict) and isinstance(made.get(key), dict) and "_target_" not in value
        made[key] = made[key] | value if nested else value
    return made


def defaults_of(target: str) -> dict[str, Any]:
    """Return field -> default of the dataclass at a dotted path.

    Defaults are as in YAML. Empty if the path is not a dataclass that can be read.
    """
    module, _, name = target.rpartition(".")
    if (found := find_class(module, name)) is None:
        return {}
    return class_defaults(*found)


def class_defaults(module: str, node: ast.ClassDef) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (found := find_class(module, base.id)):
            made |= class_defaults(*found)
    if not any(name_of(decorator) == "dataclass" for decorator in node.decorator_list):
        return made
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or line.value is None or name_of(line.annotation) == "ClassVar":
            continue
        assert isinstance(line.target, ast.Name)
        try:
            made[line.target.id] = read_value(module, line.value)
        except Unreadable:
            made.pop(line.target.id, None)
    return made


def name_of(node: ast.expr) -> str:
    """Return the last name of x, a.x, x(...) and x[...]."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def read_value(module: str, node: ast.expr) -> Any:
    """Evaluate a literal, a constant of a module, or a dataclass instance.

    An instance becomes its configuration. Raises Unreadable for anything else.
    """
    if isinstance(node, ast.Name):
        return read_constant(module, node.id)
    if isinstance(node, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name_of(node) == "field":
            return read_field(module, keywords)
        return read_instance(module, node, keywords)
    try:
        return plain(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError) as error:
        raise Unreadable from error


def read_field(module: str, keywords: Mapping[str | None, ast.expr]) -> Any:
    if "init" in keywords:  # the class itself sets it
        raise Unreadable
    if "default" in keywords:
        return read_value(module, keywords["default"])
    factory = keywords.get("default_factory")
    if isinstance(factory, ast.Lambda):
        return read_value(module, factory.body)
    if isinstance(factory, ast.Name) and factory.id in FACTORIES:
        return FACTORIES[factory.id].copy()
    raise Unreadable


def read_instance(module: str, node: ast.Call, keywords: Mapping[str | None, ast.expr]) -> dict[str, Any]:
    found = find_class(module, name_of(node))
    if found is None or node.args or None in keywords:
        raise Unreadable
    given = {str(name): read_value(module, value) for name, value in keywords.items()}
    # Hydra would pass on a list, and a part with a list in place of its tuple is not hashable
    own = {name: value for name, value in class_defaults(*found).items() if not isinstance(value, list)}
    return {"_target_": f"{found[0]}.{found[1].name}", **own, **given}


def read_constant(module: str, name: str) -> Any:
    found = find(module, name)
    if found is None or not isinstance(found[1], ast.expr):
        raise Unreadable
    return read_value(*found)


def find_class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    found = find(module, name)
    return (found[0], found[1]) if found and isinstance(found[1], ast.ClassDef) else None


def find(module: str, name: str, depth: int = 0) -> tuple[str, ast.ClassDef | ast.expr] | None:
    """Find the definition of a class or constant -> (module, node).

    The node of a constant is its value. Imports are followed to the defining module.
    """
    path = find_source(module)
    if path is None or depth > DEEPEST:
        return None
    for line in reversed(parse(path, path.stat().st_mtime_ns).body):
        if isinstance(line, ast.ClassDef) and line.name == name:
            return module, line
        if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, line.value
        for alias in line.names if isinstance(line, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                return find(origin_of(module, path, line), alias.name, depth + 1)
    return None


def origin_of(module: str, path: Path, line: ast.ImportFrom) -> str:
    """Return the full name of the module that an import is from."""
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    kept = parts[: len(parts) - line.level + 1] if line.level else []
    return ".".join([*kept, *([line.module] if line.module else [])])


@lru_cache(64)
def parse(path: Path, changed: int) -> ast.Module:
    """Parse a file, again once it has changed.

    Returns an empty tree if the file is not valid Python.
    """
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # reported when the plugin is imported
        return ast.Module([], [])


def find_source(module: str) -> Path | None:
    """Return the file of a module.

    Unlike find_spec, it does not import the packages above it.
    """
    head, *rest = module.split(".")
    try:
        spec, whole = find_spec(head), head
        for name in rest:
            inside = getattr(sys.modules.get(whole), "__path__", None) or spec.submodule_search_locations
            whole = f"{whole}.{name}"
            spec = PathFinder.find_spec(whole, inside)
    except (ImportError, ValueError, AttributeError):  # AttributeError: there is no such package
        return None
    path = Path(spec.origin) if spec and spec.origin else None
    return path if path and path.is_file() else None


def plain(value: Any) -> Any:
    """Replace tuples with lists, as in a configuration."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return {key: plain(one) for key, one in value.items()} if isinstance(value, dict) else value
