"""Training loop of all stages, with checkpoints and resumption.

A light copy of a checkpoint can also serve as the start.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..store.local import home

log = logging.getLogger("erasebench")
UNFINISHED = Path(__file__).parent / "unfinished"


@dataclass(frozen=True)
class Recipe:
    """AdamW with warm-up, a constant rate and a linear fall.

    The fall covers the last share `cooldown` of `steps` steps (Hu et al., 2024). Before it the rate does not depend on
    `steps`, so that a stage can be lengthened. `ema` is the decay of the weights' moving average (0: none); `every` is
    the time between checkpoints, in seconds.
    """

    steps: int
    lr: float
    decay: float = 0.01
    warmup: int = 200
    cooldown: float = 0.25
    ema: float = 0.0
    every: float = 120.0

    def rate(self, step: int, start: int = 0) -> float:
        """Return the learning rate of a step.

        start: the step at which the optimiser's state was last reset.
        """
        fall = min(1.0, (self.steps - step) / max(1.0, self.cooldown * self.steps))
        return self.lr * min(1.0, (step - start + 1) / max(1, self.warmup)) * fall


def checkpoint(stage: str) -> Path:
    """Return the cache file with the full state of an unfinished stage."""
    return home() / "training2" / f"{stage}.pt"


def fit(stage: str, module: nn.Module, loss_of: Callable[[int], Tensor], recipe: Recipe) -> None:
    """Train a module, and leave the averaged weights (if any) in it.

    `loss_of(step)` makes its own batch from the step alone, so that a resumed training is identical. A checkpoint
    atomically replaces the previous one.
    """
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=recipe.lr, weight_decay=recipe.decay, betas=(0.9, 0.98), fused=True
    )
    shadow = [p.detach().clone() for p in module.parameters()] if recipe.ema else []
    step, fresh = restore(stage, module, optimiser, shadow)
    last, began, first, losses = time.time(), time.time(), step, []
    while step < recipe.steps:
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step, fresh)
        loss = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if shadow:
            keep = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(shadow, [p.detach() for p in module.parameters()], 1 - keep)
        step += 1
        if step % 25 == 0:
            pace = (time.time() - began) / (step - first)
            log.info(
                "%s: step %d/%d, loss %.4f, %.2f s a step", stage, step, recipe.steps, np.mean(losses[-100:]), pace
            )
        if time.time() - last > recipe.every or step == recipe.steps:
            last = time.time()
            state = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "shadow": shadow}
            save({**state, "step": step, "fresh": fresh}, checkpoint(stage))
    for parameter, mean in zip(module.parameters(), shadow, strict=False):
        parameter.data.copy_(mean)


def carry_over(net: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Copy tensors of equal name and shape; -> names that stay random."""
    mine = net.state_dict()
    fitting = {k: v.float() for k, v in state.items() if k in mine and mine[k].shape == v.shape}
    net.load_state_dict(fitting, strict=False)
    return [k for k in mine if k not in fitting]


def save(state: dict, path: Path) -> None:
    """Write a checkpoint beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def restore(stage: str, module: nn.Module, optimiser: torch.optim.Optimizer, shadow: list[Tensor]) -> tuple[int, int]:
    """Load the checkpoint in the cache, or else the repository's light copy.

    -> (the step to continue with, the step at which the optimiser was reset)
    """
    if checkpoint(stage).exists():
        saved = torch.load(checkpoint(stage), weights_only=True)
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        for mine, theirs in zip(shadow, saved["shadow"], strict=True):
            mine.copy_(theirs)
        log.info("%s: resumed at step %d", stage, saved["step"])
        return saved["step"], saved["fresh"]
    light = UNFINISHED / f"{stage}.safetensors"
    if not light.exists():
        return 0, 0
    step = json.loads(light.with_suffix(".json").read_text(encoding="utf-8"))["step"]
    tensors = load_file(light)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    for i, mean in enumerate(shadow):
        mean.copy_(tensors[f"shadow.{i}"])
    log.info("%s: carried on from the light copy of step %d", stage, step)
    return step, step


def lighten(stage: str) -> Path:
    """Copy a checkpoint into the repository; returns the file.

    The copy has half precision and no optimiser state.
    """
    saved = torch.load(checkpoint(stage), weights_only=True)
    half = lambda v: v.half().contiguous() if v.is_floating_point() else v.contiguous()
    tensors = {f"module.{k}": half(v) for k, v in saved["module"].items()}
    tensors |= {f"shadow.{i}": half(v) for i, v in enumerate(saved["shadow"])}
    UNFINISHED.mkdir(exist_ok=True)
    light = UNFINISHED / f"{stage}.safetensors"
    save_file(tensors, light)
    light.with_suffix(".json").write_text(json.dumps({"step": saved["step"]}) + "\n", encoding="utf-8")
    return light
