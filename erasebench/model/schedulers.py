"""Samplers: diffusers schedulers, set up for a base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..contracts import ErasebenchError, Sampler
from .source import quiet

MANY, LEAST_NOISE = 100, 0.8  # runs of more steps must begin in the noisiest fifth of the timesteps
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
}


def load(file: Mapping[str, Any], sampler: Sampler, device: torch.device, xl: bool) -> Any:
    """Return a fresh diffusers scheduler with its timesteps set.

    It is set up as in diffusers' pipelines. `file` is the base's scheduler_config.json. Raises ErasebenchError for a
    sampler that does not fit the base.
    """
    if sampler.name not in SCHEDULERS:
        raise ErasebenchError(f"unknown sampler {sampler.name!r}: choose from {', '.join(SCHEDULERS)}")
    # the file of a scheduler that cannot clip has no such entry, and DDIM clips by default
    config = {"clip_sample": False, **file}
    if not xl:  # SDXL's pipeline keeps the file's entries
        config |= {"steps_offset": 1, "clip_sample": False}
    try:
        scheduler = getattr(quiet("diffusers"), SCHEDULERS[sampler.name]).from_config(config)
        scheduler.set_timesteps(sampler.steps, device=device)
    except Exception as error:  # schedulers raise various errors for unsupported settings
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ErasebenchError(f"{sampler.name} of {sampler.steps} steps cannot sample this base: {reason}") from error
    last, trained = float(scheduler.timesteps.max()), len(scheduler.alphas_cumprod)
    if last > trained - 1 and not hasattr(scheduler, "sigmas"):  # schedulers with sigmas interpolate them
        raise ErasebenchError(
            f"sampler.steps={sampler.steps}: {sampler.name} would begin at timestep {last:g}, and the base was trained "
            f"up to {trained - 1}: at most {trained - 1} steps"
        )
    if sampler.steps > 1 and float(scheduler.timesteps.min()) == last:
        raise ErasebenchError(
            f"sampler.steps={sampler.steps}: {sampler.name} would stay at timestep {last:g}: at most {trained - 1} steps"
        )
    if sampler.steps > MANY and last < LEAST_NOISE * trained:  # diffusers rounds the spacing down to an integer
        raise ErasebenchError(
            f"sampler.steps={sampler.steps}: {sampler.name} would begin at timestep {last:g} of {trained}, with pure noise: "
            f"{trained // 5} steps or fewer begin near the end"
        )
    return scheduler


def check_step(scheduler: Any, name: str) -> None:
    """Raise ErasebenchError for a scheduler that cannot take a step."""
    z = torch.zeros(1, 1, 1, 1, device=scheduler.timesteps.device)
    try:
        scheduler.step(z, scheduler.timesteps[0], scheduler.scale_model_input(z, scheduler.timesteps[0]))
    except Exception as error:  # unsupported prediction types show in the first step only
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        predicted = scheduler.config.prediction_type
        raise ErasebenchError(f"{name} cannot sample a base that predicts {predicted}: {reason}") from error
