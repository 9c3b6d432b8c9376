"""Generation under `jit`: prompts of any lengths, greedy or drawn, streamed; programs compiled once per bucket.

Names are imported when they are first used: settings are checked without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quikjax.generation.generator import Generator
    from quikjax.generation.request import generate, generator_of
    from quikjax.generation.rows import Generation
    from quikjax.generation.settings import Beams, Sampling
    from quikjax.generation.text_to_text import TextToText

_HOME = {
    "Beams": "settings",
    "Generation": "rows",
    "Generator": "generator",
    "Sampling": "settings",
    "TextToText": "text_to_text",
    "generate": "request",
    "generator_of": "request",
}

__all__ = ["Beams", "Generation", "Generator", "Sampling", "TextToText", "generate", "generator_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
