"""How far a model's predictions are from the original's, token by token, and the figures llama.cpp prints of them."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64, Int32

from quikjax.evaluation.forward import by_chunks, token_logits
from quikjax.models.base import Transformer

PERCENTILES = (90.0, 95.0, 99.0, 99.9)


class TokenDistances(NamedTuple):
    """Per predicted token: `KL(original || this)` in nats, 1 where both find the same successor most likely, the cross-entropy
    under the original, and the right token's probability under each."""

    kl: Any
    same: Any
    original_loss: Any
    right: Any
    original_right: Any


@partial(jax.jit, static_argnums=(0, 3))
def token_distances(
    graphdef: nnx.GraphDef[Transformer],
    params: Mapping[str, Any],
    hidden: Float[Array, "tokens hidden"],
    other_graphdef: nnx.GraphDef[Transformer],
    other_params: Mapping[str, Any],
    other_hidden: Float[Array, "tokens other"],
    targets: Int32[Array, " tokens"],
) -> TokenDistances:
    """Hold the tokens that a model and the original predict against each other and against the right ones.

    Both sets of logits exist for a chunk of tokens at a time only.
    """
    model, other = nnx.merge(graphdef, params), nnx.merge(other_graphdef, other_params)

    def chunk(hidden: Array, other_hidden: Array, targets: Array) -> TokenDistances:
        mine = jax.nn.log_softmax(token_logits(model, hidden))
        theirs = jax.nn.log_softmax(token_logits(other, other_hidden))
        right = jnp.take_along_axis(mine, targets[:, None], axis=1)[:, 0]
        original = jnp.take_along_axis(theirs, targets[:, None], axis=1)[:, 0]
        return TokenDistances(
            kl=jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=1),
            same=(jnp.argmax(mine, axis=1) == jnp.argmax(theirs, axis=1)).astype(jnp.float32),
            original_loss=-original,
            right=jnp.exp(right),
            original_right=jnp.exp(original),
        )

    found: TokenDistances = by_chunks(chunk, hidden, other_hidden, targets)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """A model's predictions against the original's on the same tokens; every `_stderr` is over tokens.

    `kl` is the mean of `KL(original || this)` per token in nats, with median, percentiles (`{"90": ...}`) and maximum.
    `ln_ppl_ratio` is `ln(perplexity / original_perplexity)`, its error that of paired differences. `top1_agreement` is the share
    of tokens to which both give the same most likely successor. `right_change` is the mean change of the right token's
    probability, `right_rms` its root mean square.
    """

    original_perplexity: float
    kl: float
    kl_stderr: float
    kl_median: float
    kl_percentiles: Mapping[str, float]
    kl_max: float
    ln_ppl_ratio: float
    ln_ppl_ratio_stderr: float
    top1_agreement: float
    top1_stderr: float
    right_change: float
    right_change_stderr: float
    right_rms: float


def summarize(loss: Float64[np.ndarray, " tokens"], found: TokenDistances) -> Distance:
    """The figures of a whole text, from per-token values in float64. `loss` is the model's own cross-entropy."""
    # A sum of rounded terms may fall a little below the zero that bounds it.
    kl = np.maximum(found.kl, 0.0)
    change = found.right - found.original_right
    gap = loss - found.original_loss
    agreement = float(np.mean(found.same))
    return Distance(
        original_perplexity=exponential(float(np.mean(found.original_loss))),
        kl=float(np.mean(kl)),
        kl_stderr=standard_error(kl),
        kl_median=float(np.median(kl)),
        kl_percentiles={f"{share:g}": float(np.percentile(kl, share)) for share in PERCENTILES},
        kl_max=float(np.max(kl)),
        ln_ppl_ratio=float(np.mean(gap)),
        ln_ppl_ratio_stderr=standard_error(gap),
        top1_agreement=agreement,
        top1_stderr=math.sqrt(agreement * (1 - agreement) / max(1, kl.size - 1)),
        right_change=float(np.mean(change)),
        right_change_stderr=standard_error(change),
        right_rms=float(np.sqrt(np.mean(change**2))),
    )


def exponential(loss: float) -> float:
    """`exp(loss)`, infinite beyond all numbers."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def standard_error(values: Float[np.ndarray, " count"]) -> float:
    """The standard error of a mean; NaN for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def ln_ratio_by_kl(distance: Distance) -> float | None:
    """`ln(perplexity ratio) / KL`; `None` where the KL is zero.

    It is near 1 for a model that is noisier than the original; below 0.9, the model has adapted to the text, and its perplexity
    is no measure of it.
    """
    return distance.ln_ppl_ratio / distance.kl if distance.kl else None
