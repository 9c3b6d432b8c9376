"""A model by whatever names it: a published checkpoint, or an artifact."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from quikjax.checkpoint import restore
from quikjax.loading import load_published, resolve
from quikjax.loading.formats import ARTIFACT_FILE
from quikjax.models.base import Transformer
from quikjax.models.dtypes import floating_dtype


def load(
    model: str | Path, *, dtype: Any = jnp.float32, context: int | None = None, plain_tokenizer: bool = False
) -> tuple[Transformer, Any | None]:
    """A model with its parameters, and its tokenizer, or None where the checkpoint has none.

    Args:
        model: whatever `open_source` takes, or an artifact that `quikjax.checkpoint` wrote: its directory, or a hub name.
        dtype: floating dtype of the parameters, "float32", "bfloat16" or "float16"; an artifact keeps its own.
        context: longest text in tokens, in place of what the model declares. Positions beyond the declared ones are computed as
            they are within, for better or worse; learned ones (OPT) have an end.
        plain_tokenizer: give a tokenizer that only encodes a text and decodes tokens (`loading.plain_tokenizer`) where it does so
            exactly as the whole one, of `transformers`, whose import takes a second.

    Raises:
        QuikError: whatever is wrong with the checkpoint, in one sentence; everything that headers can tell is found before
            any tensor is read.
    """
    dtype = floating_dtype(dtype)
    found = resolve(model)
    if (found.path / ARTIFACT_FILE).is_file():
        return restore(found.path, context=context, plain_tokenizer=plain_tokenizer)
    return load_published(found, dtype=dtype, context=context, plain_tokenizer=plain_tokenizer)
