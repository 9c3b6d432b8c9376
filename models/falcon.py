"""Falcon (arXiv 2311.16867): one fused projection for queries, keys and values, and three ways to arrange a block.

- RW-1B: attention, then MLP, a norm before each; ALiBi, biases, as many keys as queries.
- 7B and 11B: attention and MLP side by side behind one norm; rotary; one key head, or (11B) one for each group of queries.
- 40B and 180B: side by side, a norm for each; rotary, grouped queries.

Published as `FalconForCausalLM`; parameter paths are its names.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.models.activations import activated
from quikjax.models.attention import attend
from quikjax.models.base import (
    Block,
    CausalLM,
    Config,
    Embedding,
    LayerNorm,
    Linear,
    Observe,
    Positions,
    observer,
    project,
    unembed,
)
from quikjax.models.cache import BlockCache
from quikjax.models.published import Fields
from quikjax.models.rope import Rope, published_rope

FIRST_TYPES = ("RefinedWeb", "RefinedWebModel")
_FIRST_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig(Config):
    """A Falcon configuration. `norms` counts those of a block; `rope` is None where ALiBi tells positions apart.

    The fused projection holds groups of queries with their key and value behind them: `kv_heads` groups of
    `heads / kv_heads + 2` heads. Multi-query (one group) and multi-head (a query, a key, a value, and so on) are its two ends.
    """

    intermediate_size: int
    norm_eps: float
    parallel: bool
    norms: int
    rope: Rope | None
    bias: bool = False
    tied: bool = True

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "FalconConfig":
        """Read a `config.json` of `model_type` "falcon", with transformers' defaults for what it leaves out.

        "RefinedWeb" and "RefinedWebModel", as Falcon and many models tuned from it were first published, are read too.

        Raises:
            QuikError: a field is missing, or asks for mathematics that this family does not have.
        """
        if str(fields.get("model_type")) in FIRST_TYPES:
            # What had several key heads was the new architecture, before it had a field of its own.
            fields = {_FIRST_NAMES.get(name, name): value for name, value in fields.items()}
            fields = {"new_decoder_architecture": "num_kv_heads" in fields, **fields}
        known = Fields(fields, "Falcon")
        known.only("activation", "gelu", "gelu_python")  # the exact one, under two names
        known.only("apply_residual_connection_post_layernorm", False)
        hidden, heads = known.integer("hidden_size"), known.integer("num_attention_heads")
        if hidden % heads:
            raise QuikError(f"Falcon's hidden_size {hidden} is not a multiple of its num_attention_heads {heads}")
        intermediate = known.integer("ffn_hidden_size", 4 * hidden)
        known.only("ff_factor", intermediate / hidden)

        grouped = known.flag("new_decoder_architecture", False)
        parallel = known.flag("parallel_attn", True)
        norms = _norms(known, grouped, parallel)
        # The old architecture publishes num_kv_heads too, and does not read it; the new one does so with multi_query.
        multi_query, kv_heads = known.flag("multi_query", True), known.integer("num_kv_heads", heads)
        if not grouped:
            kv_heads = 1 if multi_query else heads
        if heads % kv_heads:
            raise QuikError(f"Falcon's num_attention_heads {heads} is not a multiple of its num_kv_heads {kv_heads}")
        rope, reach = published_rope(known, known.integer("max_position_embeddings", 2048))
        alibi = known.flag("alibi", False)
        if not alibi and hidden // heads % 2:
            raise QuikError(f"Falcon's heads of size {hidden // heads} cannot be rotated in pairs")
        config = cls(
            vocab_size=known.integer("vocab_size"),
            hidden_size=hidden,
            layers=known.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=hidden // heads,
            context_length=reach,
            intermediate_size=intermediate,
            norm_eps=known.number("layer_norm_epsilon", 1e-5),
            parallel=parallel,
            norms=norms,
            rope=None if alibi else rope,
            bias=known.flag("bias", False),
            tied=known.flag("tie_word_embeddings", True),
        )
        known.finish()
        return config


def _norms(known: Fields, grouped: bool, parallel: bool) -> int:
    """Count the norms of a block. Combinations for which transformers makes norms that it then does not find are refused."""
    if grouped and not parallel:
        raise QuikError("Falcon with new_decoder_architecture is always parallel, but its parallel_attn is false")
    if not parallel:
        known.only("num_ln_in_parallel_attn", None)
        return 2
    norms = known.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms not in ((1, 2) if grouped else (1,)):
        raise QuikError(
            f"Falcon with num_ln_in_parallel_attn {norms} is not supported, only 1, or 2 with new_decoder_architecture"
        )
    return norms


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head (arXiv 2108.12409), float32 `[heads]`: powers of `2^(-8/n)`, `n` the power of two up to `heads`.

    Heads beyond `n` take the odd powers of the series for `2n`.
    """
    near = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / near) for i in range(1, near + 1)]
    slopes += [2.0 ** (-4.0 * i / near) for i in range(1, 2 * (heads - near), 2)]
    return np.asarray(slopes, np.float32)


