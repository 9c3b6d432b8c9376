"""One linear layer for every kind of weight, dispatched on the leaf's type."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quikjax.pallas_kernels import reference
from quikjax.weight import QuikWeight, Weight


def linear(x: Float[Array, "..."], weight: Weight, bias: Float[Array, "..."] | None = None) -> Float[Array, "..."]:
    """`y = x W^T + bias`, in the dtype of `x`.

    A dense `weight` is `[N, K]` (outputs, inputs) and multiplies in its promoted dtype with float32 accumulation. A
    `QuikWeight` may stand for a kernel with several axes: `x` ends in its `in_shape`, the result in its `out_shape`.
    """
    return linears(x, [weight], [bias])[0]


def linears(
    x: Float[Array, "..."], weights: Sequence[Weight], biases: Sequence[Float[Array, "..."] | None]
) -> list[Float[Array, "..."]]:
    """Several layers that read the same `x`: those of one `group` share one split and one quantized activation."""
    splits: dict[tuple[str, int, int], reference.Split] = {}
    results = []
    for weight, bias in zip(weights, biases, strict=True):
        if isinstance(weight, QuikWeight):
            results.append(_quik(x, weight, bias, splits))
        else:
            results.append(_dense(x, weight, bias))
    return results


def _dense(x: Float[Array, "..."], weight: Array, bias: Float[Array, "..."] | None) -> Float[Array, "..."]:
    y = jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def _quik(
    x: Float[Array, "..."],
    weight: QuikWeight,
    bias: Float[Array, "..."] | None,
    splits: dict[tuple[str, int, int], reference.Split],
) -> Float[Array, "..."]:
    batch = x.shape[: x.ndim - len(weight.in_axes)]
    if x.shape[len(batch) :] != weight.in_shape:
        raise ValueError(f"x ends in {x.shape[len(batch) :]}, the weight reads {weight.in_shape}")
    rows = x.reshape(*batch, weight.inputs)
    flat_bias = None if bias is None else bias.reshape(-1)
    if weight.activation_bits == 16:
        y = reference.weight_only_matmul(rows, weight.columns, weight.qweight, weight.scale, weight.outliers, flat_bias)
    else:
        key = (weight.group, weight.base, weight.activation_bits) if weight.group is not None else None
        split = splits.get(key) if key is not None else None
        if split is None:
            split = reference.split_quantize(rows, weight.columns, weight.base, weight.activation_bits)
            if key is not None:
                splits[key] = split
        y = reference.quik_matmul(
            split, weight.qweight, weight.scale, weight.reduced, weight.outliers, flat_bias, weight.activation_bits
        )
    return y.astype(x.dtype).reshape(*batch, *weight.out_shape)
