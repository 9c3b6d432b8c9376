"""Floor 4: published checkpoints of any format, opened lazily and turned into models."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from quikjax.loading.formats import ARTIFACT_FILE, open_found, open_source
from quikjax.loading.params import load_params, match, verify
from quikjax.loading.resolve import DEMO_MODELS, resolve
from quikjax.loading.source import Source, TensorInfo
from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model

__all__ = ["DEMO_MODELS", "Source", "TensorInfo", "load", "load_params", "match", "open_source", "verify"]


def load(model: str | Path, *, dtype: Any = jnp.float32) -> tuple[CausalLM, Any | None]:
    """A model with its parameters, and its tokenizer, or None where the checkpoint has none.

    On top of the parameters one tensor is held at a time.

    Args:
        model: whatever `open_source` takes, or the directory of an artifact that `quikjax.checkpoint` wrote.
        dtype: floating dtype of the parameters; an artifact keeps its own.

    Raises:
        QuikError: whatever is wrong with the checkpoint, in one sentence; everything that headers can tell is found before
            any tensor is read.
    """
    found = resolve(model)
    if (found.path / ARTIFACT_FILE).is_file():
        from quikjax.checkpoint import restore

        return restore(found.path)
    source = open_found(found)
    abstract = abstract_model(source.config, dtype)
    match(source, abstract)
    tokenizer = source.tokenizer()
    return nnx.merge(nnx.graphdef(abstract), load_params(source, abstract, dtype=dtype)), tokenizer
