"""A model by whatever names it: a published checkpoint, or an artifact."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from quikjax.checkpoint import restore
from quikjax.loading import load_published, resolve
from quikjax.loading.formats import ARTIFACT_FILE
from quikjax.models.base import CausalLM


def load(model: str | Path, *, dtype: Any = jnp.float32) -> tuple[CausalLM, Any | None]:
    """A model with its parameters, and its tokenizer, or None where the checkpoint has none.

    Args:
        model: whatever `open_source` takes, or the directory of an artifact that `quikjax.checkpoint` wrote.
        dtype: floating dtype of the parameters; an artifact keeps its own.

    Raises:
        QuikError: whatever is wrong with the checkpoint, in one sentence; everything that headers can tell is found before
            any tensor is read.
    """
    found = resolve(model)
    if (found.path / ARTIFACT_FILE).is_file():
        return restore(found.path)
    return load_published(found, dtype=dtype)
