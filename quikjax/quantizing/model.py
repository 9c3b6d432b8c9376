"""Whole models through calibration and quantization, one transformer block at a time.

Activations flow block by block: the Hessian of each group of layers comes from unquantized activations through the weights
that are already quantized, in order of execution (QUIK, section 3.1). Weights enter as dense arrays throughout (quantized
ones dequantized), so one compiled function per kind of block serves the whole model.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models.base import Block, Positions, Transformer, default_positions
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.models.tokens import checked_tokens, checked_transformer
from quikjax.quantizing.activation_store import Activations, Batch, read
from quikjax.quantizing.codebook_rule import wants_proxies
from quikjax.quantizing.distillation import Distillation, OnStep, distil_block
from quikjax.quantizing.params import LayerResult, OnLayer, after_distillation, quantize_block
from quikjax.quantizing.proxies import block_proxies, written_layers
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.quantizing.statistics import LayerStats, empty_stats, observe
from quikjax.weights.formats import dequantize, is_packed

# The parameters of one block, flat, by dotted path within it.
BlockParams = dict[str, Any]

# What groups of layers read in one batch, kept from pass to pass over a block so that attention runs once; beyond KEPT_BYTES
# for all batches it is computed again. That decides which programs XLA compiles, so it must not depend on where there is room:
# what a smaller budget of memory leaves no room for is on disk.
Kept = dict[str, Batch]
KEPT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class QuantizedBlock:
    """One finished block: its published name (`model.layers.3`), its parameters with packed weights, its layers' results."""

    name: str
    params: BlockParams
    results: list[LayerResult]


