"""The parts of models that read one text and write another: their configuration, the state between blocks, the two halves.

The encoder's blocks see the whole text. The decoder's see the tokens written so far, and across to what the encoder made of the
text. Both are run by one walk over `blocks`, encoder first: the state that goes from block to block is the hidden states of the
text's tokens with those of the decoder's tokens behind them, `[batch, 2 length, hidden]`, and each block changes its own half.
There the decoder is fed the text itself, one place to the right (`shifted`): so classifiers read it, so BART was pretrained, and
so calibration reads its texts. Generation runs the halves by themselves (`models.stacked.read_text` and `extend`).
"""

import abc
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from quikjax.models.base import Block, Observe, Positions, Transformer, default_positions
from quikjax.models.cache import BlockCache, KeyValues, LayerCache
from quikjax.models.encoder import EncoderBlock, EncoderConfig

MEMORY = "memory_input"  # the group of a decoder's layers that read the text


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(EncoderConfig):
    """A configuration of two stacks of blocks.

    `layers`, `heads`, `head_size` and `intermediate_size` are the decoder's, which keeps the caches; the encoder's have their own
    names. The decoder begins with the token `start`; `end` ends a text. `first` is the token that every generated text begins
    with, and `last` the one that it ends with where its length is used up; `None` for neither.
    """

    encoder_layers: int
    encoder_heads: int
    encoder_intermediate_size: int
    start: int
    end: int
    first: int | None = None
    last: int | None = None

    @property
    def cached_layers(self) -> int:
        """Attention keeps the tokens written, and cross-attention the text."""
        return 2 * self.layers

    @property
    def state_size(self) -> int:
        return 2 * self.hidden_size


class Halves(NamedTuple):
    """The state between blocks, taken apart: the text's hidden states, the decoder's, and the positions of either."""

    text: Float[Array, "batch length hidden"]
    written: Float[Array, "batch length hidden"]
    positions: Positions

    @classmethod
    def of(cls, state: Float[Array, "batch double hidden"], positions: Positions) -> "Halves":
        """`positions` are those of the text's tokens; any more that are given are not read."""
        length = state.shape[1] // 2
        return cls(state[:, :length], state[:, length:], Positions(positions.queries[:, :length]))


class Heard(NamedTuple):
    """Keys and values of the text that a decoder's block attends across to, and which of the slots hold a token."""

    keys: Float[Array, "heads batch slots head"]
    values: Float[Array, "heads batch slots head"]
    there: Bool[Array, "batch slots"]


def joined(text: Float[Array, "batch length hidden"], written: Float[Array, "batch length hidden"]) -> Array:
    """The state between blocks, `[batch, 2 length, hidden]`."""
    return jnp.concatenate([text, written], axis=1)


class TextBlock(EncoderBlock):
    """A block of the encoder. Called, it changes the text's half of the state."""

    def __call__(
        self,
        hidden: Float[Array, "batch double hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch double hidden"], BlockCache]:
        halves = Halves.of(hidden, positions)
        text, written = super().__call__(halves.text, halves.positions, observe=observe)
        return joined(text, halves.written), written

    def read(
        self, text: Float[Array, "batch length hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        """The hidden states of a text behind this block, the text by itself."""
        return super().__call__(text, Positions(positions))[0]


class WritingBlock(Block):
    """A block of the decoder. Called without a cache, it changes the decoder's half of the state; with one, the hidden states
    are the decoder's alone, and the text is in the cache's memory.
    """

    @classmethod
    def decodes(cls, group: str) -> bool:
        """The layers that read the text make cross-attention's keys and values, once for each text."""
        return group != MEMORY

    @abc.abstractmethod
    def remember(self, text: Float[Array, "batch length hidden"], observe: Observe | None = None) -> KeyValues:
        """Keys and values that cross-attention has of a text which the encoder has read."""

    @abc.abstractmethod
    def write(
        self,
        hidden: Float[Array, "batch target hidden"],
        positions: Positions,
        memory: Heard,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch target hidden"], BlockCache]:
        """The decoder's hidden states behind this block, and the keys and values of its own tokens."""

    def __call__(
        self,
        hidden: Float[Array, "batch double hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch double hidden"], BlockCache]:
        if cache is not None:
            assert isinstance(cache, LayerCache)
            return self.write(hidden, positions, Heard(*cache.memory()), cache, observe)
        halves = Halves.of(hidden, positions)
        memory = Heard(*self.remember(halves.text, observe).by_head(), halves.positions.queries >= 0)
        written, own = self.write(halves.written, halves.positions, memory, None, observe)
        return joined(halves.text, written), own


class EncoderDecoder(Transformer):
    """A model that reads one text and writes another, or classifies what it read."""

    config: EncoderDecoderConfig

    @classmethod
    def stacks(cls) -> tuple[tuple[str, ...], ...]:
        return tuple((*cls.block_path, side, "layers") for side in ("encoder", "decoder"))

    def embed_text(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        """The hidden state that enters the encoder's first block."""
        raise NotImplementedError

    def embed_written(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        """The hidden state that enters the decoder's first block."""
        raise NotImplementedError

    def embed(
        self,
        ids: Int[Array, "batch length"],
        positions: Int32[Array, "batch length"],
        token_types: None = None,
    ) -> Float[Array, "batch double hidden"]:
        """The state that enters the first block, the decoder being fed the text itself. There are no token types."""
        fed = shifted(ids, positions, self.config.start)
        return joined(self.embed_text(ids, positions), self.embed_written(fed, positions))

    def state(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch double hidden"]:
        """The state behind the last block, the decoder being fed the text itself."""
        state = self.embed(ids, positions)
        for block in self.blocks.values():
            state, _ = block(state, Positions(positions))
        return state

    def written(
        self,
        ids: Int[Array, "batch length"],
        positions: Int32[Array, "batch length"],
        target: Int[Array, "batch target"],
    ) -> Float[Array, "batch target hidden"]:
        """The decoder's last hidden states for the tokens `target`, its start token first, of the texts `ids`."""
        places = default_positions(target)
        text, hidden = self.embed_text(ids, positions), self.embed_written(target, places)
        for block in self.blocks.values():
            if isinstance(block, TextBlock):
                text = block.read(text, positions)
            else:
                assert isinstance(block, WritingBlock)
                memory = Heard(*block.remember(text).by_head(), positions >= 0)
                hidden, _ = block.write(hidden, Positions(places), memory)
        return hidden


class Writer(EncoderDecoder):
    """An encoder-decoder that writes texts."""

    @property
    def generates(self) -> bool:
        return True

    def head(self, hidden: Float[Array, "batch target hidden"]) -> Float[Array, "batch target vocab"]:
        """float32 logits of the next token, from the decoder's hidden states behind its last block."""
        raise NotImplementedError


class Reader(EncoderDecoder):
    """An encoder-decoder that classifies texts."""

    def head(
        self, hidden: Float[Array, "batch double hidden"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch labels"]:
        """float32 logits of the classes, from the state behind the last block."""
        raise NotImplementedError


def shifted(ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"], start: int) -> Int[Array, "batch length"]:
    """The decoder's tokens that are to give a text: its tokens one place to the right, behind the token `start`."""
    return jnp.where(positions == 0, start, jnp.roll(ids, 1, axis=1))
