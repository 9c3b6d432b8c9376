"""BERT (arXiv 1810.04805) and what publishes as it: MiniLM, BGE, E5, cross-encoders; without a head, as a classifier of texts
or of tokens, and as a masked language model.

Published as `BertModel` and `BertFor...`; parameter paths are its names. RoBERTa has the same blocks and other heads
(`models.roberta`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

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

# Checkpoints for pretraining carry both along.
_OTHER_TASKS = re.compile(r"^(\w+\.)?pooler\.|^cls\.seq_relationship\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """A BERT configuration."""

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "BertConfig":
        """Read a `config.json` of `model_type` "bert", with transformers' defaults for what it leaves out.

        Raises:
            QuikError: a field is missing, asks for mathematics that this family does not have (positions relative to each other),
                or the model has a head that is none of ours.
        """
        known = Fields(fields, "BERT")
        # Google's first configurations describe the pooler of another task.
        known.only("directionality", "bidi")
        known.only("pooler_type", "first_token_transform")
        for name in ("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"):
            known.optional(name)
        head = published_head(known, ("Bert",))
        config = cls(**shared_fields(known, head, eps=1e-12), head=head, **published_labels(known, head))
        known.finish(causal=False)
        return config


def shared_fields(known: Fields, head: str, *, eps: float, unused_positions: int = 0) -> dict[str, Any]:
    """The fields that BERT and RoBERTa publish under the same names.

    `unused_positions` rows of the position table belong to no token.

    Raises:
        QuikError: a field is missing, or asks for mathematics that these families do not have.
    """
    known.only("position_embedding_type", "absolute")
    known.only("hidden_act", "gelu", *ACTIVATIONS)
    if head == MASKED_LM:
        known.only("tie_word_embeddings", True)
    known.optional("tie_word_embeddings")
    # What sentence-transformers notes for its own calls, and a cache's first name; logits are the same.
    for name in ("sentence_transformers", "sbert_ce_default_activation_function", "output_past"):
        known.optional(name)
    hidden, heads = known.integer("hidden_size"), known.integer("num_attention_heads")
    if hidden % heads:
        raise QuikError(f"{known.family}'s hidden_size {hidden} is not a multiple of its num_attention_heads {heads}")
    positions = known.integer("max_position_embeddings", 512) - unused_positions
    return {
        "vocab_size": known.integer("vocab_size"),
        "hidden_size": hidden,
        "layers": known.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_size": hidden // heads,
        "context_length": positions,
        "learned_positions": positions,
        "unused_positions": unused_positions,
        "intermediate_size": known.integer("intermediate_size"),
        "norm_eps": known.number("layer_norm_eps", eps),
        "token_types": known.integer("type_vocab_size", 2),
        "activation": known.optional("hidden_act", "gelu"),
    }


class BertSelfAttention(nnx.Module):
    """Queries, keys and values."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        width = config.hidden_size
        self.query = Linear(width, width, bias=True, dtype=dtype)
        self.key = Linear(width, width, bias=True, dtype=dtype)
        self.value = Linear(width, width, bias=True, dtype=dtype)


class BertOutput(nnx.Module):
    """The last layer of attention or of the MLP, and the norm behind its sum with what came in."""

    def __init__(self, config: EncoderConfig, inputs: int, *, dtype: Any) -> None:
        self.dense = Linear(inputs, config.hidden_size, bias=True, dtype=dtype)
        self.LayerNorm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)


class BertAttention(nnx.Module):
    """Attention under its two published names."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.self = BertSelfAttention(config, dtype=dtype)
        self.output = BertOutput(config, config.hidden_size, dtype=dtype)


class BertIntermediate(nnx.Module):
    """The MLP's first layer."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.dense = Linear(config.hidden_size, config.intermediate_size, bias=True, dtype=dtype)


