"""The level clip of activations: what a rule calls it, and the search for that of 4-bit ones.

Most values of a token lie far from both ends of its range. With `(L, l)` the range has `L` steps, of which the 16 codes cover
those from `l` to `l + 15`: a finer step for all, paid for by the few values beyond. A negative `l` makes activations symmetric.
The equations are in `pallas_kernels.reference`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32
from pydantic import BeforeValidator

from quikjax.pallas_kernels.reference import checked_level_clip, quantize_activations, symmetric_clip

# From no clip to a quarter of the range.
LEVEL_CLIPS = ((15, 0), (16, 0), (16, 1), (17, 1), (19, 2))

# How a rule names one without a search.
Fixed = Literal["symmetric"] | tuple[int, int] | None


def names_of_level_clips(*words: str) -> BeforeValidator:
    """Check that a rule's `level_clip` is one of `words`, two whole numbers, or nothing: a mistake is said in one sentence."""

    def checked(asked: Any) -> Any:
        pair = isinstance(asked, list | tuple) and len(asked) == 2 and all(type(number) is int for number in asked)
        if asked is None or pair or (isinstance(asked, str) and asked in words):
            return asked
        known = ", ".join(f'"{word}"' for word in words)
        raise ValueError(f"a level clip is {known} or two whole numbers such as [17, 1], not {asked!r}")

    return BeforeValidator(checked)


def fixed_level_clip(asked: Fixed, bits: int) -> tuple[int, int] | None:
    """The level clip that a rule for activations of `bits` names, as packed weights record it.

    >>> fixed_level_clip("symmetric", 4), fixed_level_clip((17, 1), 4), fixed_level_clip(None, 8)
    ((16, -8), (17, 1), None)

    Raises:
        ValueError: activations of so many bits cannot have it.
    """
    if asked is None:
        return None
    if bits == 16:
        raise ValueError("level_clip is of quantized activations; these have 16 bits")
    clip = symmetric_clip(bits) if asked == "symmetric" else asked
    checked_level_clip(bits, clip)
    return clip


def search_level_clip(
    x: Float32[Array, "rows base"], real: Bool[Array, " rows"], matrices: Sequence[Float32[Array, "_ base"]]
) -> tuple[int, int] | None:
    """Find the pair of `LEVEL_CLIPS` with the least `sum ||W (x_hat - x)||^2` over sampled tokens and the layers that read them.

    `x` are base columns, `real` marks the rows that count. `None` is `(15, 0)`: no clip.
    """
    if x.shape[1] == 0:
        return None
    errors = jnp.stack([_error(x, real, tuple(matrices), clip) for clip in LEVEL_CLIPS])
    best = LEVEL_CLIPS[int(jnp.argmin(errors))]
    return None if best == (15, 0) else best


@partial(jax.jit, static_argnames="clip")
def _error(
    x: Float32[Array, "rows base"], real: Bool[Array, " rows"], matrices: tuple[Array, ...], clip: tuple[int, int]
) -> Float32[Array, ""]:
    codes, scale, zero = quantize_activations(x, 4, clip)
    gap = (codes.astype(jnp.float32) + 8) * scale[:, None] + zero[:, None] - x
    gap = jnp.where(real[:, None], gap, 0.0)
    products = [jnp.matmul(gap, W.T, precision=jax.lax.Precision.HIGHEST) for W in matrices]
    return jnp.sum(jnp.stack([jnp.sum(product**2) for product in products]))
