"""OPT (arXiv 2205.01068), every size: learned positions, biases, ReLU; 350m normalizes behind each half and projects embeddings.

Published as `OPTForCausalLM`; parameter paths are its names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
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

# The first rows of the position table belong to fairseq's padding index and are never used by a real token.
_OFFSET = 2
_EPS = 1e-5  # not published: PyTorch's default


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    """An OPT configuration. `hidden_size` is the blocks' width, `embedding_size` that of the token table and the head.

    `learned_positions` are those that the position table has rows for.
    """

    intermediate_size: int
    embedding_size: int
    learned_positions: int
    activation: str = "relu"
    norm_first: bool = True
    final_norm: bool = True
    affine_norms: bool = True
    bias: bool = True
    tied: bool = True

    @property
    def last_position(self) -> int:
        return self.learned_positions

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "OPTConfig":
        """Read a `config.json` of `model_type` "opt", with transformers' defaults for what it leaves out.

        Raises:
            QuikError: a field is missing, or asks for mathematics that this family does not have.
        """
        known = Fields(fields, "OPT")
        known.only("activation_function", "relu", "gelu", "gelu_python")  # GELU, under two names, is Galactica's
        known.only("learned_embeddings", True)
        known.only("scale_embeddings", False)
        known.optional("output_projection")  # whether metaseq kept a second copy of the tied head
        hidden, heads = known.integer("hidden_size"), known.integer("num_attention_heads")
        if hidden % heads:
            raise QuikError(f"OPT's hidden_size {hidden} is not a multiple of its num_attention_heads {heads}")
        norm_first = known.flag("do_layer_norm_before", True)
        removed = known.flag("_remove_final_layer_norm", False)
        positions = known.integer("max_position_embeddings", 2048)
        config = cls(
            vocab_size=known.integer("vocab_size"),
            hidden_size=hidden,
            layers=known.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=heads,
            head_size=hidden // heads,
            context_length=positions,
            intermediate_size=known.integer("ffn_dim"),
            learned_positions=positions,
            embedding_size=known.integer("word_embed_proj_dim", hidden),
            activation=known.optional("activation_function", "relu"),
            norm_first=norm_first,
            final_norm=norm_first and not removed,
            affine_norms=known.flag("layer_norm_elementwise_affine", True),
            bias=known.flag("enable_bias", True),
            tied=known.flag("tie_word_embeddings", True),
        )
        known.finish()
        return config


class OPTAttention(nnx.Module):
    """Multi-head attention; positions are in the hidden state already."""

    def __init__(self, config: OPTConfig, *, dtype: Any) -> None:
        width, bias = config.hidden_size, config.bias
        self.q_proj = Linear(width, width, bias=bias, dtype=dtype)
        self.k_proj = Linear(width, width, bias=bias, dtype=dtype)
        self.v_proj = Linear(width, width, bias=bias, dtype=dtype)
        self.out_proj = Linear(width, width, bias=bias, dtype=dtype)


class OPTBlock(Block):
    """Attention and MLP, each with its residual; norms stand before the two, in 350m behind their sums."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_output": ("self_attn.out_proj",),
        "mlp_input": ("fc1",),
        "mlp_output": ("fc2",),
    }

    def __init__(self, config: OPTConfig, *, dtype: Any) -> None:
        self.config = config
        width, affine = config.hidden_size, config.affine_norms
        self.self_attn = OPTAttention(config, dtype=dtype)
        self.self_attn_layer_norm = LayerNorm(width, _EPS, affine=affine, dtype=dtype)
        self.fc1 = Linear(width, config.intermediate_size, bias=config.bias, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, width, bias=config.bias, dtype=dtype)
        self.final_layer_norm = LayerNorm(width, _EPS, affine=affine, dtype=dtype)

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        see = observer(observe)
        config, attention = self.config, self.self_attn

        x = see("attention_input", self.self_attn_layer_norm.of(hidden) if config.norm_first else hidden)
        query, key, value = (
            y.reshape(*y.shape[:-1], config.heads, config.head_size)
            for y in project(x, attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed, written = attend(query, key, value, positions, cache, scale=config.head_size**-0.5, observe=observe)
        x = see("attention_output", mixed.reshape(hidden.shape))
        hidden = attention.out_proj(x, onto=hidden)
        if not config.norm_first:
            hidden = self.self_attn_layer_norm(hidden)

        x = see("mlp_input", self.final_layer_norm.of(hidden) if config.norm_first else hidden)
        x = see("mlp_output", activated(config.activation, self.fc1(x)))
        hidden = self.fc2(x, onto=hidden)
        if not config.norm_first:
            hidden = self.final_layer_norm(hidden)
        return hidden, written


class OPTDecoder(nnx.Module):
    """Token and position tables, blocks, final norm and, where the tables are narrower than the blocks, the projections."""

    def __init__(self, config: OPTConfig, *, dtype: Any) -> None:
        hidden, narrow = config.hidden_size, config.embedding_size
        self.embed_tokens = Embedding(config.vocab_size, narrow, dtype=dtype)
        self.embed_positions = Embedding(config.learned_positions + _OFFSET, hidden, dtype=dtype)
        projected = narrow != hidden
        self.project_in = Linear(narrow, hidden, bias=False, dtype=dtype) if projected else None
        self.project_out = Linear(hidden, narrow, bias=False, dtype=dtype) if projected else None
        self.layers = nnx.Dict({str(i): OPTBlock(config, dtype=dtype) for i in range(config.layers)})
        affine = config.affine_norms
        self.final_layer_norm = LayerNorm(hidden, _EPS, affine=affine, dtype=dtype) if config.final_norm else None


class OPTModel(nnx.Module):
    """The decoder under its published name."""

    def __init__(self, config: OPTConfig, *, dtype: Any) -> None:
        self.decoder = OPTDecoder(config, dtype=dtype)


class OPTForCausalLM(CausalLM):
    """OPT with its head, the token table's transpose in every published size."""

    block_path = ("model", "decoder", "layers")
    config: OPTConfig

    def __init__(self, config: OPTConfig, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.model = OPTModel(config, dtype=dtype)
        self.lm_head = None if config.tied else Linear(config.embedding_size, config.vocab_size, bias=False, dtype=dtype)

    def embed(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        decoder = self.model.decoder
        tokens = decoder.embed_tokens(ids)
        if decoder.project_in is not None:
            tokens = decoder.project_in(tokens)
        # Positions that were never learned give NaN, not the last row that was.
        table = decoder.embed_positions.weight.get_value()
        return tokens + jnp.take(table, positions + _OFFSET, axis=0, mode="fill", fill_value=jnp.nan)

    def head(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        decoder = self.model.decoder
        if decoder.final_layer_norm is not None:
            hidden = decoder.final_layer_norm(hidden)
        if decoder.project_out is not None:
            hidden = decoder.project_out(hidden)
        table = decoder.embed_tokens if self.lm_head is None else self.lm_head
        return unembed(hidden, table.weight.get_value())
