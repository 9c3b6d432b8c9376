"""Generation under `jit`: prompts of any lengths, greedy or drawn, streamed; programs compiled once per bucket.

Names are imported when they are first used: settings are checked without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quikjax.generation.generator import Generation, Generator, generate
    from quikjax.generation.settings import Sampling

_HOME = {"Generation": "generator", "Generator": "generator", "Sampling": "settings", "generate": "generator"}

__all__ = ["Generation", "Generator", "Sampling", "generate"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
