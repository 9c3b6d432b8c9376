"""Floor 4: published checkpoints of any format, opened lazily and turned into models."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from quikjax.errors import QuikError
from quikjax.loading.gguf_source import GGUFSource
from quikjax.loading.params import load_params, match
from quikjax.loading.resolve import DEMO_MODELS, find_demo_model
from quikjax.loading.source import Source, TensorInfo
from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model

__all__ = ["Source", "TensorInfo", "load", "load_params", "match", "open_source"]


def open_source(model: str | Path) -> Source:
    """Open a published checkpoint: configuration and headers are read and checked, no tensor is.

    Raises:
        QuikError: no such model, or its files are damaged.
    """
    path = find_demo_model(model) if isinstance(model, str) and model in DEMO_MODELS else Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return GGUFSource(path)
    raise QuikError(f"{path} is not a model")


def load(model: str | Path, *, dtype: Any = jnp.float32) -> tuple[CausalLM, Any | None]:
    """A model with its parameters, and its tokenizer, or None where the checkpoint has none.

    Args:
        model: "smollm2-135m", a directory, or a `.gguf` file.
        dtype: floating dtype of the parameters.

    Raises:
        QuikError: whatever is wrong with the checkpoint, in one sentence.
    """
    source = open_source(model)
    tokenizer = source.tokenizer()
    abstract = abstract_model(source.config, dtype)
    return nnx.merge(nnx.graphdef(abstract), load_params(source, abstract, dtype=dtype)), tokenizer
