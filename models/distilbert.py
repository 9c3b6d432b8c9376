"""DistilBERT (arXiv 1910.01108): BERT's block under other names, without token types and without a pooler.

Published as `DistilBertModel` and `DistilBertFor...`; parameter paths are its names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from quikjax.errors import QuikError
from quikjax.models.activations import ACTIVATIONS
from quikjax.models.base import LayerNorm, Linear, unembed
from quikjax.models.encoder import (
    CLASSIFIER,
    MASKED_LM,
    TAGGER,
    BlockLayers,
    Embeddings,
    Encoded,
    Encoder,
    EncoderBlock,
    EncoderConfig,
    first_token,
    logits,
    published_head,
    published_labels,
)
from quikjax.models.published import Fields

_EPS = 1e-12  # not published


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(EncoderConfig):
    """A DistilBERT configuration."""

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "DistilBertConfig":
        """Read a `config.json` of `model_type` "distilbert", with transformers' defaults for what it leaves out.

        Raises:
            QuikError: a field is missing, asks for mathematics that this family does not have, or the model has a head that is
                none of ours.
        """
        known = Fields(fields, "DistilBERT")
        head = published_head(known, ("DistilBert",))
        known.only("activation", "gelu", *ACTIVATIONS)
        if head == MASKED_LM:
            known.only("tie_word_embeddings", True)
        # The table's first values, which training has replaced; dropout; and what older versions call the tied table.
        for name in ("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_", "tie_word_embeddings"):
            known.optional(name)
        known.optional("sentence_transformers")
        hidden, heads = known.integer("dim", 768), known.integer("n_heads", 12)
        if hidden % heads:
            raise QuikError(f"DistilBERT's dim {hidden} is not a multiple of its n_heads {heads}")
        positions = known.integer("max_position_embeddings", 512)
        config = cls(
            vocab_size=known.integer("vocab_size", 30522),
            hidden_size=hidden,
            layers=known.integer("n_layers", 6),
            heads=heads,
            kv_heads=heads,
            head_size=hidden // heads,
            context_length=positions,
            learned_positions=positions,
            intermediate_size=known.integer("hidden_dim", 4 * 768),
            norm_eps=_EPS,
            activation=known.optional("activation", "gelu"),
            head=head,
            **published_labels(known, head),
        )
        known.finish(causal=False)
        return config


class DistilBertAttention(nnx.Module):
    """Queries, keys, values, and the layer behind them."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        width = config.hidden_size
        self.q_lin = Linear(width, width, bias=True, dtype=dtype)
        self.k_lin = Linear(width, width, bias=True, dtype=dtype)
        self.v_lin = Linear(width, width, bias=True, dtype=dtype)
        self.out_lin = Linear(width, width, bias=True, dtype=dtype)


class DistilBertMLP(nnx.Module):
    """`lin2(activation(lin1(x)))`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.lin1 = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype)
        self.lin2 = Linear(config.intermediate_size, config.hidden_size, bias=True, dtype=dtype)


class DistilBertBlock(EncoderBlock):
    """An encoder's block under DistilBERT's names."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention_output": ("attention.out_lin",),
        "mlp_input": ("ffn.lin1",),
        "mlp_output": ("ffn.lin2",),
    }

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        super().__init__(config)
        self.attention = DistilBertAttention(config, dtype=dtype)
        self.sa_layer_norm = LayerNorm(config.hidden_size, _EPS, dtype=dtype)
        self.ffn = DistilBertMLP(config, dtype=dtype)
        self.output_layer_norm = LayerNorm(config.hidden_size, _EPS, dtype=dtype)

    def layers(self) -> BlockLayers:
        attention, mlp = self.attention, self.ffn
        return BlockLayers(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            self.sa_layer_norm,
            mlp.lin1,
            mlp.lin2,
            self.output_layer_norm,
        )


class DistilBertBlocks(nnx.Module):
    """The blocks under their published name."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.layer = nnx.Dict({str(i): DistilBertBlock(config, dtype=dtype) for i in range(config.layers)})


class DistilBertCore(nnx.Module):
    """Tables and blocks."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.embeddings = Embeddings(config, dtype=dtype)
        self.transformer = DistilBertBlocks(config, dtype=dtype)


class DistilBertModel(DistilBertCore, Encoder):
    """DistilBERT without a head: the last block's output."""

    block_path = ("transformer", "layer")
    prefix = "distilbert"

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.config = config

    @property
    def tables(self) -> Embeddings:
        return self.embeddings

    def head(self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]) -> Encoded:
        return Encoded(hidden, None)


class DistilBertWithHead(Encoder):
    """DistilBERT below a head of any kind."""

    block_path = ("distilbert", "transformer", "layer")
    prefix = "distilbert"

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.distilbert = DistilBertCore(config, dtype=dtype)

    @property
    def tables(self) -> Embeddings:
        return self.distilbert.embeddings


class DistilBertForSequenceClassification(DistilBertWithHead):
    """A classifier of texts: float32 logits `[batch, labels]`, `classifier(relu(pre_classifier(first token)))`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.pre_classifier = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)
        self.classifier = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch labels"]:
        return logits(jax.nn.relu(self.pre_classifier(first_token(hidden, positions))), self.classifier)


class DistilBertForTokenClassification(DistilBertWithHead):
    """A classifier of tokens: float32 logits `[batch, length, labels]`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.classifier = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length labels"]:
        return logits(hidden, self.classifier)


class VocabularyBias(nnx.Module):
    """The bias of a layer whose matrix is the token table."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))


class DistilBertForMaskedLM(DistilBertWithHead):
    """A masked language model: float32 logits `[batch, length, vocab]` of the token that stands at each place."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.vocab_transform = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)
        self.vocab_layer_norm = LayerNorm(config.hidden_size, _EPS, dtype=dtype)
        self.vocab_projector = VocabularyBias(config, dtype=dtype)

    @classmethod
    def repeated(cls) -> dict[str, str]:
        return {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length vocab"]:
        x = self.vocab_layer_norm(ACTIVATIONS[self.config.activation](self.vocab_transform(hidden)))
        bias = self.vocab_projector.bias.get_value()
        return unembed(x, self.tables.word_embeddings.weight.get_value()) + bias.astype(jnp.float32)


_CLASSES: dict[str, type[Encoder]] = {
    "Model": DistilBertModel,
    CLASSIFIER: DistilBertForSequenceClassification,
    TAGGER: DistilBertForTokenClassification,
    MASKED_LM: DistilBertForMaskedLM,
}


def build_distilbert(config: EncoderConfig, *, dtype: Any = jnp.float32) -> Encoder:
    """The DistilBERT that a configuration describes, with its head."""
    return _CLASSES[config.head](config, dtype=dtype)  # type: ignore[call-arg]
