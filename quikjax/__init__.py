"""quikjax: published language models in QUIK 4-bit format, in JAX.

    model, tokenizer = quikjax.load("smollm2-135m")
    graphdef = nnx.split(model)[0]
    params = quikjax.quantize_model(model, "quik-4b", batches)
    out = quikjax.generate(graphdef, params, ids, max_new_tokens=64)

The command line (`quikjax --help`) does the same from and to disk. Names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from quikjax.version import __version__

if TYPE_CHECKING:
    from quikjax.checkpoint import restore, restore_params, save
    from quikjax.checkpoint.load import load
    from quikjax.encoding import Classification, Embeddings, TextEncoder, classify, embed
    from quikjax.errors import QuikError
    from quikjax.evaluation import evaluate, reference, windows
    from quikjax.generation import Beams, Generation, Generator, Sampling, TextToText, generate
    from quikjax.quantizing.checkpoint import quantize_checkpoint
    from quikjax.quantizing.codebook_rule import CodebookRule
    from quikjax.quantizing.model import calibrate, quantize_model
    from quikjax.quantizing.params import quantize_block, quantize_params
    from quikjax.quantizing.recipe import RECIPES, Recipe, Rule
    from quikjax.training.recover import recover
    from quikjax.training.settings import RecoverySettings
    from quikjax.training.train import train
    from quikjax.training.train_settings import TrainSettings
    from quikjax.weights.codebook import CodebookWeight
    from quikjax.weights.formats import dequantize, dequantize_params
    from quikjax.weights.quik import QuikWeight

_HOME = {
    "Classification": "encoding",
    "CodebookRule": "quantizing.codebook_rule",
    "CodebookWeight": "weights.codebook",
    "Embeddings": "encoding",
    "QuikError": "errors",
    "QuikWeight": "weights.quik",
    "RECIPES": "quantizing.recipe",
    "Recipe": "quantizing.recipe",
    "RecoverySettings": "training.settings",
    "Rule": "quantizing.recipe",
    "TextEncoder": "encoding",
    "TextToText": "generation",
    "TrainSettings": "training.train_settings",
    "calibrate": "quantizing.model",
    "classify": "encoding",
    "embed": "encoding",
    "quantize_checkpoint": "quantizing.checkpoint",
    "dequantize": "weights.formats",
    "dequantize_params": "weights.formats",
    "evaluate": "evaluation",
    "Beams": "generation",
    "Generation": "generation",
    "Generator": "generation",
    "Sampling": "generation",
    "generate": "generation",
    "load": "checkpoint.load",
    "quantize_block": "quantizing.params",
    "quantize_model": "quantizing.model",
    "quantize_params": "quantizing.params",
    "recover": "training.recover",
    "reference": "evaluation",
    "restore": "checkpoint",
    "restore_params": "checkpoint",
    "save": "checkpoint",
    "train": "training.train",
    "windows": "evaluation",
}

__all__ = [
    "RECIPES",
    "Beams",
    "Classification",
    "CodebookRule",
    "CodebookWeight",
    "Embeddings",
    "Generation",
    "Generator",
    "QuikError",
    "QuikWeight",
    "Recipe",
    "RecoverySettings",
    "Rule",
    "Sampling",
    "TextEncoder",
    "TextToText",
    "TrainSettings",
    "__version__",
    "calibrate",
    "classify",
    "dequantize",
    "dequantize_params",
    "embed",
    "evaluate",
    "generate",
    "load",
    "quantize_block",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_params",
    "recover",
    "reference",
    "restore",
    "restore_params",
    "save",
    "train",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quikjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quikjax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
