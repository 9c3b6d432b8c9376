"""From a matrix and a codebook rule to a packed weight."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from quikjax.algorithms import codebooks
from quikjax.algorithms.gptq import gptq_codebook
from quikjax.algorithms.numerics import all_finite, take_columns
from quikjax.errors import QuikError
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.weights.codebook import CodebookWeight


@dataclasses.dataclass(frozen=True)
class Order:
    """GPTQ's view of the tensor a layer reads, all in the order in which it rounds: `rounded` int32 `[K]` names the columns,
    outliers last; `restore` int32 `[B]` puts the base columns back as they are stored; `U` and `dead` as for `algorithms.gptq`.
    """

    rounded: Any
    restore: Any
    U: Any
    dead: Any


def abstract_codebook(
    rule: CodebookRule, shape: tuple[int, ...], in_axes: tuple[int, ...], base: int, group: str | None = None
) -> CodebookWeight:
    """The packed weight of a rule without its arrays: its `bits` and `layout` count what it stores."""
    weight = CodebookWeight(
        codes=None,
        absmax=None,
        absmax_scale=None,
        absmax_mean=None,
        codebook=None,
        mean=None,
        outliers=None,
        columns=None,
        data_type=rule.data_type,
        bits_per_code=rule.bits,
        exponent_bits=_exponent_bits(rule),
        block=1 if rule.block == "tensor" else rule.block,
        absmax_format=rule.absmax,
        centered=rule.centered,
        shape=tuple(shape),
        in_axes=in_axes,
        base=base,
        group=group,
    )
    return dataclasses.replace(weight, block=max(weight.coded, 1)) if rule.block == "tensor" else weight


def quantize_matrix(
    path: str,
    W: Float32[Array, "n k"],
    rule: CodebookRule,
    columns: Int32[Array, " k"],
    empty: CodebookWeight,
    order: Order | None = None,
) -> CodebookWeight:
    """Write the first `empty.base` of `columns` with the rule's codebook, the others in 16 bits, into the fields of `empty`.

    `columns` are all of the matrix, base ones ascending, then outliers ascending.

    With `order`, GPTQ rounds, and the outliers absorb error; without, each weight takes the nearest value.

    Raises:
        QuikError: naming `path`, whose weights are beyond what absmax or outliers are stored in.
    """
    base, outliers = empty.base, take_columns(W, columns[empty.base :])
    stored = take_columns(W, columns[:base]) if base < W.shape[1] else W
    mean = jnp.mean(stored, keepdims=True).reshape(1) if rule.centered and stored.size else jnp.zeros(1, jnp.float32)
    flat = (stored - mean).reshape(-1)
    table, codebook = table_of(rule, flat)
    kept, absmax = _absmax(codebooks.block_absmax(flat, empty.block), rule)
    if not all_finite(absmax):
        raise QuikError(f'a block of {path} overflows an absmax in {rule.absmax}; set absmax to "float32"')
    if order is None:
        codes = codebooks.encode(flat, absmax, table, block=empty.block)
    else:
        spread = codebooks.spread(absmax, flat.shape[0], empty.block).reshape(stored.shape)
        centered = W.at[:, columns[:base]].add(-mean) if rule.centered else W
        rounding = jnp.argsort(order.restore)
        found, outliers = gptq_codebook(
            take_columns(centered, order.rounded),
            order.U,
            order.dead,
            take_columns(spread, rounding),
            table,
            base=base,
            block=rule.column_block,
        )
        codes = take_columns(found, order.restore).reshape(-1)
    exact = outliers.astype(rule.outlier_dtype)
    if not all_finite(exact):
        raise QuikError(f'an outlier weight of {path} overflows {rule.outlier_dtype}; set outlier_dtype to "bfloat16"')
    nothing = jnp.zeros(0, jnp.float32)
    return dataclasses.replace(
        empty,
        codes=codebooks.pack(codes, rule.bits),
        absmax=kept[0],
        absmax_scale=kept[1],
        absmax_mean=kept[2],
        codebook=codebook,
        mean=mean if rule.centered else nothing,
        outliers=exact,
        columns=columns[base:],
    )


def _exponent_bits(rule: CodebookRule) -> int:
    if rule.data_type != "float":
        return 0
    return rule.exponent_bits or codebooks.default_exponent_bits(rule.bits)


def table_of(rule: CodebookRule, flat: Float32[Array, "..."]) -> tuple[Float32[Array, " entries"], Array]:
    """The codebook of a rule, and what of it is stored. Only that of "quantile" depends on the weights, `flat`."""
    if rule.data_type != "quantile":
        table = codebooks.codebook(rule.data_type, rule.bits, rule.exponent_bits)
        return jnp.asarray(table), jnp.zeros(0, jnp.float16)
    found = codebooks.quantile(np.asarray(flat), rule.bits)
    stored = np.pad(found, (0, 2**rule.bits - len(found)), mode="edge").astype(np.float16)
    return jnp.asarray(stored, jnp.float32), jnp.asarray(stored)


def _absmax(absmax: Float32[Array, " blocks"], rule: CodebookRule) -> tuple[tuple[Array, Array, Array], Array]:
    """Absmax as stored (with its scale and mean, where it has any), and as it is read back: what codes are found with."""
    nothing = jnp.zeros(0, jnp.float32)
    if rule.absmax == "double":
        kept = codebooks.double_quantize(absmax)
        return kept, codebooks.undo_double(*kept)
    rounded = absmax.astype(rule.absmax)
    return (rounded, nothing, nothing), rounded.astype(jnp.float32)
