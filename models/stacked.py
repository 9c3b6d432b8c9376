"""A model in the form that runs: blocks that are alike are traced once, and run by `lax.scan` or, on a GPU, one after the other.

Blocks are alike where their layers, shapes, dtypes and the static fields of their packed weights are. Neighbours that are alike
form a run. On a CPU each run is one scan over stacked parameters, so that compiling does not grow with the depth, and a model
whose outlier counts change from block to block has more runs and compiles longer.

A scan copies weights for every token: a product is a call of a kernel or of a library, and XLA hands it a part of a stacked array
only as an array of its own, written once and read once more. On a GPU blocks are therefore unrolled: each keeps its own arrays,
which kernels read where they lie, and XLA compiles every block (`benchmarks/counted.py --decode` counts both sides of that
trade). On a CPU they can be (`benchmarks/generation.py --unrolled` times both). The parameters that users see keep their
published names; this is a second form, made once for running.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.models.base import PADDING, Block, CausalLM, Config, Positions, Transformer
from quikjax.models.cache import Fresh, LayerCache, Memory, StackedCache, formed
from quikjax.models.encoder_decoder import TextBlock, Writer, WritingBlock
from quikjax.pallas_kernels import api
from quikjax.weights import host
from quikjax.weights.codebook_tiles import TiledCodebook
from quikjax.weights.formats import is_packed
from quikjax.weights.linear import Trained
from quikjax.weights.panels import DensePanels, fits_panels, in_panels, of_layer
from quikjax.weights.quik import QuikWeight
from quikjax.weights.tiled import TiledMember, TiledWeight, join_groups, put_on_device, widened


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring blocks that are alike: how each is built, and how many there are."""

    graphdef: nnx.GraphDef[Block]
    count: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static part of a model in this form: the model without its blocks, the runs, the dtype of the hidden state. Hashable.

    `unrolled`: the parameters of a run are a block's each, `{"0": ..., "1": ...}`, and not stacked. The first `text_runs` runs
    are an encoder's, below a decoder's.
    """

    rest: nnx.GraphDef[Any]
    runs: tuple[Run, ...]
    config: Config
    dtype: str = "float32"
    unrolled: bool = False
    text_runs: int = 0

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return sum(run.count for run in self.runs)


def stack(
    model: Transformer, *, release: bool = False, widen: bool = False, panels: bool = False, unrolled: bool | None = None
) -> tuple[Layout, dict[str, Any]]:
    """The model's static layout, and its parameters with each run of blocks stacked along a new first axis, or unrolled.

    Args:
        model: one of ours, dense or with packed weights.
        release: free each block's own arrays as soon as they are stacked, or put into a device's form (the model cannot be used
            afterwards), so that beside one copy of the parameters only one stacked array, or one block, is held. Without, the
            blocks are held twice where they are changed. Blocks that were read on a CPU are stacked where they lie, and are held
            once either way.
        widen: for a CPU, which multiplies those faster, hold dense matrices of 16 bits in float32 and codes of 4 bits in int8.
            Exact: the products are those of the same numbers, and the hidden state keeps its dtype.
        panels: for a CPU whose products are compiled (`pallas_kernels/native`), hold blocks' matrices, the head's table and codes
            that meet quantized activations in panels, in their own bits, written anew; what else there is as `widen` says.
        unrolled: blocks keep arrays of their own. Left out: on a GPU.

    Returns:
        The layout and `{"rest": ..., "runs": {"0": ...}}`: what is outside the blocks by published name (not copied), and for
        each run a block's parameters, every array `[count, ...]`; unrolled, `{"0": ..., "1": ...}`, one block's each.
    """
    unrolled = api.current_device().platform == "gpu" if unrolled is None else unrolled
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    copy = nnx.merge(graphdef, params)
    runs: list[tuple[Run, list[dict[str, Any]]]] = []
    before: Any = None
    first, text_runs = type(model).stacks()[0] if len(type(model).stacks()) > 1 else None, 0
    for name, block in copy.blocks.items():
        block_graphdef, block_state = nnx.split(block)
        given = nnx.to_pure_dict(block_state)
        tree = join_groups(put_on_device(given), type(block).groups.values())
        if panels and unrolled:
            tree = _in_panels_alone(tree, release)
        if widen and unrolled:
            tree = jax.tree.map(_widened, tree, is_leaf=_is_weight)
        if release and unrolled:
            _free(given, tree)
        alike = (block_graphdef, jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)])
        if alike == before:
            run, members = runs[-1]
            runs[-1] = (dataclasses.replace(run, count=run.count + 1), [*members, tree])
        else:
            runs.append((Run(block_graphdef, 1), [tree]))
            text_runs += (*copy.block_path, *name.split(".")[:-1]) == first
        before = alike
    for *above, last in type(model).stacks():
        node: Any = copy
        for step in above:
            node = getattr(node, step)
        setattr(node, last, nnx.Dict({}))
    # What only texts need would make two models of one shape compile twice.
    copy.published, copy.stops = None, ()
    rest, rest_state = nnx.split(copy)
    outside = nnx.to_pure_dict(rest_state)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    hidden = jax.eval_shape(lambda outside, ids: nnx.merge(rest, outside).embed(ids, ids), outside, ids)
    layout = Layout(rest, tuple(run for run, _ in runs), model.config, str(hidden.dtype), unrolled, text_runs)
    stacked = {
        str(i): {str(j): tree for j, tree in enumerate(members)} if unrolled else _stacked(members, release, widen, panels)
        for i, (_, members) in enumerate(runs)
    }
    if panels and model.generates:
        outside = _with_head_in_panels(outside, model.config.vocab_size, release)
    if widen:
        outside = jax.tree.map(_widened, outside, is_leaf=_is_weight)
    return layout, {"rest": outside, "runs": stacked}


def _in_panels_alone(tree: Any, release: bool) -> Any:
    def alone(leaf: Any) -> Any:
        return in_panels([leaf], stacked=False, release=release) if fits_panels(leaf) else leaf

    return jax.tree.map(alone, tree, is_leaf=_is_weight)


def _with_head_in_panels(outside: dict[str, Any], vocabulary: int, release: bool) -> dict[str, Any]:
    """The parameters outside the blocks, the table that logits are made with in panels: the head's own, or the embedding's."""

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".")

    # A packed head is none of these tables, and then there is nothing to put into panels.
    leaves = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(outside, is_leaf=is_packed)}
    own = [path for path in leaves if path.startswith("lm_head.")]
    tables = [path for path in own or leaves if fits_panels(leaves[path]) and leaves[path].shape[0] == vocabulary]
    if len(tables) != 1:
        return outside
    table = in_panels([leaves[tables[0]]], stacked=False, release=release)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: table if name(path) == tables[0] else leaf, outside, is_leaf=is_packed
    )


def _free(given: Any, kept: Any) -> None:
    """Delete the arrays of `given` that are not in `kept`, once those are there."""
    alive = {id(leaf) for leaf in jax.tree.leaves(jax.block_until_ready(kept))}
    for leaf in jax.tree.leaves(given):
        if id(leaf) not in alive:
            leaf.delete()


def _is_weight(leaf: Any) -> bool:
    """Whether a leaf is a weight of any format, in a device's form, or in training: its arrays only its own class understands."""
    return is_packed(leaf) or isinstance(leaf, TiledWeight | TiledMember | TiledCodebook | DensePanels | Trained)


