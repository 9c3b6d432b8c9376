"""quikjax: published language models in QUIK 4-bit format, in JAX.

    model, tokenizer = quikjax.load("smollm2-135m")
    graphdef = nnx.split(model)[0]
    params = quikjax.quantize_model(model, "quik-4b", batches)
    out = quikjax.generate(graphdef, params, ids, max_new_tokens=64)

The command line (`quikjax --help`) does the same from and to disk. Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quikjax.checkpoint import restore, restore_params, save
    from quikjax.conversion import convert
    from quikjax.errors import QuikError
    from quikjax.evaluation import evaluate, reference, windows
    from quikjax.generation import generate
    from quikjax.loading import load
    from quikjax.pipeline import calibrate, quantize_model
    from quikjax.quantization import quantize_block, quantize_params
    from quikjax.recipe import RECIPES, Recipe, Rule
    from quikjax.weight import QuikWeight, dequantize, dequantize_params

_HOME = {
    "QuikError": "errors",
    "QuikWeight": "weight",
    "RECIPES": "recipe",
    "Recipe": "recipe",
    "Rule": "recipe",
    "calibrate": "pipeline",
    "convert": "conversion",
    "dequantize": "weight",
    "dequantize_params": "weight",
    "evaluate": "evaluation",
    "generate": "generation",
    "load": "loading",
    "quantize_block": "quantization",
    "quantize_model": "pipeline",
    "quantize_params": "quantization",
    "reference": "evaluation",
    "restore": "checkpoint",
    "restore_params": "checkpoint",
    "save": "checkpoint",
    "windows": "evaluation",
}

__all__ = [
    "RECIPES",
    "QuikError",
    "QuikWeight",
    "Recipe",
    "Rule",
    "calibrate",
    "convert",
    "dequantize",
    "dequantize_params",
    "evaluate",
    "generate",
    "load",
    "quantize_block",
    "quantize_model",
    "quantize_params",
    "reference",
    "restore",
    "restore_params",
    "save",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quikjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quikjax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