class BertBlock(EncoderBlock):
    """An encoder's block under BERT's names."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention_output": ("attention.output.dense",),
        "mlp_input": ("intermediate.dense",),
        "mlp_output": ("output.dense",),
    }

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        super().__init__(config)
        self.attention = BertAttention(config, dtype=dtype)
        self.intermediate = BertIntermediate(config, dtype=dtype)
        self.output = BertOutput(config, config.intermediate_size, dtype=dtype)

    def layers(self) -> BlockLayers:
        reads, writes = self.attention.self, self.attention.output
        return BlockLayers(
            reads.query,
            reads.key,
            reads.value,
            writes.dense,
            writes.LayerNorm,
            self.intermediate.dense,
            self.output.dense,
            self.output.LayerNorm,
        )


class BertBlocks(nnx.Module):
    """The blocks under their published name."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.layer = nnx.Dict({str(i): BertBlock(config, dtype=dtype) for i in range(config.layers)})


class BertPooler(nnx.Module):
    """`tanh(dense(first token))`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)

    def __call__(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch hidden"]:
        return jnp.tanh(self.dense(first_token(hidden, positions)))


class BertCore(nnx.Module):
    """Tables, blocks and, where it is used, the pooler."""

    def __init__(self, config: EncoderConfig, *, pooler: bool, dtype: Any) -> None:
        self.embeddings = Embeddings(config, dtype=dtype)
        self.encoder = BertBlocks(config, dtype=dtype)
        self.pooler = BertPooler(config, dtype=dtype) if pooler else None


class BertModel(BertCore, Encoder):
    """BERT without a head: the last block's output, and the pooler's."""

    block_path = ("encoder", "layer")
    prefix = "bert"

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, pooler=True, dtype=dtype)
        self.config = config

    @property
    def tables(self) -> Embeddings:
        return self.embeddings

    def head(self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]) -> Encoded:
        assert self.pooler is not None
        return Encoded(hidden, self.pooler(hidden, positions))


class BertWithHead(Encoder):
    """BERT below a head of any kind."""

    block_path = ("bert", "encoder", "layer")
    prefix = "bert"

    def __init__(self, config: EncoderConfig, *, pooler: bool = False, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.bert = BertCore(config, pooler=pooler, dtype=dtype)

    @classmethod
    def is_of_other_task(cls, name: str) -> bool:
        return _OTHER_TASKS.search(name) is not None

    @property
    def tables(self) -> Embeddings:
        return self.bert.embeddings


class BertForSequenceClassification(BertWithHead):
    """A classifier of texts: float32 logits `[batch, labels]` from the pooler."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, pooler=True, dtype=dtype)
        self.classifier = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)

    @classmethod
    def is_of_other_task(cls, name: str) -> bool:
        return False

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch labels"]:
        assert self.bert.pooler is not None
        return logits(self.bert.pooler(hidden, positions), self.classifier)


class BertForTokenClassification(BertWithHead):
    """A classifier of tokens: float32 logits `[batch, length, labels]`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.classifier = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length labels"]:
        return logits(hidden, self.classifier)


class BertTransform(nnx.Module):
    """`LayerNorm(activation(dense(x)))`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.activation = config.activation
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)
        self.LayerNorm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        return self.LayerNorm(ACTIVATIONS[self.activation](self.dense(x)))


class BertPredictions(nnx.Module):
    """Layers that make the masked language model's logits beside the token table, to which its matrix is tied."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.transform = BertTransform(config, dtype=dtype)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))


class BertHeads(nnx.Module):
    """The head under its published name."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.predictions = BertPredictions(config, dtype=dtype)


class BertForMaskedLM(BertWithHead):
    """A masked language model: float32 logits `[batch, length, vocab]` of the token that stands at each place."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.cls = BertHeads(config, dtype=dtype)

    @classmethod
    def repeated(cls) -> dict[str, str]:
        return {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length vocab"]:
        last = self.cls.predictions
        table = self.tables.word_embeddings.weight.get_value()
        return unembed(last.transform(hidden), table) + last.bias.get_value().astype(jnp.float32)


_CLASSES: dict[str, type[Encoder]] = {
    "Model": BertModel,
    CLASSIFIER: BertForSequenceClassification,
    TAGGER: BertForTokenClassification,
    MASKED_LM: BertForMaskedLM,
}


def build_bert(config: EncoderConfig, *, dtype: Any = jnp.float32) -> Encoder:
    """The BERT that a configuration describes, with its head."""
    return _CLASSES[config.head](config, dtype=dtype)  # type: ignore[call-arg]
