"""Whole models and single blocks in QUIK format with random weights, made on the device, and the programs that are timed."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import gpu_timing
import jax
import jax.numpy as jnp
from flax import nnx
from gpu_peers import random_layer

from quikjax.models import cache as caches
from quikjax.models import registry, stacked
from quikjax.models.stacked import Layout
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.weights.tiled import TiledWeight

Fields = dict[str, Any]

LLAMA_2_7B: Fields = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
# One block of each model whose block the paper times; the vocabulary plays no part.
_ONE_BLOCK = {"vocab_size": 512, "num_hidden_layers": 1, "max_position_embeddings": 4096}
BLOCKS: dict[str, Fields] = {
    "opt-66b": {"model_type": "opt", "hidden_size": 9216, "ffn_dim": 36864, "num_attention_heads": 72} | _ONE_BLOCK,
    "llama-2-70b": LLAMA_2_7B
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    | _ONE_BLOCK,
    "falcon-180b": {"model_type": "falcon", "hidden_size": 14848, "num_attention_heads": 232, "num_kv_heads": 8}
    | {"new_decoder_architecture": True}
    | _ONE_BLOCK,
}
# The same for a dry run, two heads for every key head.
_TINY = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 64}
TINY = LLAMA_2_7B | _TINY | {"intermediate_size": 160}
TINY_BLOCKS: dict[str, Fields] = {
    "opt-66b": BLOCKS["opt-66b"] | _TINY | {"ffn_dim": 256},
    "llama-2-70b": BLOCKS["llama-2-70b"] | _TINY | {"intermediate_size": 160, "num_key_value_heads": 2},
    "falcon-180b": BLOCKS["falcon-180b"] | _TINY | {"num_kv_heads": 2},
}
# W8A8, with outliers in proportion to their width.
_WIDE = ("down_proj", "dense_4h_to_h")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in the form in which `generate` runs it, parameters in one format, and the linear layers of its blocks."""

    fields: Fields
    layout: Layout
    params: dict[str, Any]
    linears: tuple[LinearSpec, ...]

    @property
    def bytes(self) -> int:
        return gpu_timing.size(self.params)


def outliers_of(fields: Fields) -> int:
    """QUIK's 256 outliers for a hidden size, a sixteenth for tiny models."""
    return min(256, int(fields["hidden_size"]) // 16)


def build(fields: Fields, quantized: bool, dtype: Any, unrolled: bool | None = None) -> Model:
    """Random parameters in the published shape: dense, or QUIK-4B. `unrolled`: as in `stacked.stack`."""
    abstract = registry.abstract_model(fields, dtype)
    group_of = {
        f"{'.'.join(abstract.block_path)}.{name}.{layer}": (name, group)
        for name, block in abstract.blocks.items()
        for group, layers in block.groups.items()
        for layer in layers
    }
    columns: dict[tuple[str, str], jax.Array] = {}
    values: dict[str, Any] = {}
    linears = []
    for i, (path, leaf) in enumerate(sorted(registry.dotted(registry.pure_params(abstract)).items())):
        key = jax.random.key(i)
        layer = path.rpartition(".")[0]
        group = group_of.get(layer) if len(leaf.shape) == 2 else None
        if group is not None:
            linears.append(_spec(fields, layer.rpartition(".")[2], leaf.shape))
        if group is not None and quantized:
            values[path] = _random_weight(key, group, linears[-1], dtype, columns)
        elif len(leaf.shape) == 1:
            values[path] = jnp.ones(leaf.shape, dtype)
        else:
            values[path] = _random_matrix(key, leaf.shape, dtype)
    layout, params = stacked.stack(nnx.merge(nnx.split(abstract)[0], registry.nested(values)), unrolled=unrolled)
    return Model(fields, layout, params, tuple(linears))


def _spec(fields: Fields, layer: str, shape: tuple[int, int]) -> LinearSpec:
    outputs, inputs = shape
    outliers, wide = outliers_of(fields), layer in _WIDE
    bits = 8 if wide else 4
    return LinearSpec(
        "random", layer, outputs, inputs, round(outliers * inputs / fields["hidden_size"]) if wide else outliers, bits, bits
    )


# Under jit, so that no float32 copy of a whole matrix counts into the peak of the device's memory.
@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _random_matrix(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-1])).astype(dtype)


def _random_weight(
    key: jax.Array, group: tuple[str, str], spec: LinearSpec, dtype: Any, columns: dict[tuple[str, str], jax.Array]
) -> TiledWeight:
    _, tiles = random_layer(key, spec, 1, dtype)
    small = 1 / math.sqrt(spec.inputs)
    tiles = dataclasses.replace(
        tiles,
        scale=tiles.scale * small,
        reduced=tiles.reduced * small,
        outliers=tiles.outliers * jnp.asarray(small, dtype),
        # Layers of a block that read one tensor have one set of columns.
        columns=columns.setdefault(group, tiles.columns),
    )
    shape = (spec.outputs, spec.inputs)
    return TiledWeight(tiles=tiles, activation_bits=spec.bits, shape=shape, in_axes=(1,), group=group[1])


def prefill(model: Model, length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Reading a prompt of `length` tokens (logits of the last one, keys and values), and its arguments."""
    ids = jax.random.randint(jax.random.key(7), (1, length), 0, model.fields["vocab_size"], jnp.int32)
    layout, lengths = model.layout, jnp.full((1,), length, jnp.int32)
    return lambda params, ids, lengths: stacked.read(layout, params, ids, lengths, layout.dtype), (model.params, ids, lengths)


def decode(model: Model, batch: int, context: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One step of decoding behind `context` tokens, `(logits, cache)` of `(params, ids, positions, cache)`, and its arguments.

    Donate the cache (argument 3), as generation does: otherwise every step copies it. It comes back ready for the same step.
    The cache in the arguments is a shape; `random_cache` fills it.
    """
    ids = jax.random.randint(jax.random.key(8), (batch, 1), 0, model.fields["vocab_size"], jnp.int32)
    layout, positions = model.layout, jnp.full((batch,), context, jnp.int32)

    def step(params: Any, ids: Any, positions: Any, cache: Any) -> Any:
        return stacked.extend(layout, params, ids, positions, jnp.ones_like(positions), cache)

    config = layout.config
    shape = (config.layers, config.kv_heads, batch, context + 1, config.head_size)
    return step, (model.params, ids, positions, jax.eval_shape(lambda: caches.empty_cache(*shape, kind=layout.dtype)))


def random_cache(shape: Any) -> Any:
    """A cache of random keys and values: zeros would multiply at less power, and so faster."""
    leaves, tree = jax.tree.flatten(shape)
    return jax.tree.unflatten(tree, [_random_matrix(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)])
