"""Executor on Ray actors.

Actors receive the run and items of work (the prompts of a shard, say) and return small results (whether it is done);
images go from and to the store."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..contracts import ErasebenchError
from ..progress import Progress
from ..run.session import Session
from ..run.specification import Run
from ..store.local import Store, home
from .local import A, B, Work

RETRIES = 3  # of an item whose worker died; an item that kills every worker would never end
START = -1  # in place of an item: the worker is starting
INHERITED = ("ERASEBENCH_STORE", "HF_HOME", "HF_HUB_OFFLINE")  # by workers, besides $ERASEBENCH_HOME


@dataclass(frozen=True)
class Ray:
    """Executor on a Ray cluster: an existing one (`address`), or a local one of its own.

    A worker that dies is replaced, and its items go to free workers. Raises ErasebenchError if there is no cluster, or
    no room in it."""

    address: str = "local"
    actors: int | None = None
    threads: int = 1
    gpus: float | None = None
    ahead: int = 2

    def workers(self, device: str) -> int:
        return len(pool(self, device).workers)

    def map(self, session: Session, work: Work[A, B], items: Sequence[A], label: str, alone: bool = False) -> list[B]:
        if not items:
            return []
        ray, there = connected(self), pool(self, session.run.device)
        each = 1 if alone else at_once(self, session.run.device)
        env = {"ERASEBENCH_HOME": str(home().absolute())} | {k: os.environ[k] for k in INHERITED if k in os.environ}
        run, sent = ray.put(session.run), ray.put(work)
        waiting, done, deaths = deque(range(len(items))), {}, Counter()
        # each worker once per free slot; a worker that the cluster has no room for yet is absent
        idle: list[Any] = []
        doing = {worker.ready.remote(): (START, worker) for worker in there.workers}
        failure: BaseException | None = None
        with Progress(label, len(items), "shard") as bar:
            # after a failure no item is started, but running ones are awaited, since they hold the model
            while (waiting and not failure) or any(i != START for i, _ in doing.values()):
                while waiting and idle and not failure:
                    i, worker = waiting.popleft(), idle.pop()
                    doing[worker.do.remote(session.token, env, run, sent, items[i])] = i, worker
                (ready, *_), _ = ray.wait(list(doing), num_returns=1)
                i, worker = doing.pop(ready)
                try:
                    made = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    failure = failure or error.cause
                except ray.exceptions.RayError as error:
                    idle = [other for other in idle if other is not worker]
                    if fresh := there.replaced(worker):
                        doing[fresh.ready.remote()] = START, fresh
                    deaths[i] += 1
                    if deaths[i] > RETRIES:
                        what = "as they started" if i == START else "of the same work"
                        failure = failure or ErasebenchError(
                            f"{label}: {RETRIES + 1} workers died {what}: {causes(error)[0]}"
                        )
                    elif i != START:
                        waiting.appendleft(i)
                else:
                    idle += [worker] * (each if i == START else 1)
                    if i != START:
                        done[i] = made
                        bar.update()
        if failure:
            raise failure
        return [done[i] for i in range(len(items))]


@dataclass(eq=False)
class Pool:
    """Pool of actors, kept between the runs of a sweep."""

    make: Callable[[], Any]
    workers: list[Any]

    def replaced(self, dead: Any) -> Any:
        """Replace a dead worker -> the new one; None if it has been replaced already."""
        place = next((i for i, worker in enumerate(self.workers) if worker is dead), None)
        if place is None:
            return None
        self.workers[place] = self.make()
        return self.workers[place]


class Worker:
    """Actor that holds a run's session: its models and a store."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        logging.basicConfig(level=logging.WARNING)
        self.token: str | None = None
        self.lock = threading.Lock()

    def ready(self) -> None:
        """Return as soon as the cluster has room for the actor."""

    def do(self, token: str, env: dict[str, str], run: Run, work: Work, item: Any) -> Any:
        with self.lock:
            os.environ.update(env)
            if token != self.token:
                if self.token is not None:
                    self.session.close()
                    del self.session  # before the next model is loaded
                self.session, self.token = Session(run, Store()), token
        return work(self.session, item, 1)


def connected(executor: Ray) -> Any:
    """Return the `ray` module, connected to the executor's cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ErasebenchError("executor=ray needs Ray: pip install 'erasebench[ray]'") from error
    if not ray.is_initialized():
        # so that workers import the user's own methods as this process does
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path)}}
        # nothing large passes through the object store
        own = {"include_dashboard": False, "object_store_memory": 2**28} if executor.address == "local" else {}
        try:
            ray.init(executor.address, runtime_env=paths, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ErasebenchError(
                f"executor.address={executor.address}: no Ray cluster ({'; '.join(causes(error))})"
            ) from error
    return ray


def causes(error: BaseException | None) -> list[str]:
    """Return the first lines of an error's message and of its causes."""
    said: dict[str, None] = {}
    while error is not None:
        said[(str(error).strip().splitlines() or [type(error).__name__])[0]] = None
        error = error.__cause__ or error.__context__
    return list(said)


def at_once(executor: Ray, device: str) -> int:
    """Return the number of items that an actor works on concurrently."""
    return 1 if device == "cpu" else 1 + executor.ahead


@lru_cache(maxsize=1)  # actors of other pools end with their last reference
def pool(executor: Ray, device: str) -> Pool:
    if device not in ("cpu", "cuda"):
        raise ErasebenchError(f"device={device}: Ray chooses the GPU of an actor, say device=cuda")
    ray = connected(executor)
    gpus = executor.gpus if executor.gpus is not None else float(device == "cuda")
    there = ray.cluster_resources()
    most = int(min(there.get("CPU", 0) // executor.threads, there.get("GPU", 0) // gpus if gpus else float("inf")))
    count = most if executor.actors is None else executor.actors
    if not 1 <= count <= most:
        of = f"{executor.threads} CPUs and {gpus:g} GPUs"
        raise ErasebenchError(f"executor.actors={count}: the cluster has room for {most} actors of {of}")
    options = {"num_cpus": executor.threads, "num_gpus": gpus, "max_concurrency": at_once(executor, device)}
    actor = ray.remote(**options)(Worker)
    make = lambda: actor.remote(executor.threads)
    return Pool(make, [make() for _ in range(count)])
