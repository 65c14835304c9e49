"""Benchmark of concept erasure in text-to-image diffusion models.

Does a model forget, what does it break, and can the concept be brought back?
"""

import sys
from pathlib import Path

from .renames import Renames

_checkout = Path(__file__).resolve().parent.parent
# In a checkout or an editable install, methods/, evaluators/, conf/ and results/ lie beside this package;
# in a wheel they are inside it. The pyproject test keeps an unrelated `methods/` from being picked up.
if (_checkout / "pyproject.toml").is_file() and (_checkout / "methods").is_dir():
    __path__.append(str(_checkout))
sys.meta_path.append(Renames())
if sys.argv[:1] == ["-m"]:  # the value of sys.argv while `python -m erasebench...` is being imported
    from .interrupt import guard_imports

    guard_imports()
