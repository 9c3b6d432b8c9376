"""Models as codebook weights stand for them, in memory and fast: what one cell of a scaling study reads.

Packing a weight and dequantizing it again gives `F[code] m_b` where `W` was. A study of a hundred cells needs those numbers and
how many bits the packed weight has, not the packed weight, so they are made in one pass over the matrix, by a program that is
compiled once per shape and block: the data type is an argument. Bit for bit what `dequantize(quantize_matrix(...))` gives.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from quikjax.algorithms import codebooks
from quikjax.errors import QuikError
from quikjax.models.base import CausalLM
from quikjax.quantizing import outliers as choosing
from quikjax.quantizing.codebook import abstract_codebook, table_of
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.quantizing.proxies import model_proxies
from quikjax.quantizing.recipe import Recipe

# Entries of the longest codebook.
_LONGEST = 2**codebooks.MAX_BITS


@dataclasses.dataclass(frozen=True)
class Written:
    """A model's dense parameters by dotted path with its quantized layers rewritten; the bits and the weights of those layers."""

    params: dict[str, Any]
    bits: int
    weights: int


class Writer:
    """Rewrites one model's layers, cell after cell; keeps what cells share: proxies, and the codebooks of single tensors."""

    def __init__(self, model: CausalLM, params: Mapping[str, Array]) -> None:
        """`model` may be abstract; `params` float32, by dotted path."""
        self._model = model
        self._params = params
        self._proxies: dict[str, Array] | None = None
        self._tables: dict[tuple[str, int, int], Float32[Array, " entries"]] = {}

    def __call__(self, recipe: Recipe) -> Written:
        """The model with every layer that the recipe matches written in its data type.

        Raises:
            QuikError: the recipe has a rule that is none of a data-free codebook in 16-bit absmax; weights are not finite or
                beyond what absmax or outliers are stored in.
        """
        made, bits, weights, whole = dict(self._params), 0, 0, []
        prefix = ".".join(self._model.block_path) + "."
        for path, W in self._params.items():
            rule = recipe.rule_for(path) if path.startswith(prefix) else None
            if rule is None:
                continue
            if not isinstance(rule, CodebookRule) or rule.needs_data() or rule.absmax != "float16" or rule.centered:
                raise QuikError(f"a scaling study writes codebooks without data, with absmax in float16, not {rule!r}")
            made[path], counted, fits = self._rewrite(path, W, rule)
            bits, weights = bits + counted, weights + W.size
            whole.append((path, fits))
        # Asked for at the end, so that layers are made while the next one's program starts.
        for path, fits in whole:
            if not bool(fits):
                raise QuikError(f"{path} has weights that are not finite, or beyond the float16 of absmax and outliers")
        return Written(made, bits, weights)

    def _rewrite(self, path: str, W: Float32[Array, "n k"], rule: CodebookRule) -> tuple[Array, int, Bool[Array, ""]]:
        k = W.shape[1]
        scores = self._scores().get(path) if rule.proxy > 0 else None
        count = 0 if scores is None else rule.outlier_count(k)
        columns = jnp.arange(k, dtype=jnp.int32) if scores is None else choosing.base_then_outliers(scores, count)
        empty = abstract_codebook(rule, W.shape, (1,), k - count)
        table = self._table(path, W, rule, columns, k - count)
        bounds = codebooks.midpoints(table)
        values = jnp.pad(table, (0, _LONGEST - table.shape[0]), mode="edge")
        padded = jnp.pad(bounds, (0, _LONGEST - bounds.shape[0]), constant_values=jnp.inf)
        passes = jnp.int32(-(-bounds.shape[0] // codebooks.BOUNDS_PER_PASS))
        rewritten, fits = _rewritten(W, columns, padded, values, passes, base=k - count, block=empty.block)
        return rewritten, empty.bits(), fits

    def _scores(self) -> dict[str, Array]:
        if self._proxies is None:
            self._proxies = model_proxies(self._model, self._params)
        return self._proxies

    def _table(self, path: str, W: Array, rule: CodebookRule, columns: Array, base: int) -> Float32[Array, " entries"]:
        if rule.data_type != "quantile":
            return table_of(rule, jnp.zeros(0, jnp.float32))[0]
        # The same for every block, and a sort of all weights.
        key = (path, rule.bits, base)
        if key not in self._tables:
            self._tables[key] = table_of(rule, W[:, columns[:base]] if base < W.shape[1] else W)[0]
        return self._tables[key]


@partial(jax.jit, static_argnames=("base", "block"))
def _rewritten(
    W: Float32[Array, "n k"],
    columns: Int32[Array, " k"],
    bounds: Float32[Array, " longest"],
    values: Float32[Array, " longest"],
    passes: Int32[Array, ""],
    *,
    base: int,
    block: int,
) -> tuple[Float32[Array, "n k"], Bool[Array, ""]]:
    """`F[code] m_b` in the first `base` of `columns`, 16-bit weights in the others; whether all of it is finite."""
    n, k = W.shape
    stored = W[:, columns[:base]] if base < k else W
    flat = stored.reshape(-1)
    absmax = codebooks.block_absmax(flat, block).astype(jnp.float16).astype(jnp.float32)
    m = codebooks.spread(absmax, flat.shape[0], block)
    codes = codebooks.nearest(flat / jnp.where(m > 0, m, 1.0), bounds, passes)
    made = (values.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds") * m).reshape(n, base)
    fits = jnp.isfinite(absmax).all() & jnp.isfinite(W).all()
    if base == k:
        return made, fits
    exact = W[:, columns[base:]].astype(jnp.float16).astype(jnp.float32)
    both = jnp.concatenate([made, exact], axis=1)
    return jnp.take(both, jnp.argsort(columns), axis=1, mode="clip"), fits & jnp.isfinite(exact).all()
