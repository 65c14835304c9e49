"""erasebench: does a text-to-image diffusion model forget, what does it break, can it be brought back."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_checkout = Path(__file__).resolve().parent.parent
# In a checkout or an editable install, methods/, evaluators/, conf/ and results/ lie beside this package;
# in a wheel they are inside it. The pyproject test keeps an unrelated `methods/` from being picked up.
if (_checkout / "pyproject.toml").is_file() and (_checkout / "methods").is_dir():
    __path__.append(str(_checkout))


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command that was stopped: in one line where that was on purpose."""
    if not issubclass(kind, KeyboardInterrupt | BrokenPipeError):
        sys.__excepthook__(kind, error, trace)
        return
    stopped = issubclass(kind, KeyboardInterrupt)  # else nobody reads what is printed, as after `| head`
    if stopped:
        print("\nerror: interrupted", file=sys.stderr, flush=True)
    os._exit(130 if stopped else 141)  # every finally has been carried out


if sys.argv[:1] == ["-m"]:  # python -m erasebench...: a command of ours, and not somebody's program that imports us
    sys.excepthook = _end
