"""Images a second: this loop, the bare U-Net beneath it (the limit), and the diffusers pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from erasebench.evaluators.clip import Clip
from erasebench.evaluators.objects import ObjectAccuracy
from erasebench.evaluators.spread import Neighbours
from erasebench.methods.uce import UCE
from measure import DEVICE, embedded, in_turn, peak_memory, record, seconds, stable_diffusion_shape

from erasebench.config import embedded_source
from erasebench.contracts import Sampler
from erasebench.mini.files import captions
from erasebench.mini.world import names
from erasebench.model.model import Model
from erasebench.run.run import execute
from erasebench.run.specification import Run
from erasebench.tasks import ObjectTask


@torch.inference_mode()
def bare(model: Model, count: int, steps: int) -> None:
    """The U-Net's forwards for so many guided images, and nothing else."""
    z = torch.randn(2 * count, *model.latent_shape(), device=DEVICE)
    context = model.encode(["a photo of the cat"]).hidden.repeat(2 * count, 1, 1)
    for t in torch.linspace(999, 0, steps).long().tolist():
        model.unet(z, t, context, return_dict=False)


def pipeline_of(model: Model) -> StableDiffusionPipeline:
    diffusers.utils.logging.disable_progress_bar()
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    parts = (model.vae, model.text_encoder, model.tokenizer, model.unet, scheduler)
    made = StableDiffusionPipeline(*parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def one_model(label: str, model: Model, count: int, steps: int, rounds: int) -> None:
    prompts, seeds, sampler = ["a photo of the cat"] * count, list(range(count)), Sampler("ddim", steps, 4.0)
    pipeline = pipeline_of(model)

    def theirs(batch: int) -> None:
        for i in range(0, count, batch):
            draws = [torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]]
            given = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "np"}
            pipeline(prompts[i : i + batch], generator=draws, **given)

    def quick() -> None:
        with model.fast():
            model.sample(prompts, seeds, sampler)

    quick()  # it is compiled
    took = in_turn(
        {
            "bare U-Net forwards (the limit)": partial(bare, model, count, steps),
            "this loop": lambda: model.sample(prompts, seeds, sampler),
            "this loop, speed=fast": quick,
            f"diffusers pipeline, batch {count}": partial(theirs, count),
            "diffusers pipeline, batch 1": partial(theirs, 1),
        },
        rounds,
    )
    what = f"sampling, {label}, {count} images, {steps} steps"
    for name, spent in took.items():
        record(what, name, count / spent, "images/s")
    record(what, "this loop, share of the limit", took["bare U-Net forwards (the limit)"] / took["this loop"], "")
    with peak_memory(what, "this loop"):
        model.sample(prompts, seeds, sampler)


def whole_run(model: Model) -> None:
    """A run with its judges from an empty store, beside the limit for its images."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERASEBENCH_HOME"] = home
        run = replace(one_run(), results=Path(home), device=DEVICE)
        count = 2 * len(run.plan.prompts)
        with seconds() as spent:
            execute(run)
        del os.environ["ERASEBENCH_HOME"]
    workers = torch.get_num_threads() if DEVICE == "cpu" else 1
    each = 64 * workers
    limit = in_turn({"": partial(bare, model, each, run.sampler.steps)}, 3)[""] / each
    what = f"whole run, {count} images, 5 steps, judges"
    record(what, "with model loading, fit and judges", count / spent[0], "images/s")
    record(what, "share of the limit", limit * count / spent[0], "")


def one_run() -> Run:
    """UCE on one object, 64 images a split, judged by CLIP and two evaluators."""
    world = {**names(), "captions": {"count": 64, "evaluation": captions()[0], "training": captions()[1]}}
    clip = Clip(architecture="embedded", pretrained="embedded")
    objects = ObjectAccuracy(clip, tuple(world["objects"]), "a photo of the {c}")
    evaluators = {"objects": objects, "neighbours": Neighbours(objects, "acc_s_top1", clip)}
    plan = ObjectTask(evaluators).plan(world, None, "airplane", 64)
    return Run("uce", UCE(), embedded_source(), "mini", plan, Sampler("ddim", 5, 4.0), target="airplane")


def another_metric() -> None:
    """A metric more on a finished run: what it samples, what it asks judges, and how long it takes."""
    evaluators = one_run().plan.evaluators
    run = replace(one_run(), plan=replace(one_run().plan, evaluators={"objects": evaluators["objects"]}))
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERASEBENCH_HOME"] = home
        execute(replace(run, results=Path(home)))
        more = replace(run, results=Path(home), plan=replace(run.plan, evaluators=evaluators))
        asked, loaded, score, load = [], [], Clip.score, Model.load
        Clip.score = lambda self, *given: asked.append(1) or score(self, *given)
        Model.load = lambda *given: loaded.append(1) or load(*given)
        try:
            with seconds() as took:
                execute(more)
        finally:
            Clip.score, Model.load = score, load
        del os.environ["ERASEBENCH_HOME"]
    what = "another metric of the same judge on a finished run"
    record(what, "all of it", took[0], "s")
    record(what, "shards that its judge looked at", len(asked), "")
    record(what, "models loaded", len(loaded), "")


def repeated_run() -> None:
    """A run that is all in the store: the whole command, and the part after imports."""
    what = "uce on one object, 8 images a split"
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "ERASEBENCH_HOME": home}
        command = [sys.executable, "-m", "erasebench", "method=uce", "images=8", f"results={home}"]
        for label in ("first", "repeated"):
            with seconds() as took:
                subprocess.run(command, env=environment, check=True, capture_output=True)
            record(what, f"{label} run, whole command", took[0], "s")
        code = (
            "import sys, time, torch, diffusers, transformers\nfrom erasebench import config, generate, model, run\n"
            "start = time.perf_counter()\nfrom erasebench.__main__ import main\ncode = main()\n"
            "print(time.perf_counter() - start)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command[3:]], env=environment, check=True, capture_output=True, text=True
        )
        record(what, "repeated run, after imports", float(done.stdout.split()[-1]), "s")
        with seconds() as took:
            subprocess.run([sys.executable, "-m", "erasebench", "--help"], check=True, capture_output=True)
        record("python -m erasebench --help", "whole command", took[0], "s")


def main() -> None:
    small = embedded()
    one_model("embedded", small, 64, 25, 5)
    whole_run(small)
    repeated_run()
    another_metric()
    on_gpu = DEVICE == "cuda"
    count, steps, rounds = (16, 25, 3) if on_gpu else (2, 1, 1)  # half a minute a step
    one_model("SD v1.4 shape", stable_diffusion_shape(), count, steps, rounds)
