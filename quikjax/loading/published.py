"""A published checkpoint of any format as a model with its parameters."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from quikjax.loading.formats import open_found
from quikjax.loading.locate import Found, resolve
from quikjax.loading.params import load_params, match
from quikjax.models.base import Transformer
from quikjax.models.dtypes import floating_dtype
from quikjax.models.registry import abstract_model


def load_published(
    model: str | Path | Found, *, dtype: Any = jnp.float32, context: int | None = None, plain_tokenizer: bool = False
) -> tuple[Transformer, Any | None]:
    """A published model with its parameters, and its tokenizer, or None where the checkpoint has none.

    On top of the parameters two tensors are held at a time. `quikjax.load` takes artifacts as well.

    Args:
        model: whatever `open_source` takes, or what `resolve` found.
        dtype: floating dtype of the parameters.
        context: longest text, in place of what the checkpoint declares.
        plain_tokenizer: see `quikjax.load`.

    Raises:
        QuikError: whatever is wrong with the checkpoint, in one sentence; everything that headers can tell is found before
            any tensor is read.
    """
    dtype = floating_dtype(dtype)
    source = open_found(model if isinstance(model, Found) else resolve(model))
    abstract = abstract_model(source.config, dtype, context=context)
    match(source, abstract)
    tokenizer = source.tokenizer(plain=plain_tokenizer)
    abstract.stops = source.stops(tokenizer)
    return nnx.merge(nnx.graphdef(abstract), load_params(source, abstract, dtype=dtype)), tokenizer
