"""From a matrix and a group rule to a packed weight."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float32

from quikjax.algorithms import codebooks
from quikjax.algorithms.gptq_groups import gptq_groups, gptq_static_groups
from quikjax.algorithms.groups import Grouped, rtn_groups, spread
from quikjax.algorithms.numerics import all_finite, take_columns
from quikjax.errors import QuikError
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.level_clip import fixed_level_clip
from quikjax.quantizing.shared_inputs import Factor
from quikjax.weights.groups import GroupWeight


def abstract_groups(rule: GroupRule, shape: tuple[int, ...], in_axes: tuple[int, ...], group: str | None = None) -> GroupWeight:
    """The packed weight of a rule without its arrays: its `bits` and `layout` count what it stores."""
    return GroupWeight(
        codes=None,
        scale=None,
        zero=None,
        columns=None,
        bits_per_code=rule.bits,
        activation_bits=rule.activation_bits,
        group_size=rule.group_size,
        symmetric=rule.symmetric,
        permuted=rule.order == "hessian" and not rule.static_groups,
        shape=tuple(shape),
        in_axes=in_axes,
        group=group,
        level_clip=fixed_level_clip(rule.level_clip, rule.activation_bits),
    )


def quantize_groups(
    path: str, W: Float32[Array, "n k"], rule: GroupRule, empty: GroupWeight, factor: Factor | None = None
) -> GroupWeight:
    """Quantize a matrix into the fields of `empty`: by GPTQ with its input's `factor`, else to the nearest.

    Raises:
        QuikError: naming `path`, whose weights are beyond what scales are stored in.
    """
    size = {"bits": rule.bits, "symmetric": rule.symmetric}
    if factor is not None and not rule.static_groups:
        ordered = take_columns(W, factor.rounded)
        found = gptq_groups(ordered, factor.U, factor.dead, group=rule.group_size, scale_dtype="float16", **size)
    else:
        found = rtn_groups(W, group=rule.group_size, scale_dtype="float16", **size)
        if factor is not None:
            order, k = factor.rounded, W.shape[1]
            scale, zero = (take_columns(spread(part, rule.group_size, k), order) for part in (found.scale, found.zero))
            codes = gptq_static_groups(
                take_columns(W, order), factor.U, factor.dead, scale, zero, block=rule.column_block, **size
            )
            found = Grouped(take_columns(codes, factor.restore), found.scale, found.zero)
    if not all_finite(found.scale):
        raise QuikError(f"a group of {path} overflows a scale in float16; its weights are not those of a trained model")
    codes = found.codes + (2 ** (rule.bits - 1) if rule.symmetric else 0)
    return dataclasses.replace(
        empty,
        codes=codebooks.pack(codes.astype(jnp.uint8).reshape(-1), rule.bits),
        scale=found.scale.astype(jnp.float16),
        zero=jnp.zeros((W.shape[0], 0), jnp.uint8) if rule.symmetric else found.zero.astype(jnp.uint8),
        columns=factor.rounded if empty.permuted and factor is not None else jnp.zeros(0, jnp.int32),
    )
