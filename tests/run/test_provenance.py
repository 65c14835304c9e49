"""What made a number: a plugin whose source changed without another version is seen, and so is another sampler."""

import importlib.util
import json
import logging
import sys
from types import SimpleNamespace

import pytest
from erasebench.evaluators.attacks.seed_search import SeedSearch
from erasebench.methods.uce import UCE

from erasebench import provenance
from erasebench.contracts import Prompt, Sampler
from erasebench.report import runs
from erasebench.run import attacks as attack
from erasebench.run import specification
from erasebench.run.run import execute

METHOD = """
from dataclasses import dataclass
from typing import ClassVar
from my_helper import STEP

@dataclass(frozen=True)
class Mine:
    version: ClassVar[int] = 1

    def fit(self, model, brief, out, seed):
        (out / "step.json").write_text("0.5")

    def apply(self, model, artifact):
        name = model.names("attn2.to_v.weight")[0]
        return model.changed(weights={name: model.weight(name) * -3 + 1})
"""
JUDGE = """
from dataclasses import dataclass
from typing import ClassVar
from conftest import Brightness, Redness

@dataclass(frozen=True)
class MyJudge(Brightness):
    name: str = "my judge"
    version: ClassVar[int] = 1

@dataclass(frozen=True)
class Mine(Redness):
    judge: MyJudge = MyJudge()
    threshold: float = 0.0

    def confidence(self, scored):
        return scored.arrays["red"]
"""
ATTACK = """
from dataclasses import dataclass
from typing import ClassVar
from erasebench.evaluators.attacks.seed_search import SeedSearch

@dataclass(frozen=True)
class Mine(SeedSearch):
    images: int = 2
    version: ClassVar[int] = 1
"""
MODULES = {"my_method": METHOD, "my_judge": JUDGE, "my_attack": ATTACK, "my_helper": "STEP = 1\n"}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Write the plugins into files, and import them as they stand now: edit(module, what, by) changes one."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second would not be seen
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)

    def load(name: str):
        for known in (name, "my_helper"):
            sys.modules.pop(known, None)
        importlib.invalidate_caches()
        return importlib.import_module(name).Mine()

    def edit(name: str, what: str, by: str) -> None:
        file = folder / f"{name}.py"
        assert what in file.read_text()
        file.write_text(file.read_text().replace(what, by))

    yield SimpleNamespace(load=load, edit=edit, folder=folder)
    for known in MODULES:
        sys.modules.pop(known, None)


@pytest.fixture
def again(plugins, make_run, caplog):
    """Carry out the run of all three plugins as they stand now: (rows, warnings of changed sources)."""

    def execute_again():
        attacks, evaluators = {"mine": plugins.load("my_attack")}, {"mine": plugins.load("my_judge")}
        caplog.clear()
        with caplog.at_level(logging.INFO, "erasebench"):
            run = make_run("mine", plugins.load("my_method"), evaluators, images=2, attacks=attacks, attacked=2)
            rows = execute(run)
        assert not [row.reason for row in rows if row.status == "failed"]
        return rows, [record.getMessage() for record in caplog.records if "source changed" in record.getMessage()]

    return execute_again


def marks(rows) -> set[str]:
    """Which kinds of plugin the rows say changed."""
    found = set()
    for row in rows:
        notes, params = json.loads(row.fit_notes or "{}"), json.loads(row.attack_params or "{}")
        found |= {"method"} if notes.get("source_changed") else set()
        found |= {"judge"} if notes.get("judge_source_changed") else set()
        found |= {"attack"} if params.get("source_changed") else set()
    return found


