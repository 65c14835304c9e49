"""Defaults of plugins: they stand in the dataclass alone, and are read from its source as Python has them."""

import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate

from erasebench import config, config_sources, defaults
from erasebench.contracts import ErasebenchError

ROOT = Path(__file__).resolve().parent.parent
FILES = [file for group in config_sources.COMPLETED for file in sorted((ROOT / "conf" / group).glob("*.yaml"))]
BASE = """\
from dataclasses import dataclass, field
from typing import ClassVar

RATES = (1.0, 2.0)

@dataclass(frozen=True)
class Base:
    needed: str
    steps: int = 10
    rates: tuple[float, ...] = RATES
    words: list = field(default_factory=list)
    hidden: int = field(default=3, init=False)
    found: str = str(5)
    version: ClassVar[int] = 1
"""
MINE = """\
import dataclasses

from .base import RATES as ALL
from .base import Base

@dataclasses.dataclass(frozen=True)
class Mine(Base):
    steps: int = -20
    first: Base = Base(needed="a", steps=5)
    pairs: dict = dataclasses.field(default_factory=lambda: {"a": (1, 2)})
    others: tuple = ALL
"""


def specifications(node):
    """Every mapping of a configuration that has a `_target_`."""
    if isinstance(node, dict):
        yield from [node] if "_target_" in node else []
        for value in node.values():
            yield from specifications(value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name} {file.stem}")
def test_no_configuration_repeats_a_default_and_all_are_read_as_python_has_them(file):
    for spec in specifications(yaml.safe_load(file.read_text(encoding="utf-8"))):
        read = defaults.defaults_of(spec["_target_"])
        assert not [key for key, value in spec.items() if key in read and defaults.complete({"x": value})["x"] == read[key]]
        wanted = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(get_class(spec["_target_"]))}
        as_python = lambda value: instantiate(value) if isinstance(value, dict) else value
        assert {key: repr(as_python(value)) for key, value in read.items()} == {key: repr(defaults.plain(value)) for key, value in wanted.items()}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose import would fail."""
    folder = tmp_path / "unimportable"
    folder.mkdir()
    for name, text in {"__init__": "raise SystemExit", "base": BASE, "mine": MINE}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_defaults_are_read_without_an_import(package):
    base = {"steps": 10, "rates": [1.0, 2.0], "words": []}
    assert defaults.defaults_of("unimportable.base.Base") == base
    first = {"_target_": "unimportable.base.Base", "steps": 5, "needed": "a"}  # a part keeps its own tuples
    mine = {**base, "steps": -20, "first": first, "pairs": {"a": [1, 2]}, "others": [1.0, 2.0]}
    assert defaults.defaults_of("unimportable.mine.Mine") == mine
    assert not {"unimportable", "unimportable.mine"} & set(sys.modules)


def test_a_default_that_has_changed_is_read_again(package):
    assert defaults.defaults_of("unimportable.base.Base")["steps"] == 10
    (package / "base.py").write_text(BASE.replace("= 10", "= 1234"))
    assert defaults.defaults_of("unimportable.base.Base")["steps"] == 1234


@pytest.mark.parametrize("target", ["absent.X", "unimportable.base.Other", "unimportable.other.X", "unimportable.base.RATES", "X", "", "os.path.join"])
def test_what_is_no_dataclass_has_none(package, target):
    assert defaults.defaults_of(target) == {}


def test_what_a_configuration_gives_wins_and_another_part_takes_a_default_s_place():
    of = "erasebench.methods.race.RACE"
    made = defaults.complete({"_target_": of, "steps": 3, "first": {"steps": 4}})
    assert (made["steps"], made["batch"], made["first"]["steps"], made["first"]["batch"]) == (3, 1, 4, 1)
    other = defaults.complete({"_target_": of, "first": {"_target_": "erasebench.methods.uce.UCE"}})["first"]
    assert other["token_set"] == "last_to_end_and_empty" and "steps" not in other


def test_a_default_can_be_given_on_the_command_line_and_an_unknown_one_has_a_nearest_name():
    with initialize_config_module("erasebench.conf", version_base="1.3"):
        method = compose("config", ["method=race", "model=sd14", "method.lr=1e-3", "method.first.lr=2e-3"]).method
    assert (method.lr, method.first.lr, method.steps) == (1e-3, 2e-3, 1000)
    for choice in ("esd", "esd_2025"):
        with pytest.raises(ErasebenchError, match="unknown method. 'stepz': did you mean 'steps'?"):
            config.check_words([f"method={choice}", "method.stepz=1"])


def test_an_option_is_refused_before_torch_is_imported(tmp_path):
    code = (
        "import sys; sys.argv = ['erasebench']\nimport erasebench.config as c\n"
        "assert c.main(lambda run: [], ['method=race', 'method.stepz=1']) == 2\n"
        "print([x for x in ('torch', 'diffusers', 'open_clip') if x in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ERASEBENCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n" and "did you mean 'steps'?" in done.stderr, done.stderr
