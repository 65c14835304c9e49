"""Peak memory of every method and attack at its published values on Stable Diffusion 1.4 (512 px, fp32), counted without a GPU.

    python tests/benchmarks/memory.py                        writes results/reference/memory.csv
    python tests/benchmarks/memory.py --plugins sa,cce       measures some, and leaves the other lines as they are
    python tests/benchmarks/memory.py --before               writes the column of the code before (PYTHONPATH says which)

Values are those of the configuration but for how long something takes: two steps in place of a thousand hold as much as all of them.
CLIP, Grounding DINO and SAM, which some methods ask, are not counted.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hydra
import safetensors.torch
from erasebench.evaluators import clip
from omegaconf import OmegaConf
from simulated import GIB, META, Gpu, gpu, stable_diffusion

from erasebench import conf as configuration
from erasebench import config as _resolvers  # noqa: F401
from erasebench import config_sources
from erasebench.contracts import Brief, Concept, Prompt, Sampler, Scene
from erasebench.model import openings, source
from erasebench.model.context import Context
from erasebench.model.model import Model
from erasebench.run import images as generate
from erasebench.store import local as store
from erasebench.toolbox import masks

CSV = Path("results/reference/memory.csv")
COLUMNS = ("plugin", "task", "stage", "before_gib", "after_gib")
NOT_THIS = {
    "retrained": "of the embedded world alone",
    "checkpoint": "it only reads a file",
    "mma_image": "its pictures are the user's",
    "replay": "it shows what another found",
    **dict.fromkeys(("udatk", "p4d", "p4d_umu"), "the counter loses which tokens are free: their graphs are CCE's"),
    **dict.fromkeys(("mma_text", "rab", "speed"), "text encoder alone; the counter does not know what they compare"),
    "spm": "its anchors are drawn until enough are accepted, by numbers that are lost",
}
TASKS = ("object", "explicit")  # a method is measured in the second where its values differ there
FEW = {  # how long something takes
    **dict.fromkeys(("steps", "search_steps", "inversion_steps", "attack_steps", "mine_steps", "key_steps"), 2),
    **dict.fromkeys(("epochs", "max_loops", "searches", "fim_pictures", "warmup"), 1),
    **dict.fromkeys(("iterations", "timesteps", "generations", "checkpoints", "inversions", "restarts"), 2),
    **dict.fromkeys(("image_steps", "fim_steps"), 3),
    **dict.fromkeys(("every", "calibrated", "retained"), 64),
}
ALSO = {
    "sa": {"fim": "subsampled", "fim_steps": 16, "pictures": 64, "replay": 320},
    "salun": {"pictures": 16, "kept": 64},
    "safe_clip": {"pairs": 256},
    "p4d": {"every": 1},
    "ca": {"images": 64},
    "gie": {"scales": (1.0, 0.0)},
    "adv_unlearn": {"warmup": 0},
    "latent_guard": {"concepts": 64},
    "dark_miner": {"pool": 50},
}


def chosen(name: str) -> list[str]:
    folder = Path(next(iter(configuration.__path__))) / name
    return [f.stem for f in sorted(folder.glob("*.yaml")) if f.stem not in NOT_THIS and "here:" in f.read_text() + "here:"]


def has_values(method: str, task: str) -> bool:
    """Whether a method has published values of its own for a task on photographs."""
    file = Path(next(iter(configuration.__path__))) / "values" / "photo" / f"{method}.yaml"
    blocks = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return any(config_sources.block_name(scope, task) in blocks for scope in ("kind", "task"))


def plugins() -> list[tuple[str, str, str]]:
    """(kind, name, task) of everything that is measured."""
    methods = [("method", m, t) for m in chosen("method") for t in TASKS if t == "object" or has_values(m, t)]
    return methods + [("attack", a, "object") for a in chosen("attack")]


def composed(kind: str, name: str, task: str) -> tuple[Any, dict]:
    """(the plugin with its published values, the world)"""
    words = ["model=sd14", f"task={task}", f"method={name}" if kind == "method" else f"attack=[{name}]"]
    words += ["target=cat"] if task == "object" else []
    with hydra.initialize_config_module("erasebench.conf", version_base="1.3"):
        config = hydra.compose("config", words)
        made = hydra.utils.instantiate(config.method if kind == "method" else config.attack[name], _convert_="object")
        return made, OmegaConf.to_container(config.world, resolve=True)


def shorter(plugin: Any, name: str) -> Any:
    """The plugin with fewer steps of everything that repeats itself."""
    values = {f.name: getattr(plugin, f.name) for f in fields(plugin) if f.init}
    fewer = {k: FEW[k] for k, v in values.items() if k in FEW and type(v) in (int, type(None)) and (v is None or v > FEW[k])}
    if values.get("trajectories") is None and "ddim_steps" in values:  # the steps of these are kept
        fewer["ddim_steps"] = 3
    if values.get("image_sampler") == "dpmsolver":  # it looks its place up among timesteps, whose numbers are lost
        fewer["image_sampler"] = "ddim"
    if values.get("vocabulary") == "tokenizer":
        fewer["vocabulary"] = tuple(f"word{i}" for i in range(300))
    fewer |= {k: shorter(v, name) for k, v in values.items() if is_dataclass(v) and hasattr(v, "fit")}
    fewer |= {k: v for k, v in ALSO.get(name, {}).items() if k in values}
    return replace(plugin, **fewer)


@contextmanager
def without_files() -> Iterator[None]:
    """What is large is kept in memory as shapes; weights that nobody has here have shapes alone, too."""
    kept: dict[str, dict[str, Tensor]] = {}

    def save(tensors: dict[str, Tensor], path: Any, *more: Any) -> None:
        if sum(t.numel() for t in tensors.values()) < 2**22:
            save_really({k: t.contiguous() for k, t in tensors.items()}, path)
        else:
            Path(path).write_bytes(key := os.urandom(16))
            kept[key.hex()] = tensors

    def load(path: Any, *more: Any) -> dict[str, Tensor]:
        with open(path, "rb") as file:
            found = kept.get(file.read(17).hex())
        return load_really(path) if found is None else dict(found)

    save_really, load_really = safetensors.torch.save_file, safetensors.torch.load_file
    stand_ins = [
        (save_really, save), (load_really, load), (source.weights_digest, lambda *modules: "weights"),
        (clip.load, stand_in_clip), (openings.check_weight, lambda *inputs: None),
    ]  # fmt: skip
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, {"ERASEBENCH_HOME": home}))
        stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))  # progress bars
        stack.enter_context(mock.patch.dict(masks.MASKS, {"grounded": masks.whole}))
        select = Context.select  # a list becomes an index on the device itself, where its numbers are lost
        listed = lambda self, index: select(self, torch.tensor(index) if isinstance(index, list) else index)
        stack.enter_context(mock.patch.object(Context, "select", listed))
        none_refused = lambda self, context: torch.zeros(len(context.ids), dtype=torch.bool)  # of scores that nobody knows
        stack.enter_context(mock.patch.object(Model, "refuses", none_refused))
        for module in [m for n, m in sys.modules.items() if n.startswith("erasebench") and m is not None]:
            for attribute, value in list(vars(module).items()):
                for real, other in stand_ins:
                    if value is real:
                        stack.enter_context(mock.patch.object(module, attribute, other))
        yield


def stand_in_clip(architecture: str, pretrained: str, *more: Any):
    """CLIP as a judge has it, without weights."""

    class Encoder:
        encode_image = encode_text = staticmethod(lambda x: torch.zeros(len(x), 768))

    return Encoder(), lambda images: images[:, :1, :1], lambda texts: torch.zeros(len(texts), 77)


def remember(counter: Gpu, model: Model) -> None:
    """Networks that are asked the same without a gradient answer from memory: their peak and the shape of what they give."""

    def remembered(call: Callable, odd: Callable[[dict], bool] = lambda given: False) -> Callable:
        known: dict[Any, tuple[int, Any]] = {}

        def asked(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() or odd(kwargs):
                return call(*args, **kwargs)
            key = about((args, kwargs)), tuple(type(p) for p in model.unet.attn_processors.values())
            if key not in known:
                outer, counter.peak, before = counter.peak, counter.held, counter.held
                out = call(*args, **kwargs)
                known[key] = counter.peak - before, out
                counter.peak = max(outer, counter.peak)
                known[key] = known[key][0], emptied(out, lambda x: (x.shape, x.dtype))
                return out
            more, shapes = known[key]
            counter.expect(more)
            return emptied(shapes, None)

        return asked

    listed = lambda given: any(isinstance(v, list) for v in (given.get("cross_attention_kwargs") or {}).values())
    seeing = lambda given: listed(given) or any(hasattr(p, "see") for p in model.unet.attn_processors.values())
    model.unet.forward = remembered(model.unet.forward, seeing)
    model.vae.decode = remembered(model.vae.decode)
    model.text_encoder.forward = remembered(model.text_encoder.forward)


def about(value: Any) -> Any:
    """What is alike of inputs that cost the same."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return tuple((k, about(v)) for k, v in value.items())
    return tuple(map(about, value)) if isinstance(value, tuple | list) else repr(value)


