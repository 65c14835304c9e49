"""Diffusion model: sources, openings for methods and attacks, sampling, memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    if name == "Model":  # imported lazily, since it imports torch and diffusers
        from .model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
