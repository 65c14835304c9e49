"""Ray: the same rows as in this process, whatever dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import Brightness, Redness
from erasebench.methods.none import NoErasure
from erasebench.methods.uce import UCE
from test_attacks import SMALL, Reddish
from test_run import SCRIPT, _rows, numbers

from erasebench.contracts import ErasebenchError
from erasebench.executors import ray as cluster
from erasebench.executors.local import Local
from erasebench.executors.ray import Ray
from erasebench.run import images as generate
from erasebench.run.run import execute
from erasebench.run.session import Session
from erasebench.store.local import Store

ray = pytest.importorskip("ray")  # erasebench.executors.ray imports it when it is used

TWO = Ray(actors=2)


@pytest.fixture(scope="module", autouse=True)
def stopped() -> Iterator[None]:
    yield
    ray.shutdown()


def die_once(marker: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fragile(UCE):
    """Its first fit dies half-way, and so does its first image, after two steps."""

    marker: str = ""

    def fit(self, model, brief, out, seed):
        (out / "half.json").write_text("{}")
        die_once(self.marker + ".fit")
        (out / "half.json").unlink()
        super().fit(model, brief, out, seed)

    @contextmanager
    def apply(self, model, artifact):
        calls = []
        hook = lambda *given: calls.append(1) if len(calls) < 2 else die_once(self.marker + ".image")
        handle = model.unet.register_forward_hook(lambda *given: hook() and None)
        with super().apply(model, artifact):
            yield
        handle.remove()


@dataclass(frozen=True)
class Dying(Brightness):
    """A judge that dies at its first image, or always."""

    marker: str = ""

    def score(self, images, prompts):
        die_once(self.marker) if self.marker else os.kill(os.getpid(), signal.SIGKILL)
        return super().score(images, prompts)


def folder_of(kind: str) -> list[str]:
    return sorted(p.name for p in (Store().root / kind).iterdir())


def test_rows_are_those_of_one_process(make_run, monkeypatch, tmp_path):
    """With attacks, of which workers share the prompts, and one search that all of them need."""
    attacks = {name: SMALL[name] for name in ("udatk", "cce", "seed_search", "key_guess")}
    run = make_run("uce", UCE(), {"redness": Reddish(threshold=0.0)}, target="cat", attacks=attacks, attacked=3, together=4)
    there = execute(replace(run, executor=TWO))
    monkeypatch.setenv("ERASEBENCH_HOME", str(tmp_path / "other"))
    here = execute(run)
    timed = lambda rows: [r for r in numbers(rows) if r.metric != "seconds_per_success"]
    assert [r.status for r in there] == [r.status for r in here] and {r.attack for r in there} >= {*attacks}
    plain = lambda rows: [(r.attack, r.metric, r.split, r.value, r.low, r.high, r.n, r.params) for r in timed(rows)]
    assert plain(there) == plain(here)


def test_a_worker_that_dies_is_replaced_and_its_work_done_again(make_run, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "SHARD", 2)
    judge = Dying(marker=str(tmp_path / "judge"))
    run = make_run("uce", Fragile(marker=str(tmp_path / "worker")), {"redness": Redness(judge)}, executor=TWO)
    rows = execute(run)
    assert {row.status for row in rows} == {"ok"}
    assert {p.name for p in tmp_path.iterdir()} >= {"worker.fit", "worker.image", "judge"}
    images = folder_of("images")
    calm = execute(replace(run, executor=Local()))
    assert numbers(calm) == numbers(rows) and folder_of("images") == images


def test_a_worker_that_always_dies_is_an_error_and_no_endless_loop(make_run, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 1)
    rows = execute(make_run("uce", UCE(), {"dying": Redness(Dying())}, executor=Ray(actors=1)))
    assert "2 workers died of the same work" in next(r.reason for r in rows if r.status == "failed")
    assert "\n" not in rows[0].reason


def test_what_is_raised_there_is_raised_here(make_run):
    run = make_run("none", NoErasure(), executor=TWO)

    def work(here, item, beside):
        raise ErasebenchError(f"no {item}")

    with pytest.raises(ErasebenchError, match="^no 1$"):
        run.executor.map(Session(run, Store()), work, [1], "label")


def test_what_has_begun_is_waited_for_before_an_error_is_raised(make_run, tmp_path):
    """It works with the model, which is closed then. Nothing else is begun."""
    run = make_run("none", NoErasure(), executor=TWO)

    def work(here, item, beside):
        if item == "wrong":
            raise ErasebenchError("no")
        time.sleep(2)
        Path(item).touch()

    items = [str(tmp_path / "slow"), "wrong", str(tmp_path / "never")]
    with pytest.raises(ErasebenchError, match="^no$"):
        run.executor.map(Session(run, Store()), work, items, "label")
    assert {path.name for path in tmp_path.iterdir()} >= {"slow"} and not Path(items[2]).exists()


def test_work_goes_on_where_somebody_else_takes_a_dead_workers_room(make_run, tmp_path):
    run = make_run("none", NoErasure(), executor=Ray())
    session = Session(run, Store())
    assert run.executor.map(session, lambda here, item, beside: item, [1, 2, 3], "label") == [1, 2, 3]
    other = ray.remote(num_cpus=1)(type("Other", (), {"here": lambda self: True})).remote()  # waits for room
    marker = str(tmp_path / "died")

    def work(here, item, beside):
        die_once(marker) if item == 1 else time.sleep(1)
        return item

    assert run.executor.map(session, work, [1, 2, 3], "label") == [1, 2, 3]
    if len(cluster.pool(run.executor, "cpu").workers) > 1:
        assert ray.get(other.here.remote(), timeout=30)
    ray.kill(other)
    assert run.executor.map(session, work, [1, 2], "label") == [1, 2]


@pytest.mark.parametrize("options", [{"actors": 99}, {"actors": 0}, {"threads": 99}, {"gpus": 1.0}])
def test_more_than_the_cluster_has_is_one_clear_line(make_run, options):
    rows = execute(make_run("uce", UCE(), executor=Ray(**options)))
    assert rows[0].status == "failed" and "the cluster has room for" in rows[0].reason


def test_a_killed_driver_goes_on_from_the_store(tiny_folder, tmp_path):
    calm = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tiny_folder), results=str(tmp_path / "calm"))
    wild = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tiny_folder), results=str(tmp_path / "wild"))
    with_ray = (
        "from erasebench.executors.ray import Ray\nfrom dataclasses import replace\nrun = replace(run, executor=Ray())\nprint"
    )
    wild = wild.replace("print", with_ray, 1)
    start = lambda code, home: subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "ERASEBENCH_HOME": str(tmp_path / home)}
    )
    driver, images = start(wild, "home_wild"), tmp_path / "home_wild" / "store" / "images"
    while driver.poll() is None and len(list(images.glob("[!.]*"))) < 3:
        time.sleep(0.01)  # Ray's workers give way to whoever is busy
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    first = {p.name: p.stat().st_mtime_ns for p in images.glob("[!.]*")}
    assert start(wild, "home_wild").wait() == 0 and start(calm, "home_calm").wait() == 0
    assert _rows(tmp_path / "wild") == _rows(tmp_path / "calm")
    assert {name: (images / name).stat().st_ctime_ns for name in first}