def emptied(value: Any, of: Callable[[Tensor], Any] | None) -> Any:
    """Tensors as shapes, or (of=None) shapes as tensors, in whatever they stand."""
    if isinstance(value, Tensor):
        return Shape(of(value))
    if isinstance(value, Shape):
        return torch.empty(value.of[0], dtype=value.of[1], device=META)
    if hasattr(value, "keys"):  # what transformers gives
        return type(value)(**{k: emptied(v, of) for k, v in value.items()}) if of is None else Output(type(value), dict(value), of)
    if isinstance(value, Output):
        return value.kind(**{k: emptied(v, None) for k, v in value.values.items()})
    return tuple(emptied(v, of) for v in value) if isinstance(value, tuple) else value


class Shape:
    def __init__(self, of: tuple):
        self.of = of


class Output:
    def __init__(self, kind: type, values: dict, of: Callable):
        self.kind, self.values = kind, {k: emptied(v, of) for k, v in values.items()}


@cache
def simulation() -> tuple[Gpu, Model]:
    """A GPU with Stable Diffusion 1.4 on it, for any number of measurements."""
    with gpu() as counter:
        remember(counter, model := stable_diffusion())
    return counter, model


def measure(kind: str, name: str, task: str) -> dict[str, float]:
    """Stage -> peak in GiB, the model's weights among it."""
    (plugin, world), (counter, model) = composed(kind, name, task), simulation()
    found = {}
    with without_files(), gpu(counter):
        stages = erasing(model, plugin, name, world, task) if kind == "method" else attacking(model, plugin, name, world)
        for stage, work in stages:
            gc.collect()
            counter.peak = counter.held
            work()
            found[stage] = counter.peak / GIB
    return found


