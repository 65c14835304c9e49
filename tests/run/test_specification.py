"""Keys: every field of a run counts once, or is listed as transport; a dataclass keeps its name when its file moves."""

import dataclasses
import importlib
from collections import Counter
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import pytest
from conftest import Brightness, Redness
from erasebench.evaluators.attacks.random_prefix import RandomPrefix
from erasebench.evaluators.attacks.seed_search import SeedSearch
from erasebench.methods.uce import UCE

from erasebench.contracts import Brief, Concept, Plan, Prompt, Sampler
from erasebench.executors.local import Local
from erasebench.model.source import Source
from erasebench.run.specification import TRANSPORT, Run, image_identities, shard_identity
from erasebench.store.local import canonical, digest

OTHER = {  # a field's type does not say what else it may be
    "Run.eraser": UCE(erase_scale=2.0),
    "Run.attacks": {"seed_search": SeedSearch(images=3)},
    "Run.speed": "fast",
    "Run.second": Brightness(),
    "Run.executor": Local(ahead=3),
    "Run.own": {"name": "mine"},
    "Run.results": Path("elsewhere"),
    "Plan.evaluators": {},
    "Source.path": None,
    "Source.hub": "somebody/model",
    "Prompt.guidance": 3.0,
}


def other(name: str, value):
    """A value that differs."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, *value[:1]) if value else ("x",)
    assert value is None, name
    return 128


def changes(name: str, whole, put):
    """(field, the run with that field changed), of a dataclass that `put` puts back into the run."""
    for field in fields(whole):
        path = f"{name}.{field.name}"
        if not is_dataclass(getattr(whole, field.name)) and path not in ("Run.plan", "Run.pictured", "Plan.prompts", "Plan.brief", "Brief.concepts"):
            yield path, put(replace(whole, **{field.name: other(path, getattr(whole, field.name))}))
    if name == "Run":
        yield "Run.eraser", put(replace(whole, eraser=OTHER["Run.eraser"]))
        yield "Run.executor", put(replace(whole, executor=OTHER["Run.executor"]))


@pytest.fixture
def run(make_run):
    attacks = {"random_prefix": RandomPrefix()}
    return make_run("uce", UCE(), {"redness": Redness()}, target="cat", attacks=attacks, attacked=2)


def walk(run: Run):
    plan, brief = run.plan, run.plan.brief
    with_plan = lambda p: replace(run, plan=p)
    with_brief = lambda b: with_plan(replace(plan, brief=b))
    yield from changes("Run", run, lambda r: r)
    yield from changes("Plan", plan, with_plan)
    yield from changes("Brief", brief, with_brief)
    yield from changes("Concept", brief.concepts[0], lambda c: with_brief(replace(brief, concepts=(c,))))
    yield from changes("Prompt", plan.prompts[0], lambda p: with_plan(replace(plan, prompts=(p, *plan.prompts[1:]))))
    yield from changes("Sampler", run.sampler, lambda s: replace(run, sampler=s))
    hub = Source("toy", hub="a/b", revision="1")
    yield from changes("Source", hub, lambda s: replace(run, source=s))


def test_every_field_of_a_run_gives_another_key_or_is_listed_as_transport(run):
    plain, seen = digest(run.identity()), set()
    hub = digest(replace(run, source=Source("toy", hub="a/b", revision="1")).identity())
    for path, changed in walk(run):
        before = hub if path.startswith("Source.") else plain
        same = digest(changed.identity()) == before
        assert same == (path in TRANSPORT or path == "Source.path"), path
        seen.add(path)
    assert set(TRANSPORT) <= seen and {f"Run.{f.name}" for f in fields(Run)} - seen == {
        "Run.source",
        "Run.plan",
        "Run.sampler",
        "Run.pictured",  # test_inversion.py
    }
    assert {f"{kind.__name__}.{f.name}" for kind in (Brief, Concept, Prompt, Sampler) for f in fields(kind)} - seen == {"Brief.concepts"}
    assert {f"Plan.{f.name}" for f in fields(Plan)} - seen == {"Plan.prompts", "Plan.brief"}


def test_a_split_is_part_of_a_run_and_not_of_its_images(run):
    moved = replace(run.plan.prompts[0], split="retain")
    assert replace(run, plan=replace(run.plan, prompts=(moved, *run.plan.prompts[1:]))).id != run.id
    _, ours = image_identities(run)
    assert shard_identity(ours, run.sampler, [moved]) == shard_identity(ours, run.sampler, run.plan.prompts[:1])


def modules() -> list[str]:
    """Of the package, but for the embedded worlds' training, whose dataclasses are in no key."""
    root = Path(__file__).parents[2]
    files = [f for top in ("erasebench", "methods", "evaluators") for f in (root / top).rglob("*.py")]
    names = [f.relative_to(root).with_suffix("").parts for f in files if not f.name.startswith("__")]
    return [".".join(n if n[0] == "erasebench" else ("erasebench", *n)) for n in names if n[:2] not in (("erasebench", "mini"), ("erasebench", "mini2"))]


def test_no_two_dataclasses_of_the_package_share_the_name_that_keys_know_them_by():
    kinds = set()
    for name in modules():
        module = importlib.import_module(name)
        kinds |= {x for x in vars(module).values() if isinstance(x, type) and dataclasses.is_dataclass(x) and x.__module__ == module.__name__}
    plugins = [k for k in kinds if hasattr(k, "version") or k.__module__.startswith(("erasebench.contracts", "erasebench.tasks"))]
    twice = [name for name, count in Counter(k.__qualname__ for k in plugins).items() if count > 1]
    assert len(plugins) > 60 and not twice


def test_a_dataclass_of_the_package_keeps_its_key_when_its_module_moves_and_a_stranger_s_does_not(monkeypatch):
    before = canonical(Sampler())
    monkeypatch.setattr(Sampler, "__module__", "erasebench.elsewhere")
    assert canonical(Sampler()) == before

    @dataclass(frozen=True)
    class Mine:
        strength: float = 1.0

    Mine.__module__ = "mine"
    first = canonical(Mine())
    Mine.__module__ = "yours"
    assert canonical(Mine()) != first
