"""Is a plan right? A sweep on the embedded model is predicted from pieces measured on something else, and then made.

    python tests/benchmarks planning                                           of three methods, some minutes
    python tests/benchmarks/planning.py -m method=none,kpop task=explicit      any sweep on the embedded model

Calibration: a shard of images, some gradients, each judge, and a run that is all in the store, of a dog. What is predicted is made
from an empty store; all of it with one thread. As a script it exits with 1 where the prediction is off by more than a fifth by
the clock, as it is on a machine that does something else too; processor seconds hold there as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import record

from erasebench.analysis import schedule
from erasebench.model.model import Model
from erasebench.run import images as generate
from erasebench.run.run import execute
from erasebench.store.local import Store, digest
from erasebench.toolbox import training

SWEEP = ["-m", "method=none,uce,esd", "task=object", "target=cat", "images=64"]
OTHER = ["method=uce", "task=object", "target=dog", "images=16"]


def took(work: Callable[[], Any]) -> float:
    """Processor seconds of this process and of those that it waited for: what one thread takes by the clock where nothing else
    runs, and hardly more where something does."""
    start = sum(os.times()[:4])
    work()
    return sum(os.times()[:4]) - start


def calibrated(folder: Path) -> dict[str, Any]:
    """The costs of a plan, as measured on this machine."""
    costs, others = schedule.given([*OTHER, "rate=1"])
    (run,), _, _ = schedule.composed(others, {})
    run = replace(run, results=folder)
    command = [sys.executable, "-m", "erasebench", *OTHER, "dry_run=true"]  # imports, and composes one run
    costs["start"] = took(lambda: subprocess.run(command, check=True, capture_output=True))
    first, costs["load"] = (took(lambda: Model.load(run.source, "cpu")) for _ in range(2))
    costs["start"] += first - costs["load"]
    model = Model.load(run.source, "cpu")
    part = tuple(replace(run.plan.prompts[0], seed=seed) for seed in range(generate.SHARD))
    request = lambda which: generate.ShardRequest({"drawn": which}, run.sampler, part)
    draw = lambda which: generate.make(Store(), lambda: model, request(which), generate.Resources(run.batch))
    draw(0)
    costs["rate"] = len(part) * run.sampler.steps * 2 / (sum(took(partial(draw, i)) for i in (1, 2)) / 2)
    images = request(0).shard(Store()).images()
    for judge in {digest(e.judge): e.judge for e in run.plan.evaluators.values() if e and e.judge}.values():
        costs["start"] += took(lambda judge=judge: judge.score(images[:1], part[:1]))
        costs["judges"][judge.name] = took(lambda judge=judge: judge.score(images, part)) / len(part)
    pictures = training.drawn(model, [p.text for p in part[:8]], range(8), replace(run.sampler, steps=1))
    draws, each = torch.Generator().manual_seed(0), {}
    for steps in (5, 35):
        loss = lambda step: training.denoising(model, pictures, draws)
        given = (training.TRAINED["x"], loss, training.Optimisation(steps, torch.optim.Adam), folder, "calibration")
        each[steps] = took(partial(training.fine_tune, model, *given))
    costs["backward"] = (each[35] - each[5]) / 30 / 8 * costs["rate"] - 1
    execute(run)
    costs["run"] = took(lambda: execute(run))
    return costs | {"rest": 0}  # it is guessed for Stable Diffusion


def main(words: Sequence[str] = SWEEP) -> int:
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return checked(list(words))
    finally:
        os.environ.clear()
        os.environ.update(before)


def checked(words: list[str]) -> int:
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERASEBENCH_HOME"] = f"{home}/calibration"
        # numpy's threads are counted when it is imported, so in a process of its own
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            costs = fresh.submit(calibrated, Path(home)).result()
        os.environ["ERASEBENCH_HOME"] = f"{home}/sweep"
        runs, absent, code = schedule.composed(words, costs["published"])
        if code or not runs:
            return code or 2
        print(*schedule.report(runs, absent, costs), sep="\n")
        print(
            "\nmeasured on something else:",
            *(f"{k}={costs[k]:.3g}" for k in ("rate", "backward", "start", "load", "run")),
        )
        jobs = list(schedule.planned(runs, costs).jobs.values())
        predicted = costs["start"] + schedule.schedule(jobs, 1, costs["load"]).makespan
        command = [sys.executable, "-m", "erasebench", *words, f"results={home}/results"]
        start = time.perf_counter()
        processor = took(lambda: subprocess.run(command, check=True, capture_output=True))
        clock = time.perf_counter() - start
    sweep = " ".join(words)
    record(sweep, "predicted", predicted, "s")
    record(sweep, "measured", clock, "s")
    record(sweep, "measured, of the processor", processor, "s")
    record(sweep, "predicted / measured", predicted / clock, "")
    return int(abs(predicted / clock - 1) > 0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or SWEEP))