@pytest.mark.parametrize(
    ("module", "what", "by", "kind"),
    [
        ("my_method", "-3 + 1", "-3 + 2", "method"),
        ("my_helper", "STEP = 1", "STEP = 2", "method"),
        ("my_judge", "threshold: float = 0.0", "threshold: float = 0.0  # a note", "judge"),
        ("my_attack", "images: int = 2", "images: int = 1 + 1", "attack"),
    ],
)
def test_a_changed_source_without_another_version_is_seen(module, what, by, kind, plugins, again):
    first, warned = again()
    assert not warned and not marks(first)
    assert again() == (first, [])
    plugins.edit(module, what, by)
    rows, warned = again()
    assert len(warned) == 1 and warned[0].startswith(f"{kind} ") and module in warned[0] and "version 1" in warned[0]
    assert marks(rows) == {kind}
    assert [row.value for row in rows] == [row.value for row in first]  # it came from the store
    shown = runs.Run(tuple(rows), plugins.folder / "none.webp")
    assert "source changed" in shown.details
    assert "source changed" not in runs.Run(tuple(first), plugins.folder / "none.webp").details
    file = "my_method" if kind == "method" else module
    plugins.edit(file, "version: ClassVar[int] = 1", "version: ClassVar[int] = 2")
    rows, warned = again()
    assert not warned and not marks(rows)


def test_entries_without_a_record_and_classes_without_a_file_never_warn(plugins, tmp_path):
    now = provenance.sources(plugins.load("my_method"))
    assert provenance.changed_sources(tmp_path, now) == []
    made = {}
    exec("class Typed: pass", {"__name__": "typed_at_a_prompt"}, made)
    typed = made["Typed"]()
    assert provenance.sources(typed) == {}
    unregistered = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("elsewhere", plugins.folder / "my_method.py")
    )
    spec.loader.exec_module(unregistered)
    assert set(provenance.sources(unregistered.Mine())) == {"elsewhere", "my_helper"}
    provenance.write_sources(tmp_path, now)
    assert provenance.changed_sources(tmp_path, {}) == [] == provenance.changed_sources(tmp_path, now)
    for damaged in ("", "[]", "null", "{"):
        (tmp_path / provenance.SOURCE).write_text(damaged)
        assert provenance.changed_sources(tmp_path, now) == []


def test_what_is_followed_is_the_toolbox_and_what_lies_beside(plugins):
    assert set(provenance.sources(plugins.load("my_method"))) == {"my_method", "my_helper"}
    found = set(provenance.sources(UCE()))
    assert {"erasebench.methods.uce", "erasebench.toolbox.closed_form", "erasebench.model.model"} <= found
    assert all(name.startswith("erasebench.") for name in found)
    assert not {"erasebench.store.local", "erasebench.run.run", "erasebench.rows"} & found  # they compute nothing of a fit
    assert {"my_attack", "erasebench.evaluators.attacks.seed_search", "erasebench.toolbox.search"} <= set(
        provenance.sources(plugins.load("my_attack"))
    )


def test_a_search_that_goes_on_with_an_older_one_says_so(make_run, plugins, tmp_path):
    """What several prompts share is an entry of its own, and outlives the findings."""
    mine = plugins.load("my_attack")
    older = tmp_path / "older"
    older.mkdir()
    provenance.write_sources(older, {**provenance.sources(mine), "my_attack": "another"})
    stage = attack.Stage(None, None, "mine", mine, (), None, (), None, None, made_by=provenance.sources(mine))
    stage.take_up(older)
    provenance.write_sources(tmp_path, stage.made_by)
    assert provenance.changed_sources(tmp_path, provenance.sources(mine)) == ["my_attack"]


def test_the_sampler_s_version_is_part_of_fits_and_attacks(make_run, monkeypatch):
    run = make_run("uce", UCE(), attacks={"mine": SeedSearch()})
    prompts = (Prompt("", "a cat", 1, "target"),)
    search = attack.Stage(SimpleNamespace(run=run), None, "mine", SeedSearch(), prompts, None, (), None, None)
    identities = lambda: [run.fit_identity(), search.identity(), specification.shard_identity({}, Sampler(), prompts)]
    for number in (3, 4):
        monkeypatch.setattr(specification, "SAMPLING", number)
        wanted = [[number, specification.SAMPLERS]] * 2 + [number]
        assert [identity["sampling"] for identity in identities()] == wanted
