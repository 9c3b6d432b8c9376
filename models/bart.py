"""BART (arXiv 1910.13461) and what publishes as it: summarizers, DistilBART, classifiers of texts and of entailment.

Published as `BartForConditionalGeneration` and `BartForSequenceClassification`; parameter paths are their names. Norms stand
behind the sums. One token table serves the encoder, the decoder and the head, under the name `model.shared`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.models.activations import ACTIVATIONS, activated
from quikjax.models.attention import attend, attend_across
from quikjax.models.base import PADDING, Embedding, LayerNorm, Linear, Observe, Positions, observer, project, unembed
from quikjax.models.cache import BlockCache, KeyValues
from quikjax.models.encoder import CLASSIFIER, BlockLayers, logits, masked_positions, published_labels
from quikjax.models.encoder_decoder import (
    MEMORY,
    EncoderDecoder,
    EncoderDecoderConfig,
    Halves,
    Heard,
    Reader,
    TextBlock,
    Writer,
    WritingBlock,
)
from quikjax.models.published import Fields

WRITER = "ForConditionalGeneration"
# The first rows of a position table belong to fairseq's padding index and are never used by a real token.
_OFFSET = 2
_EPS = 1e-5  # not published: PyTorch's default
_TABLE = "model.shared.weight"
# Under any of these a checkpoint may hold the one token table; newer ones hold it once.
_TABLE_NAMES = (_TABLE, "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BartConfig(EncoderDecoderConfig):
    """A BART configuration. Token embeddings are multiplied by `embedding_scale`. A summarizer's logits have a bias of their own
    where `logits_bias` says so; a model that was published without a head has none.
    """

    embedding_scale: float = 1.0
    logits_bias: bool = True

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> "BartConfig":
        """Read a `config.json` of `model_type` "bart", with transformers' defaults for what it leaves out.

        Raises:
            QuikError: a field is missing, asks for mathematics that this family does not have (mBART's norms before the layers),
                or the model has a head that is none of ours.
        """
        known = Fields(fields, "BART")
        if known.optional("model_type") == "mbart":
            raise QuikError(
                "mBART normalizes before each layer, which is not supported; only BART is, whose norms stand behind the sums"
            )
        known.only_architectures("Bart" + WRITER, "Bart" + CLASSIFIER, "BartModel")
        for name, value in (
            ("normalize_before", False),
            ("add_final_layer_norm", False),
            ("normalize_embedding", True),
            ("static_position_embeddings", False),
            ("add_bias_logits", False),
            ("do_blenderbot_90_layernorm", False),
            ("extra_pos_embeddings", _OFFSET),
            ("tie_word_embeddings", True),
        ):
            known.only(name, value)
        known.only("activation_function", "gelu", *ACTIVATIONS)
        # Training's, and the depth of one half, told once more.
        for name in (
            "classif_dropout",
            "encoder_layerdrop",
            "decoder_layerdrop",
            "num_hidden_layers",
            "output_past",
            "save_step",
        ):
            known.optional(name)
        given = known.optional("architectures") or []
        listed = [given] if isinstance(given, str) else list(given)
        # A model without a head can write with the table that it has.
        head = CLASSIFIER if "Bart" + CLASSIFIER in listed else WRITER
        width = known.integer("d_model", 1024)
        heads = [known.integer(f"{side}_attention_heads", 16) for side in ("encoder", "decoder")]
        for side, count in zip(("encoder", "decoder"), heads, strict=True):
            if width % count:
                raise QuikError(f"BART's d_model {width} is not a multiple of its {side}_attention_heads {count}")
        positions = known.integer("max_position_embeddings", 1024)
        vocabulary = known.integer("vocab_size", 50265)
        first = known.optional("bos_token_id", 0) if known.flag("force_bos_token_to_be_generated", False) else None

        def token(name: str, default: int | None) -> int | None:
            found = known.optional(name, default)
            one = found[0] if isinstance(found, list) and len(found) == 1 else found
            if one is not None and (not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocabulary):
                raise QuikError(f"BART's {name} is {found!r}, which is no token of its vocabulary of {vocabulary}")
            return one

        start, end = token("decoder_start_token_id", 2), token("eos_token_id", 2)
        assert start is not None
        assert end is not None
        # Of this one, null is not the same as left out.
        last = None if fields.get("forced_eos_token_id", 2) is None else token("forced_eos_token_id", 2)
        config = cls(
            vocab_size=vocabulary,
            hidden_size=width,
            layers=known.integer("decoder_layers", 12),
            heads=heads[1],
            kv_heads=heads[1],
            head_size=width // heads[1],
            context_length=positions,
            intermediate_size=known.integer("decoder_ffn_dim", 4096),
            learned_positions=positions,
            norm_eps=_EPS,
            unused_positions=_OFFSET,
            activation=known.optional("activation_function", "gelu"),
            head=head,
            encoder_layers=known.integer("encoder_layers", 12),
            encoder_heads=heads[0],
            encoder_intermediate_size=known.integer("encoder_ffn_dim", 4096),
            start=start,
            end=end,
            first=token("forced_bos_token_id", first),
            last=last,
            embedding_scale=width**0.5 if known.flag("scale_embedding", False) else 1.0,
            logits_bias="BartModel" not in listed,
            **published_labels(known, head, default=3),
        )
        known.finish(encoder_decoder=True)
        return config


class BartAttention(nnx.Module):
    """Attention's four layers, of either kind."""

    def __init__(self, width: int, *, dtype: Any) -> None:
        self.q_proj = Linear(width, width, bias=True, dtype=dtype)
        self.k_proj = Linear(width, width, bias=True, dtype=dtype)
        self.v_proj = Linear(width, width, bias=True, dtype=dtype)
        self.out_proj = Linear(width, width, bias=True, dtype=dtype)


class BartEncoderLayer(TextBlock):
    """An encoder's block under BART's names."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_output": ("self_attn.out_proj",),
        "mlp_input": ("fc1",),
        "mlp_output": ("fc2",),
    }

    def __init__(self, config: BartConfig, *, dtype: Any) -> None:
        width, heads, wide = config.hidden_size, config.encoder_heads, config.encoder_intermediate_size
        super().__init__(dataclasses.replace(config, heads=heads, kv_heads=heads, head_size=width // heads))
        self.self_attn = BartAttention(width, dtype=dtype)
        self.self_attn_layer_norm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.fc1 = Linear(width, wide, bias=True, dtype=dtype)
        self.fc2 = Linear(wide, width, bias=True, dtype=dtype)
        self.final_layer_norm = LayerNorm(width, config.norm_eps, dtype=dtype)

    def layers(self) -> BlockLayers:
        of = self.self_attn
        return BlockLayers(
            of.q_proj, of.k_proj, of.v_proj, of.out_proj, self.self_attn_layer_norm, self.fc1, self.fc2, self.final_layer_norm
        )


class BartDecoderLayer(WritingBlock):
    """A decoder's block: attention, cross-attention and MLP, each with its residual and behind that its norm."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        MEMORY: ("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_output": ("self_attn.out_proj",),
        "cross_input": ("encoder_attn.q_proj",),
        "cross_output": ("encoder_attn.out_proj",),
        "mlp_input": ("fc1",),
        "mlp_output": ("fc2",),
    }

    def __init__(self, config: BartConfig, *, dtype: Any) -> None:
        self.config = config
        width, wide = config.hidden_size, config.intermediate_size
        self.self_attn = BartAttention(width, dtype=dtype)
        self.self_attn_layer_norm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.encoder_attn = BartAttention(width, dtype=dtype)
        self.encoder_attn_layer_norm = LayerNorm(width, config.norm_eps, dtype=dtype)
        self.fc1 = Linear(width, wide, bias=True, dtype=dtype)
        self.fc2 = Linear(wide, width, bias=True, dtype=dtype)
        self.final_layer_norm = LayerNorm(width, config.norm_eps, dtype=dtype)

    def _by_head(self, x: Float[Array, "batch length hidden"]) -> Float[Array, "batch length heads head"]:
        return x.reshape(*x.shape[:-1], self.config.heads, self.config.head_size)

    def remember(self, text: Float[Array, "batch length hidden"], observe: Observe | None = None) -> KeyValues:
        of = self.encoder_attn
        key, value = project(observer(observe)(MEMORY, text), of.k_proj, of.v_proj)
        return KeyValues(self._by_head(key), self._by_head(value))

    def write(
        self,
        hidden: Float[Array, "batch target hidden"],
        positions: Positions,
        memory: Heard,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch target hidden"], BlockCache]:
        see, own, across, scale = observer(observe), self.self_attn, self.encoder_attn, self.config.head_size**-0.5

        x = see("attention_input", hidden)
        query, key, value = (self._by_head(y) for y in project(x, own.q_proj, own.k_proj, own.v_proj))
        mixed, written = attend(query, key, value, positions, cache, scale=scale, observe=observe)
        hidden = self.self_attn_layer_norm(own.out_proj(see("attention_output", mixed.reshape(hidden.shape)), onto=hidden))

        query = self._by_head(across.q_proj(see("cross_input", hidden)))
        mixed = attend_across(query, *memory, scale=scale)
        x = see("cross_output", mixed.reshape(hidden.shape).astype(hidden.dtype))
        hidden = self.encoder_attn_layer_norm(across.out_proj(x, onto=hidden))

        x = see("mlp_output", activated(self.config.activation, self.fc1(see("mlp_input", hidden))))
        return self.final_layer_norm(self.fc2(x, onto=hidden)), written


class BartSide(nnx.Module):
    """The encoder or the decoder: its positions, the norm behind its embeddings, its blocks."""

    def __init__(self, config: BartConfig, block: Any, count: int, *, dtype: Any) -> None:
        self.embed_positions = Embedding(config.learned_positions + _OFFSET, config.hidden_size, dtype=dtype)
        self.layers = nnx.Dict({str(i): block(config, dtype=dtype) for i in range(count)})
        self.layernorm_embedding = LayerNorm(config.hidden_size, config.norm_eps, dtype=dtype)


class BartModel(nnx.Module):
    """The token table and both sides, under their published names."""

    def __init__(self, config: BartConfig, *, dtype: Any) -> None:
        self.shared = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.encoder = BartSide(config, BartEncoderLayer, config.encoder_layers, dtype=dtype)
        self.decoder = BartSide(config, BartDecoderLayer, config.layers, dtype=dtype)


class Bart(EncoderDecoder):
    """BART below a head of either kind."""

    block_path = ("model",)
    config: BartConfig

    def __init__(self, config: BartConfig, *, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.model = BartModel(config, dtype=dtype)

    @classmethod
    def published_names(cls, path: str) -> tuple[str, ...]:
        """The names of a checkpoint saved with a head and without, the usual one first."""
        names = _TABLE_NAMES if path == _TABLE else (path,)
        return (*names, *(name.removeprefix("model.") for name in names if name.startswith("model.")))

    @classmethod
    def repeated(cls) -> dict[str, str]:
        names = (name for path in _TABLE_NAMES for name in (path, path.removeprefix("model.")))
        return dict.fromkeys(names, _TABLE)

    def embed_text(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        return self._embed(self.model.encoder, ids, positions)

    def embed_written(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        return self._embed(self.model.decoder, ids, positions)

    def _embed(
        self, side: BartSide, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        # Positions that were never learned give NaN, not the last row that was.
        table = side.embed_positions.weight.get_value()
        rows = jnp.take(table, jnp.maximum(positions, 0) + _OFFSET, axis=0, mode="fill", fill_value=jnp.nan)
        return side.layernorm_embedding(self.model.shared(ids) * self.config.embedding_scale + rows)


class BartForConditionalGeneration(Bart, Writer):
    """BART that writes: float32 logits of the token that follows each of the decoder's."""

    def __init__(self, config: BartConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.final_logits_bias = nnx.Param(jnp.zeros((1, config.vocab_size), dtype)) if config.logits_bias else None

    def head(self, hidden: Float[Array, "batch target hidden"]) -> Float[Array, "batch target vocab"]:
        found = unembed(hidden, self.model.shared.weight.get_value())
        if self.final_logits_bias is None:
            return found
        return found + self.final_logits_bias.get_value()[0].astype(jnp.float32)

    def __call__(
        self, ids: Int[Array | np.ndarray, "batch length"], mask: Any = None, target: Any = None
    ) -> Float[Array, "batch target vocab"]:
        """float32 logits of the token behind each of the decoder's, for texts padded to one length.

        Args:
            ids: tokens of the texts to read.
            mask: `[batch, length]`, 1 (or True) for a token and 0 for padding; left out, nothing is padding.
            target: the decoder's tokens, its start token first; left out, the text itself one place to the right.

        Raises:
            QuikError: the mask is of another form.
        """
        ids = jnp.asarray(ids)
        positions = masked_positions(ids, mask)
        if target is None:
            return self.head(Halves.of(self.state(ids, positions), Positions(positions)).written)
        return self.head(self.written(ids, positions, jnp.asarray(target)))


class BartClassificationHead(nnx.Module):
    """`out_proj(tanh(dense(x)))`."""

    def __init__(self, config: BartConfig, *, dtype: Any) -> None:
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, dtype=dtype)
        self.out_proj = Linear(config.hidden_size, config.label_count, bias=True, dtype=dtype)


class BartForSequenceClassification(Bart, Reader):
    """A classifier of texts: float32 logits `[batch, labels]` from what the decoder makes of the text's last end token."""

    def __init__(self, config: BartConfig, *, dtype: Any = jnp.float32) -> None:
        super().__init__(config, dtype=dtype)
        self.classification_head = BartClassificationHead(config, dtype=dtype)

    @classmethod
    def is_of_other_task(cls, name: str) -> bool:
        return name == "final_logits_bias"

    def head(
        self, hidden: Float[Array, "batch double hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch labels"]:
        """The classes' logits from the state behind the last block, read at each row's last position."""
        at = jnp.argmax(positions, axis=1)[:, None, None]
        found = jnp.take_along_axis(Halves.of(hidden, Positions(positions)).written, at, axis=1)[:, 0]
        return logits(jnp.tanh(self.classification_head.dense(found)), self.classification_head.out_proj)

    def __call__(self, ids: Int[Array | np.ndarray, "batch length"], mask: Any = None) -> Float[Array, "batch labels"]:
        """float32 logits of the classes, for texts padded to one length; `mask` as for an encoder.

        Raises:
            QuikError: the mask is of another form, or a text has no end token.
        """
        ids = jnp.asarray(ids)
        positions = masked_positions(ids, mask)
        ends = jnp.max(jnp.where(ids == self.config.end, positions, PADDING), axis=1, keepdims=True)
        if not isinstance(ends, jax.core.Tracer) and (np.asarray(ends) < 0).any():
            row = int(np.flatnonzero(np.asarray(ends)[:, 0] < 0)[0])
            raise QuikError(
                f"row {row} has no end token ({self.config.end}), where a BART reads a text's class; put one behind it"
            )
        return self.head(self.state(ids, positions), jnp.where(positions <= ends, positions, PADDING))


def build_bart(config: BartConfig, *, dtype: Any = jnp.float32) -> Bart:
    """The BART that a configuration describes, with its head."""
    return (BartForSequenceClassification if config.head == CLASSIFIER else BartForConditionalGeneration)(config, dtype=dtype)