def _widened(leaf: Any) -> Any:
    """A dense matrix of 16 bits in float32, packed codes of 4 bits in bytes, by NumPy where it can; anything else as it is."""

    def converted(array: Array, dtype: Any) -> Array:
        if array.dtype == dtype or not _in_host_memory((array,)):
            return array.astype(dtype)
        memory = host.empty(array.shape, dtype)
        memory[...] = np.asarray(array)
        return host.adopt(memory)

    if isinstance(leaf, QuikWeight):
        return widened(jax.tree.map(lambda part: converted(part, _in_bytes(part.dtype)), leaf))
    if _is_weight(leaf) or leaf.ndim < 2 or leaf.dtype.itemsize != 2:
        return leaf
    return converted(leaf, jnp.float32)


def _stacked(members: list[dict[str, Any]], release: bool, widen: bool, panels: bool) -> Any:
    def join(*leaves: Any) -> Any:
        if panels and all(map(fits_panels, leaves)):
            return in_panels(leaves, stacked=True, release=release)
        if widen and isinstance(leaves[0], QuikWeight):
            # Its codes in whole bytes from the start: NumPy unpacks them many times faster than XLA.
            return widened(jax.tree.map(lambda *parts: join_arrays(*parts, dtype=_in_bytes(parts[0].dtype)), *leaves))
        if _is_weight(leaves[0]):
            return jax.tree.map(join_arrays, *leaves)
        wide = widen and leaves[0].ndim > 1 and leaves[0].dtype.itemsize == 2
        return join_arrays(*leaves, dtype=jnp.float32 if wide else None)

    def join_arrays(*leaves: Array, dtype: Any = None) -> Array:
        dtype = leaves[0].dtype if dtype is None else jnp.dtype(dtype)
        if dtype != jnp.int4 and _in_host_memory(leaves):
            if dtype == leaves[0].dtype and (whole := host.joined(leaves)) is not None:
                if release:
                    for leaf in leaves:
                        leaf.delete()
                return whole
            memory = host.empty((len(leaves), *leaves[0].shape), dtype)

            def put(place: np.ndarray, leaf: Array) -> None:
                place[...] = np.asarray(leaf)
                if release:
                    leaf.delete()

            list(pool.map(put, memory, leaves))
            return host.adopt(memory)
        joined = jnp.stack([leaf.astype(dtype) for leaf in leaves])
        if release:
            joined.block_until_ready()
            for leaf in leaves:
                leaf.delete()
        return joined

    # NumPy lets go of Python's lock while it copies.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return jax.tree.map(join, *members, is_leaf=_is_weight)


