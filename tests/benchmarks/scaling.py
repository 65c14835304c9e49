"""What more workers give, and what more images cost."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace

import torch
from measure import DEVICE, linear, peak_memory, record, seconds
from sampling import one_run

from erasebench.contracts import Prompt, Sampler
from erasebench.executors.local import Local
from erasebench.run.images import shards
from erasebench.run.produce import produce
from erasebench.run.session import Session
from erasebench.run.specification import Run, image_identities
from erasebench.store.local import Store


@contextmanager
def empty_store():
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERASEBENCH_HOME"] = home
        yield
        del os.environ["ERASEBENCH_HOME"]


def drawn(run: Run, count: int, token: str | None = None) -> str:
    """So many images of the base, through shards and store. The `token` by which workers know the model that they hold."""
    prompts = [Prompt(f"target/{i}", "a photo of the cat", i, "target", "cat") for i in range(count)]
    session = Session(run, Store())
    session.token = token or session.token
    produce(session, shards(prompts), "base", image_identities(run)[0], f"{count} images")
    return session.token


def workers(shards_each: int = 4, steps: int = 25) -> None:
    """Ray workers of one thread (or GPU) each, of which each has as much to do: once they hold the model."""
    from erasebench.executors.ray import Ray

    most = 2 if DEVICE == "cpu" else max(1, torch.cuda.device_count())
    took = {}
    for count in (1, most):
        run = replace(one_run(), sampler=Sampler("ddim", steps, 4.0), device=DEVICE, executor=Ray(actors=count))
        with empty_store():
            token = drawn(replace(run, sampler=Sampler("ddim", 1, 4.0)), 64 * count)  # the model is loaded
            with seconds() as spent:
                drawn(run, 64 * shards_each * count, token)
        took[count] = spent[0]
        what = f"Ray, {count} workers, {64 * shards_each} images each"
        record(what, "sampling into the store", 64 * shards_each * count / spent[0], "images/s")
    record(f"Ray, {most} workers", "parallel efficiency", took[1] / took[most], "")


def images(counts: tuple[int, ...] = (10, 100, 1000, 10000)) -> None:
    """More images of one step each, through shards and store."""
    run = replace(one_run(), sampler=Sampler("ddim", 1, 4.0), device=DEVICE, executor=Local())
    took = []
    for count in counts:
        with empty_store(), peak_memory("images into the store, 1 step", f"{count}"), seconds() as spent:
            drawn(run, count)
        took += spent
        record("images into the store, 1 step", f"{count}, with model loading", count / spent[0], "images/s")
    linear("images into the store, 1 step", counts, took)


def main() -> None:
    images()
    workers()
