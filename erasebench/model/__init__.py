"""The diffusion model: folders and hub, openings for methods and attacks, sampling, memory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model

__all__ = ["Model"]


def __getattr__(name: str) -> Any:
    if name == "Model":  # imported when it is asked for, since torch and diffusers come with it
        from .model import Model

        return Model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
