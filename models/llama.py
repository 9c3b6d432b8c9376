"""LLaMA and what publishes under its `model_type` (LLaMA 1-3, SmolLM, TinyLlama): RMSNorm, rotary attention, gated MLP.

Published as `LlamaForCausalLM`; parameter paths are its names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.models.attention import attend
from quikjax.models.base import (
    Block,
    CausalLM,
    Config,
    Embedding,
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
from quikjax.pallas_kernels import api
from quikjax.weights.linear import Produced


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """A LLaMA configuration."""

    intermediate_size: int
    norm_eps: float
    rope: Rope = dataclasses.field(default_factory=Rope)
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """Read a `config.json` of `model_type` "llama", with transformers' defaults for what it leaves out.

        Raises:
            QuikError: a field is missing, or asks for mathematics that this family does not have.
        """
        known = Fields(fields, "LLaMA")
        known.only("hidden_act", "silu", "swish")  # two names of one function
        known.only("rope_interleaved", False)
        hidden, heads = known.integer("hidden_size"), known.integer("num_attention_heads")
        kv_heads = known.integer("num_key_value_heads", heads)
        if known.optional("head_dim") is None and hidden % heads:
            raise QuikError(f"LLaMA's hidden_size {hidden} is not a multiple of its num_attention_heads {heads}")
        head_size = known.integer("head_dim", hidden // heads)
        if heads % kv_heads:
            raise QuikError(f"LLaMA's num_attention_heads {heads} is not a multiple of its num_key_value_heads {kv_heads}")
        if head_size % 2:
            raise QuikError(f"LLaMA's heads of size {head_size} cannot be rotated in pairs")
        rope, reach = published_rope(known, known.integer("max_position_embeddings", 2048))
        config = cls(
            vocab_size=known.integer("vocab_size"),
            hidden_size=hidden,
            layers=known.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            # LongChat and Vicuna publish under this name what their stretched positions reach.
            context_length=max(reach, known.integer("max_sequence_length", reach)),
            intermediate_size=known.integer("intermediate_size"),
            norm_eps=known.number("rms_norm_eps", 1e-6),
            rope=rope,
            tied=known.flag("tie_word_embeddings", False),
            attention_bias=known.flag("attention_bias", False),
            mlp_bias=known.flag("mlp_bias", False),
        )
        known.finish()
        return config


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, computed in float32."""

    def __init__(self, width: int, eps: float, *, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return self.of(x).value()

    def of(self, x: Float[Array, "*batch width"]) -> Produced:
        """The normalized tensor, not yet computed."""
        return Produced(api.RmsNorm(self.eps), (x,), (self.weight.get_value(),))


class LlamaAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        self.config = config
        bias, size = config.attention_bias, config.head_size
        self.q_proj = Linear(config.hidden_size, config.heads * size, bias=bias, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, config.kv_heads * size, bias=bias, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, config.kv_heads * size, bias=bias, dtype=dtype)
        self.o_proj = Linear(config.heads * size, config.hidden_size, bias=bias, dtype=dtype)


class LlamaMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, wide, bias=bias, dtype=dtype)
        self.up_proj = Linear(hidden, wide, bias=bias, dtype=dtype)
        self.down_proj = Linear(wide, hidden, bias=bias, dtype=dtype)


class LlamaBlock(Block):
    """Norm, attention, residual; norm, gated MLP, residual."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_output": ("self_attn.o_proj",),
        "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_output": ("mlp.down_proj",),
    }

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype)

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        see = observer(observe)
        attention, mlp = self.self_attn, self.mlp
        config = attention.config

        x = see("attention_input", self.input_layernorm.of(hidden))
        query, key, value = (
            y.reshape(*y.shape[:-1], -1, config.head_size)
            for y in project(x, attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed, written = attend(
            query, key, value, positions, cache, scale=config.head_size**-0.5, rope=config.rope, observe=observe
        )
        x = see("attention_output", mixed.reshape(*hidden.shape[:-1], -1))
        hidden = attention.o_proj(x, onto=hidden)

        x = see("mlp_input", self.post_attention_layernorm.of(hidden))
        gate, up = project(x, mlp.gate_proj, mlp.up_proj)
        x = see("mlp_output", Produced(api.SiluMul(), (gate, up)))
        return mlp.down_proj(x, onto=hidden), written


class LlamaModel(nnx.Module):
    """Embedding, blocks and final norm, under their published names."""

    def __init__(self, config: LlamaConfig, *, dtype: Any) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.Dict({str(i): LlamaBlock(config, dtype=dtype) for i in range(config.layers)})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)


class LlamaForCausalLM(CausalLM):
    """LLaMA with its head; the head is the embedding's transpose where the two are tied."""

    block_path = ("model", "layers")
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.model = LlamaModel(config, dtype=dtype)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    def embed(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        return self.model.embed_tokens(ids)

    def head(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        table = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return unembed(self.model.norm(hidden), table.weight.get_value())
