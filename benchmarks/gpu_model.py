"""A whole LLaMA in QUIK format with random weights, made on the device, and the programs that are timed: prefill and decode."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gpu_timing
import jax
import jax.numpy as jnp
from flax import nnx
from gpu_peers import random_layer

from quikjax.linear import tile_params
from quikjax.models import registry
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.weight import QuikWeight

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TINY = LLAMA_2_7B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SHARED = {"q_proj": "attention_input", "k_proj": "attention_input", "v_proj": "attention_input"}
_SHARED |= {"gate_proj": "mlp_input", "up_proj": "mlp_input"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A graph definition with parameters in one format."""

    graphdef: Any
    params: dict[str, Any]

    @property
    def bytes(self) -> int:
        return gpu_timing.size(self.params)


def build(fields: dict[str, Any], quantized: bool, dtype: Any) -> Model:
    """Random parameters in the published shape: dense, or QUIK-4B (`down_proj` in 8 bits, outliers 1/16)."""
    graphdef, _ = nnx.split(registry.abstract_model(fields, dtype))
    abstract = registry.pure_params(registry.abstract_model(fields, dtype))
    flat = registry.dotted(abstract)
    columns: dict[str, jax.Array] = {}
    values: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(sorted(flat.items())):
        key = jax.random.key(i)
        *block, layer, _ = path.split(".")
        if quantized and layer.endswith("_proj"):
            values[path] = _random_weight(key, ".".join(block), layer, leaf.shape, dtype, columns)
        elif len(leaf.shape) == 1:
            values[path] = jnp.ones(leaf.shape, dtype)
        else:
            values[path] = (jax.random.normal(key, leaf.shape, jnp.float32) / math.sqrt(leaf.shape[-1])).astype(dtype)
    params = registry.nested(values)
    return Model(graphdef, jax.jit(tile_params)(params) if quantized else params)


def _random_weight(
    key: jax.Array, block: str, layer: str, shape: tuple[int, ...], dtype: Any, columns: dict[str, jax.Array]
) -> QuikWeight:
    outputs, inputs = shape
    bits = 8 if layer == "down_proj" else 4
    spec = LinearSpec("random", layer, outputs, inputs, round(inputs / 16), bits, bits)
    _, packed = random_layer(key, spec, 1, dtype)
    group = f"{block.rsplit('.', 1)[0]}.{_SHARED[layer]}" if layer in _SHARED else None
    # Layers that read one tensor have one set of columns.
    shared = packed.columns if group is None else columns.setdefault(group, packed.columns)
    return QuikWeight(
        qweight=packed.qweight,
        scale=packed.scale / math.sqrt(inputs),
        reduced=packed.reduced / math.sqrt(inputs),
        outliers=packed.outliers / math.sqrt(inputs),
        columns=shared,
        weight_bits=bits,
        activation_bits=bits,
        shape=shape,
        in_axes=(1,),
        base=spec.base,
        group=group,
    )


def prefill(model: Model, length: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The forward pass over a prompt of `length` tokens, and its arguments."""
    ids = jax.random.randint(jax.random.key(7), (1, length), 0, 250, jnp.int32)
    return lambda params, ids: nnx.merge(model.graphdef, params).prefill(ids, length + 1)[0], (model.params, ids)


def decode(model: Model, batch: int, context: int, fields: dict[str, Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One step of decoding behind a cache of `context` tokens, and its arguments."""
    ids = jnp.zeros((batch, 1), jnp.int32)

    def fill(params: Any) -> Any:
        # The cache's contents play no part in the time: made by reading one token, then said to be long.
        _, cache = nnx.merge(model.graphdef, params).prefill(jnp.zeros((batch, 1), jnp.int32), context + 1)
        positions = jnp.broadcast_to(jnp.arange(context + 1, dtype=jnp.int32), cache.positions.shape)
        return cache._replace(positions=positions, used=jnp.int32(context))

    cache = jax.jit(fill)(model.params)
    positions = jnp.full((batch, 1), context, jnp.int32)

    def step(params: Any, ids: Any, positions: Any, cache: Any) -> Any:
        return nnx.merge(model.graphdef, params).extend(ids, positions, cache)[0]

    return step, (model.params, ids, positions, cache)
