"""Embeddings of texts: the last hidden states pooled to one vector, as sentence-transformers does.

With tokens `t` of a text (padding left out) and their last hidden states `h_t`:

    mean     e = sum_t h_t / count            Sentence-BERT (arXiv 1908.10084, section 3), and all-MiniLM-L6-v2
    first    e = h_0                          the first token's, [CLS] or <s>
    max      e_k = max_t h_tk

and, normalized, `e / max(||e||, 1e-12)`, so that a dot product of two embeddings is their cosine.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from quikjax.encoding.text_encoder import Head, TextEncoder, Work
from quikjax.errors import QuikError, did_you_mean
from quikjax.models.encoder import Encoder, first_token

POOLINGS = ("mean", "first", "max")


class Embeddings(NamedTuple):
    """One vector for each text, in their order, and what it took."""

    vectors: Float32[np.ndarray, "texts hidden"]
    work: Work


def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    pooling: str = "mean",
    normalize: bool = True,
    length: int | None = None,
    batch_size: int = 32,
) -> Embeddings:
    """Embed texts with an encoder: `[texts, hidden]`, float32.

    Programs are compiled for every call; who embeds more than once keeps a `TextEncoder` and calls `embed_with`.

    Args:
        model: an encoder, dense or with packed weights, with or without a head, which is not used.
        tokenizer: its tokenizer.
        texts: texts, or pairs of two.
        pooling: "mean" over the tokens, the "first" token, or "max" of each dimension.
        normalize: divide each vector by its length.
        length, batch_size: see `TextEncoder`.

    Raises:
        QuikError: as `TextEncoder`; there is no such pooling.
    """
    return embed_with(
        TextEncoder(model, tokenizer, length=length, batch_size=batch_size), texts, pooling=pooling, normalize=normalize
    )


def embed_with(encoder: TextEncoder, texts: Sequence[Any], *, pooling: str = "mean", normalize: bool = True) -> Embeddings:
    """`embed` with an encoder that keeps its programs.

    Raises:
        QuikError: there is no such pooling, the model is no encoder alone, or `texts` is no list of texts.
    """
    if not isinstance(encoder.model, Encoder):
        raise QuikError(f"{type(encoder.model).__name__} classifies texts and does not embed them; use it with: quikjax classify")
    if pooling not in POOLINGS:
        raise QuikError(f'there is no pooling "{pooling}"; {did_you_mean(str(pooling), POOLINGS)}')
    vectors, work = encoder.run(texts, embedding_head(pooling, normalize))
    return Embeddings(vectors, work)


@functools.cache
def embedding_head(pooling: str, normalize: bool) -> Head:
    """One function for each choice, so that its programs are found again."""

    def head(
        _model: Encoder, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float32[Array, "batch hidden"]:
        return pool(hidden, positions, pooling, normalize)

    return head


def pool(
    hidden: Float[Array, "batch length hidden"],
    positions: Int32[Array, "batch length"],
    pooling: str = "mean",
    normalize: bool = True,
) -> Float32[Array, "batch hidden"]:
    """One float32 vector for each row. Tokens at a negative position are padding and count for nothing."""
    hidden = hidden.astype(jnp.float32)
    there = (positions >= 0)[:, :, None]
    if pooling == "mean":
        vectors = jnp.sum(jnp.where(there, hidden, 0), axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)
    elif pooling == "max":
        vectors = jnp.max(jnp.where(there, hidden, -jnp.inf), axis=1)
    else:
        vectors = first_token(hidden, positions)
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
