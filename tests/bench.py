"""Speed, measured: `make bench` prints a table and writes results/bench.csv. Not a test: nothing asserts a time."""

from __future__ import annotations

import csv
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from erasebench.evaluators.clip import Clip
from erasebench.evaluators.detections import NudeNet, nudenet
from erasebench.evaluators.objects import ObjectAccuracy
from erasebench.evaluators.spread import Neighbours
from erasebench.methods.mace import MACE
from erasebench.methods.uce import UCE
from torch import Tensor, nn

from erasebench import closed_form as closed_forms
from erasebench import provenance
from erasebench.config import embedded_source
from erasebench.contracts import Brief, Concept, Sampler
from erasebench.mini.nets import captions
from erasebench.mini.world import names
from erasebench.model import Model
from erasebench.run import Run, execute
from erasebench.tasks import ObjectTask

RESULTS: list[tuple[str, float, str]] = []


def record(name: str, value: float, unit: str) -> None:
    RESULTS.append((name, value, unit))
    print(f"{name:78} {value:10.3f} {unit}", flush=True)


@contextmanager
def inside(module: torch.nn.Module, spent: list[float]):
    """Add up the time spent in a module's forward passes."""
    start: list[float] = []
    before = module.register_forward_pre_hook(lambda *a: start.append(time.perf_counter()))
    after = module.register_forward_hook(lambda *a: spent.append(time.perf_counter() - start.pop()))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def sampling(count: int = 64, rounds: int = 9) -> None:
    """Our loop and the diffusers pipeline, same batch, same seeds, in turn; the medians."""
    import diffusers
    from diffusers import StableDiffusionPipeline

    diffusers.utils.logging.disable_progress_bar()
    source = embedded_source()
    model = Model.load(source)
    pipeline = StableDiffusionPipeline.from_pretrained(source.path, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds, sampler = ["a photo of the cat"] * count, list(range(count)), Sampler("ddim", 25, 4.0)
    ours, theirs, shares = [], [], []
    for _ in range(rounds):  # in turn, since other work on the machine comes and goes
        spent: list[float] = []
        with inside(model.unet, spent):
            start = time.perf_counter()
            model.sample(prompts, seeds, sampler)
            ours.append(time.perf_counter() - start)
        shares.append(sum(spent) / ours[-1])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = time.perf_counter()
        pipeline(prompts, generator=generators, num_inference_steps=25, guidance_scale=4.0, output_type="np")
        theirs.append(time.perf_counter() - start)
    middle = lambda values: sorted(values)[len(values) // 2]
    record(f"{count} images, 25 steps, guidance: this loop", middle(ours), "s")
    record(f"{count} images, 25 steps, guidance: diffusers pipeline", middle(theirs), "s")
    record("share of sampling spent inside U-Net forwards", 100 * middle(shares), "%")


def repeated_run() -> None:
    """A run that is all in the store: the whole command, and the part after imports."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "ERASEBENCH_HOME": home}
        command = [sys.executable, "-m", "erasebench", "method=uce", "images=8", f"results={home}"]
        for label in ("first", "repeated"):
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            record(f"uce on one object, 8 images a split, {label} run, whole command", time.perf_counter() - start, "s")
        code = (
            "import sys, time, torch, diffusers, transformers\nfrom erasebench import config, generate, model, run\n"
            "start = time.perf_counter()\nfrom erasebench.__main__ import main\ncode = main()\n"
            "print(time.perf_counter() - start)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command[3:]], env=environment, check=True, capture_output=True, text=True
        )
        record("the repeated run after imports", float(done.stdout.split()[-1]), "s")
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "erasebench", "--help"], check=True, capture_output=True)
        record("python -m erasebench --help", time.perf_counter() - start, "s")


def scoring(count: int = 1000, size: int = 512) -> None:
    """NudeNet on images in memory: all of it, and the part that its own network takes."""
    detector, *_ = nudenet()
    run, spent = detector.onnx_session.run, []

    def timed(*arguments):
        start = time.perf_counter()
        out = run(*arguments)
        spent.append(time.perf_counter() - start)
        return out

    images = torch.randint(256, (64, size, size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    detector.onnx_session = SimpleNamespace(run=timed)
    start = time.perf_counter()
    for part in range(0, count, len(images)):
        NudeNet().score(images[: count - part], [])
    whole = time.perf_counter() - start
    record(f"NudeNet, {count} images of {size} pixels in memory", whole, "s")
    record("share of that outside its network", 100 * (1 - sum(spent) / whole), "%")


def another_metric() -> None:
    """A metric more on a finished run: what it samples, what it asks judges, and how long it takes."""
    run = replace(one_run(), plan=replace(one_run().plan, evaluators={"objects": one_run().plan.evaluators["objects"]}))
    with tempfile.TemporaryDirectory() as home:
        os.environ["ERASEBENCH_HOME"] = home
        execute(replace(run, results=Path(home)))
        more = replace(run, results=Path(home), plan=replace(run.plan, evaluators=one_run().plan.evaluators))
        asked, loaded, score, load = [], [], Clip.score, Model.load
        Clip.score = lambda self, *given: asked.append(1) or score(self, *given)
        Model.load = lambda *given: loaded.append(1) or load(*given)
        try:
            start = time.perf_counter()
            execute(more)
            took = time.perf_counter() - start
        finally:
            Clip.score, Model.load = score, load
        del os.environ["ERASEBENCH_HOME"]
    record("another metric of the same judge on a finished run", took, "s")
    record("batches that its judge looked at for it", len(asked), "")
    record("models that were loaded for it", len(loaded), "")


def one_run() -> Run:
    """UCE on one object, 64 images a split, judged by CLIP and two evaluators."""
    world = {**names(), "captions": {"count": 64, "evaluation": captions()[0], "training": captions()[1]}}
    clip = Clip(architecture="embedded", pretrained="embedded")
    objects = ObjectAccuracy(clip, tuple(world["objects"]), "a photo of the {c}")
    evaluators = {"objects": objects, "neighbours": Neighbours(objects, "acc_s_top1", clip)}
    plan = ObjectTask(evaluators).plan(world, None, "airplane", 64)
    return Run("uce", UCE(), embedded_source(), "mini", plan, Sampler("ddim", 5, 4.0), target="airplane")


def closed_form(model: Model, count: int, label: str) -> None:
    """UCE for `count` concepts and as many preserved: fit (with and without text encoding) and apply."""
    brief = Brief(
        tuple(Concept(f"cat {i}", "object", "sky") for i in range(count)), tuple(f"dog {i}" for i in range(count))
    )
    with tempfile.TemporaryDirectory() as folder:
        encoding: list[float] = []
        with inside(model.text_encoder, encoding):
            start = time.perf_counter()
            UCE().fit(model, brief, Path(folder), 0)
            fit = time.perf_counter() - start
        start = time.perf_counter()
        with UCE().apply(model, Path(folder)):
            apply = time.perf_counter() - start
    record(f"UCE, {count} concepts and {count} preserved, {label}: text encoding", sum(encoding), "s")
    record(f"UCE, {count} concepts and {count} preserved, {label}: fit without encoding", fit - sum(encoding), "s")
    record(f"UCE, {count} concepts and {count} preserved, {label}: apply", apply, "s")


def textbook(weights: dict[str, Tensor], sources: Tensor, targets: Tensor, ridge: float) -> dict[str, Tensor]:
    """The closed form as it is usually written: layer by layer, concept by concept, an fp32 inverse for each matrix."""
    made = {}
    for name, weight in weights.items():
        left, right = ridge * weight, ridge * torch.eye(weight.shape[1])
        for c, target in zip(sources, targets, strict=True):
            left = left + (target @ weight.T).T @ c
            right = right + c.T @ c
        made[name] = left @ torch.inverse(right)
    return made


def one_matrix(weights: dict[str, Tensor], sources: Tensor, targets: Tensor, ridge: float) -> dict[str, Tensor]:
    edit, _ = closed_forms.System(sources.shape[-1]).map(sources.flatten(0, 1), targets.flatten(0, 1)).solve(ridge)
    return {name: (weight.double() @ edit).float() for name, weight in weights.items()}


def embeddings(count: int, rows: int, width: int) -> Tensor:
    """[count, rows, width] like those of CLIP: normalised, and alike from one position to the next, which is what
    makes the systems ill-conditioned. Drawn, since encoding 2,000 names takes minutes here and is no part of this."""
    draws = torch.Generator().manual_seed(count)
    shared, of_name = torch.randn(rows, width, generator=draws), torch.randn(count, 1, width, generator=draws)
    own = torch.randn(count, rows, width, generator=draws)
    return nn.functional.layer_norm(shared[:1] + 0.1 * shared + 0.3 * of_name + 0.02 * own, (width,))


def closed_form_scaling(model: Model, counts: tuple[int, ...] = (1, 10, 100, 1000), ridge: float = 0.5) -> None:
    """UCE's system (75 rows a name of two tokens) as one matrix beside the textbook's loop; errors against fp64."""
    weights = {name: model.weight(name) for name in model.names(closed_forms.PROJECTIONS)}
    for count in counts:
        sources = embeddings(count, 75, model.text_width)
        targets = embeddings(1, 75, model.text_width).expand_as(sources).contiguous()
        eye = ridge * torch.eye(model.text_width, dtype=torch.float64)
        flat, aims = sources.flatten(0, 1).double(), targets.flatten(0, 1).double()
        exact = torch.linalg.solve(eye + flat.T @ flat, (eye + aims.T @ flat).T).T
        label = f"closed form, {count} concepts, SD v1.4 shape"
        spent = {}
        for way, edit in (("one matrix", one_matrix), ("textbook", textbook)):
            with peak_memory(f"{label}: {way}, memory needed at most"):
                start = time.perf_counter()
                made = edit(weights, sources, targets, ridge)
                spent[way] = time.perf_counter() - start
            record(f"{label}: {way}", spent[way], "s")
            error = max((made[n].double() - w.double() @ exact).abs().max().item() for n, w in weights.items())
            record(f"{label}: {way}, largest error against fp64", 1e9 * error, "1e-9")
        record(f"{label}: textbook / one matrix", spent["textbook"] / spent["one matrix"], "times")


def mace(model: Model, count: int = 100) -> None:
    """Adapters of many people: trained as one batch, and one after the other."""
    people = tuple(Concept(name, "person", "a person") for name in names()["people"]["erase"][:count])
    brief = Brief(people, templates=("{c}",))
    eraser = MACE(masks="whole", images=1, image_sampler="ddim", image_steps=2, steps=10)
    latents, shown, _ = eraser.pictures(model, brief, 0)
    for label, together in (("together", count), ("in turn", 1)):
        start = time.perf_counter()
        replace(eraser, together=together).adapters(model, brief, latents, shown, 0)
        record(f"MACE, {count} people, 10 steps of their adapters, {label}", time.perf_counter() - start, "s")


@contextmanager
def peak_memory(label: str):
    """Record by how much the process grew at most inside: looked at every few milliseconds, since the kernel's own
    high-water mark remembers what came before."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    before, highest, over = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    record(label, max(highest[0], resident()) - before, "MB")


def stable_diffusion_shape() -> Model:
    """A random U-Net and text encoder of exactly SD v1.4's shape, with the embedded tokenizer and VAE."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    mini = Model.load(embedded_source())
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )
    return Model(unet, mini.vae, text, mini.tokenizer, mini.scheduler_config)


def main() -> None:
    print(f"{provenance.device('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    sampling()
    repeated_run()
    scoring()
    another_metric()
    closed_form(Model.load(embedded_source()), 100, "embedded model")
    mace(Model.load(embedded_source()))
    large = stable_diffusion_shape()
    closed_form(large, 100, "SD v1.4 shape")
    closed_form_scaling(large)
    record("peak memory of this process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "MB")
    path = Path("results/bench.csv")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("measured", "value", "unit"))
        writer.writerows((name, f"{value:.4g}", unit) for name, value, unit in RESULTS)
    print(path)


if __name__ == "__main__":
    main()
