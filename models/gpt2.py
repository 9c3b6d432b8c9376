"""GPT-2 (Radford et al., 2019) in every size, and what publishes as it: DistilGPT-2, DialoGPT, Cerebras-GPT, Stanford's CRFM.

Published as `GPT2LMHeadModel`; parameter paths are its names. Checkpoints hold the layers of a block as `Conv1D`, `[inputs,
outputs]`; here they are `[outputs, inputs]` as everywhere, and are turned on the way in and out (`lies_transposed`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.models.activations import ACTIVATIONS, activated
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
    unembed,
)
from quikjax.models.cache import BlockCache
from quikjax.models.published import Fields

_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """A GPT-2 configuration.

    `learned_positions` are those that the position table has rows for. Scores are divided by the square root of a head's size
    where `scale_by_size` says so, and by the block's number (the first is 1) where `scale_by_depth` does.
    """

    intermediate_size: int
    learned_positions: int
    norm_eps: float
    activation: str = "gelu_new"
    scale_by_size: bool = True
    scale_by_depth: bool = False
    tied: bool = True

    @property
    def last_position(self) -> int:
        return self.learned_positions

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "GPT2Config":
        """Read a `config.json` of `model_type` "gpt2", with transformers' defaults for what it leaves out.

        Raises:
            QuikError: a field is missing, asks for mathematics that this family does not have, or the model has another head than
                the language model's.
        """
        known = Fields(fields, "GPT-2")
        known.only_architectures("GPT2LMHeadModel", "GPT2Model")
        known.only("activation_function", "gelu_new", *ACTIVATIONS)
        # The order of the product and its type: scores are float32 here in any case.
        known.flag("reorder_and_upcast_attn", False)
        known.optional("n_ctx")  # the length of the causal mask that checkpoints carry along
        hidden, heads = known.integer("n_embd"), known.integer("n_head")
        if hidden % heads:
            raise QuikError(f"GPT-2's n_embd {hidden} is not a multiple of its n_head {heads}")
        positions = known.integer("n_positions", 1024)
        config = cls(
            vocab_size=known.integer("vocab_size"),
            hidden_size=hidden,
            layers=known.integer("n_layer"),
            heads=heads,
            kv_heads=heads,
            head_size=hidden // heads,
            context_length=positions,
            intermediate_size=known.integer("n_inner", 4 * hidden),
            learned_positions=positions,
            norm_eps=known.number("layer_norm_epsilon", 1e-5),
            activation=known.optional("activation_function", "gelu_new"),
            scale_by_size=known.flag("scale_attn_weights", True),
            scale_by_depth=known.flag("scale_attn_by_inverse_layer_idx", False),
            tied=known.flag("tie_word_embeddings", True),
        )
        known.finish()
        return config


class GPT2Attention(nnx.Module):
    """Attention over one product that gives queries, keys and values, each of all heads. `scale` multiplies the scores."""

    def __init__(self, config: GPT2Config, depth: int, *, dtype: Any) -> None:
        self.config = config
        self.scale = (config.head_size**-0.5 if config.scale_by_size else 1.0) / (depth if config.scale_by_depth else 1)
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, bias=True, dtype=dtype)
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)

    def mix(
        self, fused: Float[Array, "batch length fused"], positions: Positions, cache: BlockCache | None, observe: Observe | None
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        """From the fused projection to what `c_proj` reads."""
        batch, length, _ = fused.shape
        thirds = fused.reshape(batch, length, 3, self.config.heads, self.config.head_size)
        query, key, value = thirds[:, :, 0], thirds[:, :, 1], thirds[:, :, 2]
        mixed, written = attend(query, key, value, positions, cache, scale=self.scale, observe=observe)
        return mixed.reshape(batch, length, -1), written


class GPT2MLP(nnx.Module):
    """`c_proj(activation(c_fc(x)))`."""

    def __init__(self, config: GPT2Config, *, dtype: Any) -> None:
        self.c_fc = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype)
        self.c_proj = Linear(config.intermediate_size, config.hidden_size, bias=True, dtype=dtype)


class GPT2Block(Block):
    """Attention and MLP, each behind its norm and with its residual. `depth` counts from 1."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("attn.c_attn",),
        "attention_output": ("attn.c_proj",),
        "mlp_input": ("mlp.c_fc",),
        "mlp_output": ("mlp.c_proj",),
    }

    def __init__(self, config: GPT2Config, depth: int, *, dtype: Any) -> None:
        self.activation = config.activation
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.attn = GPT2Attention(config, depth, dtype=dtype)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = GPT2MLP(config, dtype=dtype)

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        see = observer(observe)
        attention, mlp = self.attn, self.mlp

        x = see("attention_input", self.ln_1.of(hidden))
        mixed, written = attention.mix(attention.c_attn(x), positions, cache, observe)
        hidden = attention.c_proj(see("attention_output", mixed), onto=hidden)

        x = see("mlp_input", self.ln_2.of(hidden))
        x = see("mlp_output", activated(self.activation, mlp.c_fc(x)))
        return mlp.c_proj(x, onto=hidden), written


class GPT2Model(nnx.Module):
    """Token and position tables, blocks and final norm, under their published names."""

    def __init__(self, config: GPT2Config, *, dtype: Any) -> None:
        self.wte = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.wpe = Embedding(config.learned_positions, config.hidden_size, dtype=dtype)
        self.h = nnx.Dict({str(i): GPT2Block(config, i + 1, dtype=dtype) for i in range(config.layers)})
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)


class GPT2LMHeadModel(CausalLM):
    """GPT-2 with its head, the token table's transpose where the two are tied.

    Blocks whose scores are scaled by their depth are not alike: each is compiled for itself.
    """

    block_path = ("transformer", "h")
    config: GPT2Config

    def __init__(self, config: GPT2Config, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.transformer = GPT2Model(config, dtype=dtype)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)

    @classmethod
    def lies_transposed(cls, path: str) -> bool:
        return _CONV1D.search(path) is not None

    def embed(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        # Positions that were never learned give NaN, not the last row that was.
        table = self.transformer.wpe.weight.get_value()
        return self.transformer.wte(ids) + jnp.take(table, positions, axis=0, mode="fill", fill_value=jnp.nan)

    def head(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        table = self.transformer.wte if self.lm_head is None else self.lm_head
        return unembed(self.transformer.ln_f(hidden), table.weight.get_value())