def brief_of(world: dict, task: str) -> Brief:
    known = {"object": ["cat"], "explicit": world["explicit"]["phrases"]}[task]
    kind = "object" if task == "object" else "explicit"
    captions = tuple(f"a picture of {i} birds on a wire" for i in range(200))
    concepts = tuple(Concept(name, kind, "sky") for name in known)
    kept = tuple(n for n in world["objects"] if n not in known) if task == "object" else ()
    return Brief(concepts, kept, captions, tuple(world["templates"]["train"][kind]))


def erasing(model: Model, eraser: Any, name: str, world: dict, task: str) -> Iterator[tuple[str, Callable]]:
    eraser, brief = shorter(eraser, name), brief_of(world, task)
    with tempfile.TemporaryDirectory() as folder:
        yield "fit", lambda: eraser.fit(model, brief, Path(folder), 0)
        with eraser.apply(model, Path(folder)):
            asked = [Prompt(str(i), "a photo of a cat", i, "target", "cat") for i in range(16)]
            yield "sample", lambda: generate.sample(model, asked, Sampler("ddim", 2, 7.5), 16)


def attacking(model: Model, attack: Any, name: str, world: dict) -> Iterator[tuple[str, Callable]]:
    attack, together = shorter(attack, name), world["attacked"]["together"]
    prompts = tuple(Prompt(str(i), "a photo of a cat", i, "target", "cat") for i in range(together))
    pictures = torch.zeros(64, 512, 512, 3, dtype=torch.uint8)
    scene = Scene(
        prompts=prompts, before=np.zeros(together, bool), pictures=pictures[:together], known={"cat": pictures},
        concepts={"cat": Concept("cat", "object", "sky")}, templates=tuple(world["templates"]["train"]["object"]),
        sampler=Sampler("ddim", 2, 7.5), seed=0, together=together, store=store.Store(), identity={"attack": attack},
        hit=lambda sampled, asked: (np.zeros(len(asked), bool), np.zeros(len(asked))), allows=lambda text: True,
    )  # fmt: skip
    founds: list = []
    yield "search", lambda: founds.extend(attack.run(model, scene))
    if hasattr(attack, "objective"):
        guided = replace(attack, objective="guided")
        other = replace(scene, identity={"attack": guided})
        yield "search guided", lambda: list(guided.run(model, other))
    shots = [(found, shot) for _, found in founds for shot in found.shots][:16]
    asked = [Prompt(f"a/{i}", s.text, s.seed, "attack", "cat") for i, (_, s) in enumerate(shots)]
    draw = getattr(attack, "draw", None)
    if draw is not None:
        own = {p.id: f for p, (f, _) in zip(asked, shots, strict=True)}
        asked = [replace(p, id=f"a/{i % attack.images}") for i, p in enumerate(asked)]
        founds_of = [own[f"a/{i}"] for i in range(len(asked))]
        yield "sample", lambda: draw(model, asked, founds_of, scene.sampler)


def read(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {(r["plugin"], r["task"], r["stage"]): r for r in csv.DictReader(file)}


def write(path: Path, lines: dict[tuple[str, str, str], dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        out.writerows(lines[key] for key in sorted(lines))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plugins", default="", help="some, with commas between them")
    parser.add_argument("--before", action="store_true", help="this is the code before")
    parser.add_argument("--csv", type=Path, default=CSV)
    given = parser.parse_args(words)
    some, column = set(filter(None, given.plugins.split(","))), "before_gib" if given.before else "after_gib"
    wanted = [plugin for plugin in plugins() if not some or plugin[1] in some]
    wanted.sort(key=lambda plugin: given.plugins.split(",").index(plugin[1]) if some else 0)
    failed = 0
    for plugin in wanted:
        try:
            record(given.csv, plugin, column, measure(*plugin))
        except Exception:  # of code from before this script was there, most likely
            print(plugin, traceback.format_exc(limit=-2), flush=True)
            simulation.cache_clear()
            failed = 1
    return failed


def record(path: Path, plugin: tuple[str, str, str], column: str, found: dict[str, float]) -> None:
    lines, (_, name, task) = read(path), plugin
    for stage, gib in found.items():
        empty = dict.fromkeys(COLUMNS, "") | {"plugin": name, "task": task, "stage": stage}
        lines.setdefault((name, task, stage), empty)[column] = f"{gib:.1f}"
        print(f"{name:16} {task:10} {stage:14} {gib:6.1f} GiB", flush=True)
    write(path, lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