class FalconAttention(nnx.Module):
    """Attention over a fused projection."""

    def __init__(self, config: FalconConfig, *, dtype: Any) -> None:
        self.config = config
        outputs = (config.heads + 2 * config.kv_heads) * config.head_size
        self.query_key_value = Linear(config.hidden_size, outputs, bias=config.bias, dtype=dtype)
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.bias, dtype=dtype)

    def mix(
        self, fused: Float[Array, "batch length fused"], positions: Positions, cache: BlockCache | None, observe: Observe | None
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        """From the fused projection to what `dense` reads."""
        config = self.config
        batch, length, _ = fused.shape
        groups = fused.reshape(batch, length, config.kv_heads, -1, config.head_size)
        query = groups[..., :-2, :].reshape(batch, length, config.heads, config.head_size)
        key, value = groups[..., -2, :], groups[..., -1, :]
        slopes = jnp.asarray(alibi_slopes(config.heads)) if config.rope is None else None
        mixed, written = attend(
            query,
            key,
            value,
            positions,
            cache,
            scale=config.head_size**-0.5,
            slopes=slopes,
            rope=config.rope,
            observe=observe,
        )
        return mixed.reshape(batch, length, -1), written


class FalconMLP(nnx.Module):
    """`dense_4h_to_h(gelu(dense_h_to_4h(x)))`, with the exact GELU."""

    def __init__(self, config: FalconConfig, *, dtype: Any) -> None:
        hidden, wide = config.hidden_size, config.intermediate_size
        self.dense_h_to_4h = Linear(hidden, wide, bias=config.bias, dtype=dtype)
        self.dense_4h_to_h = Linear(wide, hidden, bias=config.bias, dtype=dtype)


class FalconBlock(Block):
    """Two norms, side by side (40B, 180B). The other arrangements are its subclasses."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("self_attention.query_key_value",),
        "attention_output": ("self_attention.dense",),
        "mlp_input": ("mlp.dense_h_to_4h",),
        "mlp_output": ("mlp.dense_4h_to_h",),
    }
    # The published names of its norms; which of them there are is what sets the arrangements apart.
    norms: ClassVar[tuple[str, ...]] = ("ln_attn", "ln_mlp")
    ln_attn: LayerNorm
    ln_mlp: LayerNorm
    input_layernorm: LayerNorm
    post_attention_layernorm: LayerNorm

    def __init__(self, config: FalconConfig, *, dtype: Any) -> None:
        for name in self.norms:
            setattr(self, name, LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype))
        self.self_attention = FalconAttention(config, dtype=dtype)
        self.mlp = FalconMLP(config, dtype=dtype)

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        see = observer(observe)
        attention, mlp = self.self_attention, self.mlp

        x = see("attention_input", self.ln_attn.of(hidden))
        mixed, written = attention.mix(attention.query_key_value(x), positions, cache, observe)
        attended = attention.dense(see("attention_output", mixed))

        x = see("mlp_input", self.ln_mlp.of(hidden))
        x = see("mlp_output", activated("gelu", mlp.dense_h_to_4h(x)))
        return hidden + mlp.dense_4h_to_h(x, onto=attended), written


class FalconOneNormBlock(FalconBlock):
    """One norm, side by side (7B, 11B): the fused projection and the MLP's first layer read the same tensor."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "block_input": ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        "attention_output": ("self_attention.dense",),
        "mlp_output": ("mlp.dense_4h_to_h",),
    }
    norms = ("input_layernorm",)

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        see = observer(observe)
        attention, mlp = self.self_attention, self.mlp

        x = see("block_input", self.input_layernorm.of(hidden))
        fused, wide = project(x, attention.query_key_value, mlp.dense_h_to_4h)
        mixed, written = attention.mix(fused, positions, cache, observe)
        attended = attention.dense(see("attention_output", mixed))
        x = see("mlp_output", activated("gelu", wide))
        return hidden + mlp.dense_4h_to_h(x, onto=attended), written


class FalconSequentialBlock(FalconBlock):
    """Attention, then MLP (RW-1B): the second norm reads what attention added."""

    norms = ("input_layernorm", "post_attention_layernorm")

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        see = observer(observe)
        attention, mlp = self.self_attention, self.mlp

        x = see("attention_input", self.input_layernorm.of(hidden))
        mixed, written = attention.mix(attention.query_key_value(x), positions, cache, observe)
        hidden = attention.dense(see("attention_output", mixed), onto=hidden)

        x = see("mlp_input", self.post_attention_layernorm.of(hidden))
        x = see("mlp_output", activated("gelu", mlp.dense_h_to_4h(x)))
        return mlp.dense_4h_to_h(x, onto=hidden), written


class FalconModel(nnx.Module):
    """Embedding, blocks and final norm, under their published names."""

    def __init__(self, config: FalconConfig, *, dtype: Any) -> None:
        kind: type[FalconBlock] = (
            FalconSequentialBlock if not config.parallel else FalconBlock if config.norms == 2 else FalconOneNormBlock
        )
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.h = nnx.Dict({str(i): kind(config, dtype=dtype) for i in range(config.layers)})
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)


class FalconForCausalLM(CausalLM):
    """Falcon with its head; the head is the embedding's transpose where the two are tied (all but 11B)."""

    block_path = ("transformer", "h")
    config: FalconConfig

    def __init__(self, config: FalconConfig, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.transformer = FalconModel(config, dtype=dtype)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def embed(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        return self.transformer.word_embeddings(ids)

    def head(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        table = self.transformer.word_embeddings if self.lm_head is None else self.lm_head
        return unembed(self.transformer.ln_f(hidden), table.weight.get_value())
