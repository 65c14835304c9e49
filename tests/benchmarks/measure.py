"""What the benchmarks share: a table that grows line by line, clocks, memory, and models of both sizes."""

from __future__ import annotations

import csv
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from erasebench import provenance
from erasebench.config import embedded_source
from erasebench.model.model import Model
from erasebench.model.source import Components

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("part", "measured", "of", "value", "unit", "machine")
RESULTS: list[tuple[str, str, float, str]] = []


def record(what: str, name: str, value: float, unit: str) -> None:
    """A line of the table: what was measured, of which part or size, and how much."""
    RESULTS.append((what, name, value, unit))
    print(f"{what:52} {name:44} {value:10.3f} {unit}", flush=True)


def write(part: str, path: Path) -> None:
    """The lines so far, as one part of the table; other parts stay as they are in the file."""
    path.parent.mkdir(exist_ok=True)
    machine = f"{provenance.device(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = list(csv.reader(path.open(newline="")))[1:] if path.is_file() else []
    lines = [line for line in lines if line[0] != part]
    lines += [[part, what, name, f"{value:.4g}", unit, machine] for what, name, value, unit in RESULTS]
    RESULTS.clear()
    with path.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *lines])


@contextmanager
def seconds() -> Iterator[list[float]]:
    """[seconds], once over."""
    took: list[float] = []
    settle()
    start = time.perf_counter()
    yield took
    settle()
    took.append(time.perf_counter() - start)


def settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way. They take turns, since other work on the machine comes and goes."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with seconds() as spent:
                way()
            took[name] += spent
    return {name: sorted(values)[len(values) // 2] for name, values in took.items()}


@contextmanager
def inside(module: torch.nn.Module, spent: list[float]) -> Iterator[None]:
    """Add up the time spent in a module's forward passes."""
    start: list[float] = []
    before = module.register_forward_pre_hook(lambda *a: start.append(time.perf_counter()))
    after = module.register_forward_hook(lambda *a: spent.append(time.perf_counter() - start.pop()))
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def peak_memory(what: str, name: str) -> Iterator[None]:
    """Record by how much memory grew at most inside. On the CPU it is looked at every few milliseconds, since the kernel's
    own high-water mark remembers what came before."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        record(what, name, (torch.cuda.max_memory_allocated() - before) / 2**20, "MB more at most")
        return
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
    record(what, name, max(highest[0], resident()) - before, "MB more at most")


def linear(what: str, sizes: Sequence[int], took: Sequence[float], limit: float = 1.5) -> None:
    """Seconds for the next one at each size, over what they are at the largest: 1 where the cost is linear. What is more
    than `limit` times off is said."""
    points = list(zip(sizes, took, strict=True))
    marginal = [(b - a) / (m - n) for (n, a), (m, b) in pairwise(points)]
    for (n, m), each in zip(pairwise(sizes), marginal, strict=True):
        factor = each / marginal[-1]
        far = "" if 1 / limit <= factor <= limit else " (not linear)"
        record(what, f"next one between {n} and {m}, by the last{far}", factor, "times")


def embedded() -> Model:
    return Model.load(embedded_source(), DEVICE)


def stable_diffusion_shape() -> Model:
    """Random weights of exactly SD v1.4's shapes, with the embedded tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
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
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
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
    parts = [part.to(DEVICE).eval().requires_grad_(False) for part in (unet, vae, text)]
    return Model(Components(*parts, mini.tokenizer, mini.scheduler_config))
