"""The parts that encoders share: their configuration, padding masks, embeddings, the block, and the classifiers' labels.

An encoder reads a whole text at once: every token sees every other one that is no padding. `embed`, each of `blocks` and `head`
are its three steps, as of every model here; there is no cache. Norms stand behind the sums (Post-LN), as in the Transformer's
first form (arXiv 1706.03762).
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models.activations import activated
from quikjax.models.attention import attend
from quikjax.models.base import (
    PADDING,
    Block,
    Config,
    Embedding,
    LayerNorm,
    Linear,
    Observe,
    Positions,
    Transformer,
    default_positions,
    observer,
    project,
)
from quikjax.models.cache import BlockCache
from quikjax.models.published import Fields
from quikjax.weights.linear import dense_product

# What a published class is called behind its family's name: no head, or one of these.
CLASSIFIER, TAGGER, MASKED_LM = "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"
HEADS = ("Model", CLASSIFIER, TAGGER, MASKED_LM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """An encoder's configuration.

    The position table has a row for each of `learned_positions`, and `unused_positions` before them. `token_types` counts the
    kinds of token (first and second text of a pair); 0 where the family has no table of them. `head` is one of `HEADS`. A
    classifier has `label_count` classes, called `labels` where its configuration names them, and `problem` is what it was trained
    for: "single_label_classification", "multi_label_classification", "regression", or `None` where nothing says.
    """

    intermediate_size: int
    learned_positions: int
    norm_eps: float
    unused_positions: int = 0
    token_types: int = 0
    activation: str = "gelu"
    head: str = "Model"
    label_count: int = 0
    labels: tuple[str, ...] = ()
    problem: str | None = None
    norm_first: ClassVar[bool] = False

    @property
    def cached_layers(self) -> int:
        return 0

    @property
    def last_position(self) -> int:
        return self.learned_positions


class Encoded(NamedTuple):
    """The result of a model without a head: the last block's output and, where the family has a pooler, its output."""

    hidden: Float[Array, "batch length hidden"]
    pooled: Float[Array, "batch hidden"] | None