def _in_bytes(dtype: Any) -> Any:
    return jnp.int8 if dtype == jnp.int4 else dtype


def _in_host_memory(leaves: tuple[Any, ...]) -> bool:
    """Whether arrays are where NumPy can copy them: several times faster than XLA, whose memory is in small pages."""
    return all(map(host.is_here, leaves))


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
        trees = params["runs"][str(i)]
        if layout.unrolled:
            for j in range(run.count):
                hidden, fresh = _READ_BLOCK(run.graphdef, trees[str(j)], hidden, queries, kind)
                written.append(jax.tree.map(lambda part: part[None], fresh))
            continue

        def block(hidden: Array, layer: Array, run: Run = run, trees: Any = trees) -> tuple[Array, Fresh]:
            return _read_block(run.graphdef, of_layer(trees, layer), hidden, queries, kind)

        hidden, parts = jax.lax.scan(block, hidden, jnp.arange(run.count, dtype=jnp.int32))
        written.append(parts)
    return _last(rest, hidden, lengths), _all_blocks(written)


def read_text(
    layout: Layout,
    params: Mapping[str, Any],
    ids: Int[Array, "batch length"],
    lengths: Int32[Array, " batch"],
    kind: str = "float32",
) -> Memory:
    """Read texts with an encoder, padded on the right to one length: the keys and values that the decoder attends across to.

    They are of all the decoder's blocks, in the form that a cache of `kind` holds.
    """
    rest = nnx.merge(layout.rest, params["rest"])
    positions = _positions(jnp.zeros_like(lengths), lengths, ids.shape[1])
    text = rest.embed_text(ids, positions).astype(layout.dtype)
    written = []
    for i, run in enumerate(layout.runs):
        trees, remembers = params["runs"][str(i)], i >= layout.text_runs
        if layout.unrolled:
            for j in range(run.count):
                if remembers:
                    fresh = _REMEMBER(run.graphdef, trees[str(j)], text, kind)
                    written.append(jax.tree.map(lambda part: part[None], fresh))
                else:
                    text = _READ_TEXT_BLOCK(run.graphdef, trees[str(j)], text, positions)
        elif remembers:

            def remember(text: Array, layer: Array, run: Run = run, trees: Any = trees) -> tuple[Array, Fresh]:
                return text, _remember(run.graphdef, of_layer(trees, layer), text, kind)

            written.append(jax.lax.scan(remember, text, jnp.arange(run.count, dtype=jnp.int32))[1])
        else:

            def block(text: Array, layer: Array, run: Run = run, trees: Any = trees) -> tuple[Array, None]:
                return _read_text_block(run.graphdef, of_layer(trees, layer), text, positions), None

            text, _ = jax.lax.scan(block, text, jnp.arange(run.count, dtype=jnp.int32))
    return Memory(_all_blocks(written), lengths)


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
    have room for `start + length` tokens, padding included. An encoder-decoder's tokens are those that it writes, and its cache
    has a memory.
    """
    rest = nnx.merge(layout.rest, params["rest"])
    queries = _positions(start, lengths, ids.shape[1])
    where = Positions(queries, write_at=start[0] if ids.shape[0] == 1 else start)
    hidden = (rest.embed_written if layout.text_runs else rest.embed)(ids, queries).astype(layout.dtype)
    first = 0
    for i, run in enumerate(layout.runs[layout.text_runs :], layout.text_runs):
        trees = params["runs"][str(i)]
        if layout.unrolled:
            for j in range(run.count):
                hidden, cache = _EXTEND_BLOCK(run.graphdef, trees[str(j)], hidden, where, cache, jnp.int32(first + j))
        else:

            def block(
                carry: tuple[Array, StackedCache], layer: Array, run: Run = run, trees: Any = trees, first: int = first
            ) -> tuple[Any, None]:
                hidden, cache = carry
                return _extend_block(run.graphdef, of_layer(trees, layer), hidden, where, cache, first + layer), None

            (hidden, cache), _ = jax.lax.scan(block, (hidden, cache), jnp.arange(run.count, dtype=jnp.int32))
        first += run.count
    return _last(rest, hidden, lengths), cache


def _read_block(graphdef: nnx.GraphDef[Block], tree: Any, hidden: Array, queries: Array, kind: str) -> tuple[Array, Fresh]:
    hidden, fresh = nnx.merge(graphdef, tree)(hidden, Positions(queries))
    return hidden, formed(*fresh.by_head(), kind)


def _extend_block(
    graphdef: nnx.GraphDef[Block], tree: Any, hidden: Array, where: Positions, cache: StackedCache, layer: Array
) -> tuple[Array, StackedCache]:
    hidden, written = nnx.merge(graphdef, tree)(hidden, where, LayerCache(cache, layer))
    assert isinstance(written, LayerCache)
    return hidden, written.stacked


def _read_text_block(graphdef: nnx.GraphDef[Any], tree: Any, text: Array, positions: Array) -> Array:
    block: TextBlock = nnx.merge(graphdef, tree)
    return block.read(text, positions)


def _remember(graphdef: nnx.GraphDef[Any], tree: Any, text: Array, kind: str) -> Fresh:
    block: WritingBlock = nnx.merge(graphdef, tree)
    return formed(*block.remember(text).by_head(), kind)


def _all_blocks(written: Sequence[Fresh]) -> Fresh:
    """Keys and values of every run, one behind the other."""
    return written[0] if len(written) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *written)


# Unrolled, blocks that are alike are traced and lowered once.
_READ_BLOCK = jax.jit(_read_block, static_argnames=("graphdef", "kind"))
_EXTEND_BLOCK = jax.jit(_extend_block, static_argnames=("graphdef",))
_READ_TEXT_BLOCK = jax.jit(_read_text_block, static_argnames=("graphdef",))
_REMEMBER = jax.jit(_remember, static_argnames=("graphdef", "kind"))


def _positions(start: Int32[Array, " batch"], lengths: Int32[Array, " batch"], length: int) -> Int32[Array, "batch length"]:
    offsets = jnp.arange(length, dtype=jnp.int32)
    return jnp.where(offsets < lengths[:, None], start[:, None] + offsets, PADDING)


def _last(rest: CausalLM | Writer, hidden: Float[Array, "batch length hidden"], lengths: Int32[Array, " batch"]) -> Array:
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    return rest.head(jnp.take_along_axis(hidden, at, axis=1))[:, 0]