def quantize_model(
    model: Transformer,
    recipe: Recipe | str,
    batches: Iterable[Any],
    *,
    on_layer: OnLayer | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Quantize a model that is in memory, sequentially: each block's statistics come through the quantized ones before it.

    Args:
        model: any of our models, dense.
        recipe: what to do, or a recipe's name; one that needs no data ignores `batches`.
        batches: calibration tokens, whole numbers `[batch, length]` each, without padding.
        on_layer: called with each layer's `LayerResult` as it is done, before its block is distilled where the recipe says so.
        on_step: called as a block is distilled.

    Returns:
        The parameters as nested dictionaries with packed weights, for `nnx.merge(nnx.split(model)[0], ...)`.

    Raises:
        QuikError: there is nothing to calibrate on, `batches` are not what `embed_batches` takes, or weights or activations are
            not finite, or do not stay finite in distillation.
    """
    recipe, model = find_recipe(recipe), checked_transformer(model)
    params = dotted(pure_params(model))

    def load(name: str) -> BlockParams:
        return {path.removeprefix(name + "."): leaf for path, leaf in params.items() if path.startswith(name + ".")}

    result = {path: leaf for path, leaf in params.items() if model.block_of(path) is None}
    hidden: list[Batch] = list(embed_batches(model, batches)) if recipe.needs_data() else []
    blocks = quantize_blocks(model, load, recipe, hidden, on_layer=on_layer, on_step=on_step)
    del hidden
    for block in blocks:
        result.update({f"{block.name}.{path}": leaf for path, leaf in block.params.items()})
    return nested({path: result[path] for path in params})


def calibrate(graphdef: nnx.GraphDef[Any], params: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, LayerStats]:
    """Statistics of every layer's input in the *unquantized* model, by dotted path, for `quantize_params`.

    Layers that read the same tensor share one `LayerStats`. Holds one Hessian per group of layers: use `quantize_model` for
    models whose Hessians do not fit.

    Raises:
        QuikError: `batches` are not what `embed_batches` takes.
    """
    model: Transformer = nnx.merge(graphdef, params)
    hidden: list[Batch] = list(embed_batches(model, batches))
    stats: dict[str, LayerStats] = {}
    for name, block in model.blocks.items():
        blockdef, block_params = nnx.split(block)
        pure = nnx.to_pure_dict(block_params)
        path = ".".join((*model.block_path, name))
        kept: list[Kept] = [{} for _ in hidden]
        for group, layers in block.groups.items():
            empty = empty_stats(dotted(pure)[f"{layers[0]}.weight"].shape[1], group=group)
            shared = _observe_all(blockdef, pure, hidden, kept, empty, Activations())
            stats.update({f"{path}.{layer}.weight": shared for layer in layers})
        hidden = list(_forward_all(blockdef, pure, hidden, kept))
    return stats


def embed_batches(model: Transformer, batches: Iterable[Any]) -> Iterator[np.ndarray]:
    """The hidden states that enter the first block, one host array after the other. Only the embedding's weights are read.

    Raises:
        QuikError: there are no tokens, more in a row than the model's context, some outside its vocabulary, or a batch is no
            array `[batch, length]` of whole numbers.
    """
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise QuikError(f"calibration takes a list of batches of token ids, [batch, length] each, not {described(batches)}")
    seen = 0
    for ids in batches:
        tokens = jnp.asarray(checked_tokens(ids, model.config, "a calibration batch"))
        seen += tokens.size
        yield np.asarray(model.embed(tokens, default_positions(tokens)))
    if not seen:
        raise QuikError("there is nothing to calibrate on; give at least one batch of tokens")


def quantize_blocks(
    model: Transformer,
    load: Callable[[str], BlockParams],
    recipe: Recipe,
    hidden: Sequence[Batch],
    *,
    store: Activations | None = None,
    on_layer: OnLayer | None = None,
    on_step: OnStep | None = None,
    skip: Sequence[str] = (),
) -> Iterator[QuantizedBlock]:
    """Quantize block after block, holding one at a time. The generator's caller stores each before asking for the next.

    Args:
        model: may be abstract: only its structure is used.
        load: gives a block's dense parameters by its name (`model.layers.3`).
        hidden: what enters the first block that is not skipped, one array per batch. Empty for a recipe that needs no data.
            Callers should drop it: what enters a block is freed here as soon as all that leaves it is there.
        store: takes what leaves each block, under the block's name, before the block is yielded; left out, memory.
        skip: names of leading blocks that are finished already (`hidden` is what left the last of them).
    """
    store = store or Activations()
    proxied, before = wants_proxies(recipe.rules), None
    for key, block in model.blocks.items():
        name = ".".join((*model.block_path, key))
        if name in skip:
            if proxied:
                before = written_layers(model, load(name))
            continue
        results: list[LayerResult] = []

        def note(layer: LayerResult, results: list[LayerResult] = results) -> None:
            results.append(layer)
            if on_layer is not None:
                on_layer(layer)

        params = load(name)
        width = model.config.hidden_size
        proxies = None
        if proxied:
            proxies = block_proxies(model, params, before)
            before = written_layers(model, params)
        if not hidden:
            quantized = quantize_block(
                params,
                recipe,
                dict.fromkeys(params),
                prefix=name + ".",
                hidden_size=width,
                proxies=proxies,
                on_layer=note,
            )
            yield QuantizedBlock(name, quantized, results)
            continue
        blockdef = nnx.split(block)[0]
        done = _quantize_block_in_order(blockdef, block, params, recipe, hidden, name, width, proxies, store, note)
        if recipe.distillation is not None and done.samples:
            done, results = _distil(blockdef, params, done, hidden, recipe.distillation, name, results, on_step)
        hidden = store.put(name, _forward_all(blockdef, nested(done.dense), hidden, done.kept))
        packed = done.packed
        del done  # with the tensors it keeps
        yield QuantizedBlock(name, packed, results)


class _Done(NamedTuple):
    """A block whose layers are quantized: its parameters, the same dequantized, what groups read in each batch, and some rows of
    what each layer read."""

    packed: BlockParams
    dense: BlockParams
    kept: Sequence[Kept]
    samples: dict[str, Array]


def _distil(
    blockdef: nnx.GraphDef[Block],
    params: BlockParams,
    done: _Done,
    hidden: Sequence[Batch],
    settings: Distillation,
    name: str,
    results: list[LayerResult],
    on_step: OnStep | None,
) -> tuple[_Done, list[LayerResult]]:
    """The block after distillation from `params`, which it was quantized from, and its layers' results measured again."""
    found = distil_block(blockdef, params, done.packed, hidden, settings, name=name, on_step=on_step)
    dense = {
        path: dequantize(leaf).astype(params[path].dtype) if is_packed(leaf) else leaf for path, leaf in found.params.items()
    }
    again = []
    for result in results:
        path = result.path.removeprefix(name + ".")
        again.append(after_distillation(result, found.params[path], params[path], done.samples[path], found.loss))
    # What groups read came through weights that have moved.
    return _Done(found.params, dense, [{} for _ in hidden], done.samples), again


def _quantize_block_in_order(
    blockdef: nnx.GraphDef[Block],
    block: Block,
    params: BlockParams,
    recipe: Recipe,
    hidden: Sequence[Batch],
    name: str,
    hidden_size: int,
    proxies: Mapping[str, Array] | None,
    store: Activations,
    on_layer: OnLayer,
) -> _Done:
    """Quantize one block, group after group."""
    dense, packed, prefix = dict(params), dict(params), name + "."
    samples: dict[str, Array] = {}
    kept: list[Kept] = [{} for _ in hidden]
    for group, layers in block.groups.items():
        paths = [f"{layer}.weight" for layer in layers]
        if not any(recipe.rule_for(prefix + path) for path in paths):
            continue
        empty = empty_stats(params[paths[0]].shape[1], group=group)
        stats = _observe_all(blockdef, nested(dense), hidden, kept, empty, store)
        packed = quantize_block(
            packed,
            recipe,
            dict.fromkeys(paths, stats),
            prefix=prefix,
            hidden_size=hidden_size,
            proxies=proxies,
            on_layer=on_layer,
        )
        for path in paths:
            if is_packed(packed[path]):
                dense[path] = dequantize(packed[path]).astype(params[path].dtype)
                samples[path] = stats.sample[: int(stats.filled)]
    return _Done(packed, dense, kept, samples)


def _observe_all(
    blockdef: nnx.GraphDef[Block],
    params: Mapping[str, Any],
    hidden: Sequence[Batch],
    kept: Sequence[Kept],
    stats: LayerStats,
    store: Activations,
) -> LayerStats:
    """Statistics of what the group of `stats`, still empty, reads in all batches. The tensor joins `kept`, up to KEPT_BYTES."""
    group = stats.group
    assert group is not None
    for index, (batch, known) in enumerate(zip(hidden, kept, strict=True)):
        before = _read_kept(known)
        x, stats = _observe(blockdef, params, read(batch), before, stats, group)
        # Waiting for it keeps later batches out of memory until they are needed.
        x.block_until_ready()
        if len(hidden) * (sum(array.nbytes for array in before.values()) + x.nbytes) <= KEPT_BYTES:
            known[group] = store.keep(group, index, np.asarray(x))
    return stats


def _forward_all(
    blockdef: nnx.GraphDef[Block], params: Mapping[str, Any], hidden: Sequence[Batch], kept: Sequence[Kept]
) -> Iterator[np.ndarray]:
    for batch, known in zip(hidden, kept, strict=True):
        yield np.asarray(_forward(blockdef, params, read(batch), _read_kept(known)))


def _read_kept(kept: Kept) -> dict[str, np.ndarray]:
    return {group: read(x) for group, x in kept.items()}


def _run(
    blockdef: nnx.GraphDef[Block], params: Mapping[str, Any], hidden: Float[Array, "batch length hidden"], kept: dict[str, Any]
) -> tuple[Float[Array, "batch length hidden"], dict[str, Array]]:
    """Run a block: its output, and what each group of layers read. Under `jit`, what led to a kept tensor is dead code."""
    seen: dict[str, Array] = {}

    def see(group: str, x: Array) -> Array:
        seen[group] = kept.get(group, x)
        return seen[group]

    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
    return nnx.merge(blockdef, params)(hidden, Positions(positions), observe=see)[0], seen


@partial(jax.jit, static_argnames=("blockdef", "group"), donate_argnames=("stats",))
def _observe(
    blockdef: nnx.GraphDef[Block],
    params: Mapping[str, Any],
    hidden: Float[Array, "batch length hidden"],
    kept: dict[str, Any],
    stats: LayerStats,
    group: str,
) -> tuple[Float[Array, "batch tokens k"], LayerStats]:
    x = _run(blockdef, params, hidden, kept)[1][group]
    return x, observe(stats, x)


@partial(jax.jit, static_argnames=("blockdef",))
def _forward(
    blockdef: nnx.GraphDef[Block], params: Mapping[str, Any], hidden: Float[Array, "batch length hidden"], kept: dict[str, Any]
) -> Float[Array, "batch length hidden"]:
    return _run(blockdef, params, hidden, kept)[0]