class Encoder(Transformer):
    """An encoder of any family.

    `model(ids, mask, token_types)` gives `Encoded` without a head, float32 logits `[batch, labels]` of a classifier of texts,
    `[batch, length, labels]` of a classifier of tokens, and `[batch, length, vocab]` of a masked language model.
    """

    config: EncoderConfig
    prefix: ClassVar[str]  # what the model without its head is called inside one with a head

    @classmethod
    def published_names(cls, path: str) -> tuple[str, ...]:
        """The names of a checkpoint saved with a head and without; norms of the first BERTs have `gamma` and `beta`."""
        inner = path.removeprefix(cls.prefix + ".")
        names = [path, inner if inner != path else f"{cls.prefix}.{path}"]
        for name in tuple(names):
            for ours, theirs in ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")):
                if name.endswith(ours):
                    names.append(name.removesuffix(ours) + theirs)
        return tuple(names)

    @property
    def tables(self) -> "Embeddings":
        """The embedding tables and the norm behind them."""
        raise NotImplementedError

    def embed(
        self,
        ids: Int[Array, "batch length"],
        positions: Int32[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length hidden"]:
        """The hidden state that enters the first block. Token types left out are all 0."""
        return self.tables.of(ids, positions, token_types, self.config.unused_positions)

    def encode(
        self,
        ids: Int[Array, "batch length"],
        positions: Int32[Array, "batch length"] | None = None,
        token_types: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length hidden"]:
        """The last block's output, before the head. `positions` defaults to 0, 1, 2, ...; padding is `PADDING`."""
        where = Positions(default_positions(ids) if positions is None else positions)
        hidden = self.embed(ids, where.queries, token_types)
        for block in self.blocks.values():
            hidden, _ = block(hidden, where)
        return hidden

    def head(self, hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]) -> Any:
        """The model's result for the hidden state that leaves its last block."""
        raise NotImplementedError

    def __call__(self, ids: Int[Array | np.ndarray, "batch length"], mask: Any = None, token_types: Any = None) -> Any:
        """Encode texts, padded to one length.

        Args:
            ids: tokens.
            mask: `[batch, length]`, 1 (or True) for a token and 0 for padding; left out, nothing is padding.
            token_types: 0 for the tokens of the first text and 1 for those of the second, `[batch, length]`; left out, all 0.

        Raises:
            QuikError: the mask is of another form, or token types are given to a family without them.
        """
        ids = jnp.asarray(ids)
        positions = masked_positions(ids, mask)
        types = None if token_types is None else jnp.asarray(token_types)
        return self.head(self.encode(ids, positions, types), positions)


def masked_positions(ids: Int[Array, "batch length"], mask: Any = None) -> Int32[Array, "batch length"]:
    """Positions of the tokens that `mask` lets through, counted from 0 in each row, and `PADDING` for the others.

    A text's positions do not depend on the side that it is padded on.

    Raises:
        QuikError: the mask is not `[batch, length]`, holds other numbers than 0 and 1, or leaves a row no token.
    """
    if mask is None:
        return default_positions(ids)
    expected = f"a padding mask is [batch, length] = {tuple(ids.shape)}, 1 for each token and 0 for padding"
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        try:
            mask = np.asarray(mask)
        except ValueError:
            raise QuikError(f"{expected}; this one is {described(mask)}") from None
    if tuple(mask.shape) != tuple(ids.shape):
        hint = "; give the mask of the tokens, not of pairs of them" if len(mask.shape) > 2 else ""
        raise QuikError(f"{expected}; this one has the shape {tuple(mask.shape)}{hint}")
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise QuikError(f"{expected}; this one holds {mask.dtype} (what is added to scores is made of it here)")
    if not isinstance(mask, jax.core.Tracer):
        values = np.asarray(mask)
        if values.dtype != bool and ((values != 0) & (values != 1)).any():
            odd = int(values[(values != 0) & (values != 1)][0])
            raise QuikError(f"{expected}; this one holds {odd}")
        empty = np.flatnonzero(~values.astype(bool).any(axis=1))
        if len(empty):
            raise QuikError(f"{expected}; row {empty[0]} of this one has no token")
    there = jnp.asarray(mask).astype(bool)
    return jnp.where(there, jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1, PADDING)


def first_token(
    hidden: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
) -> Float[Array, "batch hidden"]:
    """The hidden state of each row's first token, which stands for the text."""
    at = jnp.argmax(positions == 0, axis=1)[:, None, None]
    return jnp.take_along_axis(hidden, at, axis=1)[:, 0]


def logits(hidden: Float[Array, "*batch hidden"], layer: Linear) -> Float[Array, "*batch labels"]:
    """float32 logits of a classifier: `hidden W^T + b`, accumulated in float32."""
    assert layer.bias is not None
    return dense_product(hidden, layer.weight.get_value()) + layer.bias.get_value().astype(jnp.float32)


class Embeddings(nnx.Module):
    """Token, position and, where the family has them, token type tables; their sum, normalized."""

    def __init__(self, config: EncoderConfig, *, dtype: Any) -> None:
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, dtype=dtype)
        self.position_embeddings = Embedding(config.unused_positions + config.learned_positions, width, dtype=dtype)
        self.token_type_embeddings = Embedding(config.token_types, width, dtype=dtype) if config.token_types else None
        self.LayerNorm = LayerNorm(width, config.norm_eps, dtype=dtype)

    def of(
        self,
        ids: Int[Array, "batch length"],
        positions: Int32[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None,
        unused: int,
    ) -> Float[Array, "batch length hidden"]:
        """The input of the first block. `unused` rows of the position table stand before that of position 0."""
        hidden = self.word_embeddings(ids)
        if self.token_type_embeddings is not None:
            kinds = jnp.zeros_like(ids) if token_types is None else token_types
            hidden = hidden + self.token_type_embeddings(kinds)
        elif token_types is not None:
            raise QuikError("this model has no token types; leave them out")
        # Positions that were never learned give NaN, not the last row that was.
        table = self.position_embeddings.weight.get_value()
        rows = jnp.take(table, jnp.maximum(positions, 0) + unused, axis=0, mode="fill", fill_value=jnp.nan)
        return self.LayerNorm(hidden + rows)


class BlockLayers(NamedTuple):
    """The layers and norms of one block, whatever the family calls them."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: LayerNorm
    wide: Linear
    narrow: Linear
    mlp_norm: LayerNorm


class EncoderBlock(Block):
    """Attention over the whole text and MLP, each with its residual and behind that its norm:

    h = attention_norm(x + output(softmax(q k^T / sqrt(head)) v))
    y = mlp_norm(h + narrow(activation(wide(h))))
    """

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    @classmethod
    def decodes(cls, group: str) -> bool:
        return False

    @abc.abstractmethod
    def layers(self) -> BlockLayers:
        """The block's own layers."""

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        """The block's output, and its keys and values. Tokens at position `PADDING` are seen by none; there is no cache."""
        see, config, of = observer(observe), self.config, self.layers()

        x = see("attention_input", hidden)
        query, key, value = (
            y.reshape(*y.shape[:-1], config.heads, config.head_size) for y in project(x, of.query, of.key, of.value)
        )
        mixed, written = attend(query, key, value, positions, cache, scale=config.head_size**-0.5, causal=False, observe=observe)
        hidden = of.attention_norm(of.output(see("attention_output", mixed.reshape(hidden.shape)), onto=hidden))

        x = see("mlp_output", activated(config.activation, of.wide(see("mlp_input", hidden))))
        return of.mlp_norm(of.narrow(x, onto=hidden)), written


def published_head(known: Fields, families: tuple[str, ...]) -> str:
    """The head of a configuration whose classes are called after one of `families`; without any named, there is none.

    Raises:
        QuikError: the model has another head.
    """
    names = {family + head: head for family in families for head in HEADS}
    # Pretrained BERTs carry the head of a second task, which nobody uses.
    names |= {family + "ForPreTraining": MASKED_LM for family in families}
    known.only_architectures(*names)
    given = known.optional("architectures") or []
    listed = [given] if isinstance(given, str) else list(given)
    return next((names[name] for name in listed if name in names), "Model")


def published_labels(known: Fields, head: str, *, default: int = 2) -> dict[str, Any]:
    """The fields `label_count`, `labels` and `problem` of a classifier's configuration; none for another model.

    A family's classifiers have `default` classes where a configuration does not say.

    Raises:
        QuikError: `id2label` does not name the classes 0, 1, 2, ..., or contradicts `num_labels`.
    """
    named, count, problem = known.optional("id2label"), known.optional("num_labels"), known.optional("problem_type")
    if head not in (CLASSIFIER, TAGGER):
        return {}
    kinds = ("single_label_classification", "multi_label_classification", "regression")
    if problem is not None:
        known.only("problem_type", *kinds)
    if not named:
        return {"label_count": known.integer("num_labels", default), "problem": problem}
    by_id = {str(key): str(label) for key, label in named.items()} if isinstance(named, Mapping) else {}
    if sorted(by_id) != sorted(map(str, range(len(by_id)))) or (count is not None and count != len(by_id)):
        given = ", ".join(by_id) if by_id else repr(named)
        more = "" if count is None else f" and num_labels is {count}"
        raise QuikError(f"{known.family}'s id2label names the classes {given}{more}; all of them, from 0 on, are expected")
    labels = tuple(by_id[str(i)] for i in range(len(by_id)))
    # What transformers writes where nobody gave names.
    unnamed = labels == tuple(f"LABEL_{i}" for i in range(len(labels)))
    return {"label_count": len(labels), "labels": () if unnamed else labels, "problem": problem}
