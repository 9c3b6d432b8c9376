"""RoBERTa (arXiv 1907.11692) and what has its form: XLM-RoBERTa (arXiv 1911.02116), CamemBERT, multilingual E5.

Published as `RobertaModel` and `RobertaFor...`; parameter paths are its names. Blocks are BERT's; positions begin behind the
padding token's row, and the heads are others.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from quikjax.models.activations import ACTIVATIONS
from quikjax.models.base import LayerNorm, Linear, unembed
from quikjax.models.bert import BertCore, shared_fields
from quikjax.models.encoder import (
    CLASSIFIER,
    MASKED_LM,
    TAGGER,
    Embeddings,
    Encoded,
    Encoder,
    EncoderConfig,
    first_token,
    logits,
    published_head,
    published_labels,
)
from quikjax.models.published import Fields

# What a checkpoint of one task may carry along from another.
_OTHER_TASKS = re.compile(r"^(roberta\.)?pooler\.")
_CLASSES_OF = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """A RoBERTa configuration. The rows of the position table up to that of the padding token belong to no other token."""

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "RobertaConfig":
        """Read a `config.json` of `model_type` "roberta", "xlm-roberta" or "camembert", with transformers' defaults.

        Raises:
            QuikError: a field is missing, asks for mathematics that this family does not have (positions relative to each other),
                or the model has a head that is none of ours.
        """
        known = Fields(fields, "RoBERTa")
        head = published_head(known, ("Roberta", _CLASSES_OF[fields["model_type"]]))
        padding = known.optional("pad_token_id", 1)
        shared = shared_fields(known, head, eps=1e-12, unused_positions=int(padding) + 1)
        config = cls(**shared, head=head, **published_labels(known, head))
        known.finish(causal=False)
        return config


class RobertaModel(BertCore, Encoder):
    """RoBERTa without a head: the last block's output, and the pooler's."""

    block_path = ("encoder", "layer")
    prefix = "roberta"

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, pooler=True, dtype=dtype)
        self.config = config

    @property
    def tables(self) -> Embeddings:
        return self.embeddings

    def head(self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]) -> Encoded:
        assert self.pooler is not None
        return Encoded(hidden, self.pooler(hidden, positions))


class RobertaWithHead(Encoder):
    """RoBERTa, without its pooler, below a head of any kind."""

    block_path = ("roberta", "encoder", "layer")
    prefix = "roberta"

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.roberta = BertCore(config, pooler=False, dtype=dtype)

    @classmethod
    def is_of_other_task(cls, name: str) -> bool:
        return _OTHER_TASKS.search(name) is not None

    @property
    def tables(self) -> Embeddings:
        return self.roberta.embeddings


class RobertaClassificationHead(nnx.Module):
    """`out_proj(tanh(dense(first token)))`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)
        self.out_proj = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)


class RobertaForSequenceClassification(RobertaWithHead):
    """A classifier of texts: float32 logits `[batch, labels]`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.classifier = RobertaClassificationHead(config, dtype=dtype)

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch labels"]:
        return logits(jnp.tanh(self.classifier.dense(first_token(hidden, positions))), self.classifier.out_proj)


class RobertaForTokenClassification(RobertaWithHead):
    """A classifier of tokens: float32 logits `[batch, length, labels]`."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.classifier = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length labels"]:
        return logits(hidden, self.classifier)


class RobertaLMHead(nnx.Module):
    """Parameters that the masked language model's logits are made with, beside the token table, to which its matrix is tied."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)
        self.layer_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype))


class RobertaForMaskedLM(RobertaWithHead):
    """A masked language model: float32 logits `[batch, length, vocab]`. Its head's activation is GELU whatever the blocks' is."""

    def __init__(self, config: EncoderConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.lm_head = RobertaLMHead(config, dtype=dtype)

    @classmethod
    def repeated(cls) -> dict[str, str]:
        return {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}

    def head(
        self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length vocab"]:
        last = self.lm_head
        x = last.layer_norm(ACTIVATIONS["gelu"](last.dense(hidden)))
        return unembed(x, self.tables.word_embeddings.weight.get_value()) + last.bias.get_value().astype(jnp.float32)


_CLASSES: dict[str, type[Encoder]] = {
    "Model": RobertaModel,
    CLASSIFIER: RobertaForSequenceClassification,
    TAGGER: RobertaForTokenClassification,
    MASKED_LM: RobertaForMaskedLM,
}


def build_roberta(config: EncoderConfig, *, dtype: Any = jnp.float32) -> Encoder:
    """The RoBERTa that a configuration describes, with its head."""
    return _CLASSES[config.head](config, dtype=dtype)  # type: ignore[call-arg]
