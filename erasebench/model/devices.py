"""Devices: selection, checks, and fp32 arithmetic on a GPU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ..contracts import ErasebenchError

DRIVER = Path("/proc/driver/nvidia")


def own_device(shared: bool = False, number: int = 0) -> str:
    """Return this machine's GPU, or the CPU if there is none.

    Jobs that share a machine (`shared`) are spread over its GPUs by their number."""
    if not torch.cuda.is_available():
        return "cpu"
    there = torch.cuda.device_count()
    return f"cuda:{number % there}" if shared and there > 1 else "cuda"


def use_exact_arithmetic() -> None:
    """Switch TF32 off, so that fp32 is computed as fp32.

    torch leaves it on for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def arithmetic() -> str:
    """Describe how fp32 is computed on a GPU."""
    on = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return f"TF32 {'on' if on else 'off'}"


def check_gpu_is_seen() -> None:
    """Raise ErasebenchError if torch does not see a GPU of this machine.

    On the CPU, Stable Diffusion takes days."""
    if reason := unseen_gpu():
        raise ErasebenchError(f"{reason}: install a torch that fits its driver, or give device=cpu")


def unseen_gpu() -> str:
    """Explain why torch does not see this machine's GPU.

    The explanation is empty if there is no GPU, or if CUDA_VISIBLE_DEVICES hides it."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    sign = str(DRIVER) if DRIVER.exists() else shutil.which("nvidia-smi")
    if not sign:
        return ""
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built for the CPU alone"
    else:
        try:
            torch.cuda.init()
            why = "it finds none"
        except (RuntimeError, AssertionError) as error:
            why = str(error).strip().splitlines()[0][:150]
    return f"this machine has a GPU ({sign}) that torch does not see ({why})"


def check_device(name: str) -> None:
    """Raise ErasebenchError for a device that this machine does not have."""
    kind, _, number = str(name).partition(":")
    if kind not in ("cpu", "cuda", "mps") or (
        ":" in str(name) and name != "cpu:0" and not (kind == "cuda" and number.isdecimal())
    ):
        raise ErasebenchError(f"device={name}: choose cpu, cuda, cuda:<number> or mps")
    if kind == "cpu":
        return
    if not (torch.cuda if kind == "cuda" else torch.backends.mps).is_available():
        raise ErasebenchError(f"device={name}: no GPU here" + (" of Apple's" if kind == "mps" else ""))
    if number and int(number) >= (count := torch.cuda.device_count()):
        raise ErasebenchError(f"device={name}: {count} GPU{'s' * (count > 1)} here, the last is cuda:{count - 1}")
    try:
        torch.zeros(1, device=name)
    except RuntimeError as error:  # the driver is too old, or another process holds the GPU exclusively
        raise ErasebenchError(
            f"device={name}: the GPU cannot be used ({str(error).strip().splitlines()[0]})"
        ) from error
