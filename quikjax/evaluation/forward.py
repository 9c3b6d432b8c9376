"""A model over windows of tokens, one compiled function per kind of block, and its logits a few tokens at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from quikjax.errors import QuikError
from quikjax.models.base import Block, CausalLM, Positions, Transformer, default_positions
from quikjax.models.encoder import Encoder
from quikjax.models.registry import pure_params
from quikjax.models.tokens import checked_tokens
from quikjax.weights.tiled import put_on_device

# Logits are made for this many tokens at a time: a vocabulary of 50 000 makes 100 MB of them.
CHUNK = 512


def checked_windows(model: Transformer, ids: Any) -> Int32[np.ndarray, "count length"]:
    """Windows of tokens as an array, compared with what a model can read.

    Raises:
        QuikError: they are no rows of whole numbers, shorter than two tokens or longer than the model's context, or a token is
            outside its vocabulary.
    """
    checked = checked_tokens(ids, model.config, "a set of windows")
    if checked.shape[1] < 2:
        raise QuikError("a window needs at least 2 tokens to predict one, not 1")
    return checked


def on_device(model: CausalLM) -> CausalLM:
    """The model with its weights in the form that this device's kernels read."""
    params = pure_params(model)
    placed = put_on_device(params)
    return model if placed is params else nnx.merge(nnx.split(model)[0], placed)


def hidden_states(model: Transformer, ids: Int[np.ndarray, "batch length"]) -> Float[Array, "batch length hidden"]:
    """The hidden states that leave the last block. Blocks share one compilation, where the whole model would take a minute."""
    tokens = jnp.asarray(ids)
    hidden = model.embed(tokens, default_positions(tokens))
    for block in model.blocks.values():
        blockdef, params = nnx.split(block)
        hidden = _through_block(blockdef, nnx.to_pure_dict(params), hidden)
    return jax.block_until_ready(hidden)


def token_logits(model: Transformer, hidden: Float[Array, "tokens hidden"]) -> Float32[Array, "tokens vocab"]:
    """Logits over the vocabulary from hidden states that left the last block, each token by itself: of its successor, or, of a
    masked language model, of the token that stands there. Under `jit`.
    """
    if isinstance(model, Encoder):
        found: Array = model.head(hidden[None], jnp.zeros((1, len(hidden)), jnp.int32))[0]
        return found
    assert isinstance(model, CausalLM)
    return model.head(hidden[None])[0]


@partial(jax.jit, static_argnums=0)
def _through_block(
    blockdef: nnx.GraphDef[Block], params: Mapping[str, Any], hidden: Float[Array, "batch length hidden"]
) -> Float[Array, "batch length hidden"]:
    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
    return nnx.merge(blockdef, params)(hidden, Positions(positions))[0]


def by_chunks(each: Callable[..., Any], *arrays: Array) -> Any:
    """Apply `each` to `CHUNK` leading entries of all arrays at a time, and join what it returns, under `jit`."""
    length = arrays[0].shape[0]
    size = min(CHUNK, length)
    cut = [
        jnp.pad(array, ((0, -length % size), *((0, 0) for _ in array.shape[1:]))).reshape(-1, size, *array.shape[1:])
        for array in arrays
    ]
    parts = jax.lax.map(lambda chunk: each(*chunk), tuple(cut))
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[:length], parts)
