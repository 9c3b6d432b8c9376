"""A model whose blocks are stacked: blocks that are alike are traced and compiled once, and run by `lax.scan`.

Blocks are alike where their layers, shapes, dtypes and the static fields of their packed weights are. Neighbours that are alike
form a run; each run is one scan, so a model whose outlier counts change from block to block has more runs and compiles longer.
The parameters that users see keep their published names; the stack is a second form of them, made once for running.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.models.base import PADDING, Block, CausalLM, Config, Positions
from quikjax.models.cache import Fresh, LayerCache, StackedCache, formed
from quikjax.weights import host
from quikjax.weights.quik import QuikWeight
from quikjax.weights.tiled import TiledWeight, put_on_device, widened


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring blocks that are alike: how each is built, and how many there are."""

    graphdef: nnx.GraphDef[Block]
    count: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static part of a stacked model: the model without its blocks, the runs, and the dtype of the hidden state. Hashable."""

    rest: nnx.GraphDef[CausalLM]
    runs: tuple[Run, ...]
    config: Config
    dtype: str = "float32"

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return sum(run.count for run in self.runs)


def stack(model: CausalLM, *, release: bool = False, widen: bool = False) -> tuple[Layout, dict[str, Any]]:
    """The model's static layout, and its parameters with each run of blocks stacked along a new first axis.

    Args:
        model: one of ours, dense or with packed weights.
        release: free each block's own arrays as soon as they are stacked (the model cannot be used afterwards), so that beside
            one copy of the parameters only one stacked array is held. Without, the blocks are held twice.

        widen: for a CPU, which multiplies those faster, hold dense matrices of 16 bits in float32 and codes of 4 bits in int8.
            Exact: the products are those of the same numbers, and the hidden state keeps its dtype.

    Returns:
        The layout and `{"rest": ..., "runs": {"0": ...}}`: what is outside the blocks by published name (not copied), and for
        each run a block's parameters, every array `[count, ...]`.
    """
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    copy = nnx.merge(graphdef, params)
    runs: list[tuple[Run, list[dict[str, Any]]]] = []
    before: Any = None
    for block in copy.blocks.values():
        block_graphdef, block_state = nnx.split(block)
        tree = put_on_device(nnx.to_pure_dict(block_state))
        alike = (block_graphdef, jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)])
        if alike == before:
            run, members = runs[-1]
            runs[-1] = (dataclasses.replace(run, count=run.count + 1), [*members, tree])
        else:
            runs.append((Run(block_graphdef, 1), [tree]))
        before = alike
    node: Any = copy
    for name in type(model).block_path[:-1]:
        node = getattr(node, name)
    setattr(node, type(model).block_path[-1], nnx.Dict({}))
    # What only texts need would make two models of one shape compile twice.
    copy.published, copy.stops = None, ()
    rest, rest_state = nnx.split(copy)
    outside = nnx.to_pure_dict(rest_state)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    hidden = jax.eval_shape(lambda outside, ids: nnx.merge(rest, outside).embed(ids, ids), outside, ids)
    layout = Layout(rest, tuple(run for run, _ in runs), model.config, str(hidden.dtype))
    stacked = {str(i): _stacked(members, release, widen) for i, (_, members) in enumerate(runs)}
    if widen:
        outside = jax.tree.map(_widened, outside, is_leaf=_is_packed)
    return layout, {"rest": outside, "runs": stacked}


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuikWeight | TiledWeight)


def _widened(leaf: Any) -> Any:
    """A dense matrix of 16 bits in float32; anything else as it is."""
    return leaf if _is_packed(leaf) or leaf.ndim < 2 or leaf.dtype.itemsize != 2 else leaf.astype(jnp.float32)


def _stacked(members: list[dict[str, Any]], release: bool, widen: bool) -> Any:
    def join(*leaves: Any) -> Any:
        if _is_packed(leaves[0]):
            joined = jax.tree.map(join_arrays, *leaves)
            return widened(joined) if widen and isinstance(joined, QuikWeight) else joined
        return join_arrays(*leaves, wide=widen)

    def join_arrays(*leaves: Array, wide: bool = False) -> Array:
        if _in_host_memory(leaves):
            dtype = jnp.float32 if wide and leaves[0].ndim > 1 and leaves[0].dtype.itemsize == 2 else leaves[0].dtype
            memory = host.empty((len(leaves), *leaves[0].shape), dtype)
            for place, leaf in zip(memory, leaves, strict=True):
                place[...] = np.asarray(leaf)
                if release:
                    leaf.delete()
            return host.adopt(memory)
        joined = jnp.stack([_widened(leaf) for leaf in leaves] if wide else leaves)
        if release:
            joined.block_until_ready()
            for leaf in leaves:
                leaf.delete()
        return joined

    return jax.tree.map(join, *members, is_leaf=_is_packed)


def _in_host_memory(leaves: tuple[Any, ...]) -> bool:
    """Whether arrays are where NumPy can copy them: several times faster than XLA, whose memory is in small pages."""
    return jax.default_backend() == "cpu" and all(
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.ndim > 0
        and leaf.dtype != jnp.int4
        and len(leaf.devices()) == 1
        for leaf in leaves
    )


def read(
    layout: Layout,
    params: Mapping[str, Any],
    ids: Int[Array, "batch length"],
    lengths: Int32[Array, " batch"],
    kind: str = "float32",
) -> tuple[Float[Array, "batch vocab"], Fresh]:
    """Read prompts, padded on the right to one length: the logits behind each one's last token, and the keys and values.

    The logits are float32. Keys and values are those of all blocks, `[layers, kv_heads, batch, length, head]`, in the form that
    a cache of `kind` holds.
    """
    rest = nnx.merge(layout.rest, params["rest"])
    queries = _positions(jnp.zeros_like(lengths), lengths, ids.shape[1])
    hidden = rest.embed(ids, queries).astype(layout.dtype)
    written = []
    for i, run in enumerate(layout.runs):

        def block(hidden: Array, tree: Any, run: Run = run) -> tuple[Array, Fresh]:
            hidden, fresh = nnx.merge(run.graphdef, tree)(hidden, Positions(queries))
            return hidden, formed(*fresh.by_head(), kind)

        hidden, parts = jax.lax.scan(block, hidden, params["runs"][str(i)])
        written.append(parts)
    fresh = written[0] if len(written) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *written)
    return _last(rest, hidden, lengths), fresh


def extend(
    layout: Layout,
    params: Mapping[str, Any],
    ids: Int[Array, "batch length"],
    start: Int32[Array, " batch"],
    lengths: Int32[Array, " batch"],
    cache: StackedCache,
) -> tuple[Float[Array, "batch vocab"], StackedCache]:
    """Read further tokens behind those in a cache: the float32 logits behind each row's last one, and the cache with them in it.

    Row `b` has `lengths[b]` new tokens, padded on the right, the first of which stands at position `start[b]`. The cache must
    have room for `start + length` tokens, padding included.
    """
    rest = nnx.merge(layout.rest, params["rest"])
    queries = _positions(start, lengths, ids.shape[1])
    where = Positions(queries, write_at=start[0] if ids.shape[0] == 1 else start)
    hidden = rest.embed(ids, queries).astype(layout.dtype)
    first = 0
    for i, run in enumerate(layout.runs):

        def block(carry: tuple[Array, StackedCache], of: tuple[Any, Array], run: Run = run) -> tuple[Any, None]:
            (hidden, cache), (tree, layer) = carry, of
            hidden, written = nnx.merge(run.graphdef, tree)(hidden, where, LayerCache(cache, layer))
            assert isinstance(written, LayerCache)
            return (hidden, written.stacked), None

        layers = jnp.arange(first, first + run.count, dtype=jnp.int32)
        (hidden, cache), _ = jax.lax.scan(block, (hidden, cache), (params["runs"][str(i)], layers))
        first += run.count
    return _last(rest, hidden, lengths), cache


def _positions(start: Int32[Array, " batch"], lengths: Int32[Array, " batch"], length: int) -> Int32[Array, "batch length"]:
    offsets = jnp.arange(length, dtype=jnp.int32)
    return jnp.where(offsets < lengths[:, None], start[:, None] + offsets, PADDING)


def _last(rest: CausalLM, hidden: Float[Array, "batch length hidden"], lengths: Int32[Array, " batch"]) -> Array:
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    return rest.head(jnp.take_along_axis(hidden, at, axis=1))[:, 0]
