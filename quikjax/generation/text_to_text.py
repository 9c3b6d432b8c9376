"""Generating with a model that reads one text and writes another: a summarizer, a translator."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from quikjax.errors import QuikError
from quikjax.generation.decode import NOTHING
from quikjax.generation.generator import Generator, Read
from quikjax.generation.rows import Row, padded
from quikjax.generation.sampling import Forced
from quikjax.generation.text import TextStream
from quikjax.models import stacked
from quikjax.models.base import Transformer
from quikjax.models.encoder_decoder import EncoderDecoderConfig
from quikjax.models.tokens import checked_writer


class TextToText(Generator):
    """A `Generator` whose prompts are texts for the encoder, with all that the tokenizer puts around one.

    The encoder reads a text once, and cross-attention's keys and values of it are made once; they stand beside the cache of the
    tokens written. The decoder begins with the model's start token, and the tokens that the model forces are its own: the first
    one, and the end where `max_new_tokens` are used up (such a row has `finished` "stop"). A repetition penalty is on tokens
    that were written, not on those that were read. Settings are the `Generator`'s, but for `deterministic`.

    Raises:
        QuikError: as `Generator`; the model does not read one text and write another, or `deterministic` is asked for.
    """

    config: EncoderDecoderConfig

    def __init__(self, model: Any, **settings: Any) -> None:
        if settings.get("deterministic"):
            raise QuikError("texts that an encoder reads are read together; deterministic is for models that continue a text")
        super().__init__(model, **settings)

    @staticmethod
    def checked(model: Any) -> Transformer:
        return checked_writer(model)

    def check_prompt(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise `QuikError` unless the text can be read, and so many tokens written."""
        if len(prompt) == 0:
            raise QuikError("the text is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise QuikError(f"the text has a token outside the model's vocabulary of {self.config.vocab_size}")
        if len(prompt) > self.context:
            raise QuikError(f"a text of {len(prompt)} tokens exceeds the {self.context} that the model reads; shorten it")
        if max_new_tokens > self.context:
            raise QuikError(f"{max_new_tokens} new tokens exceed the {self.context} that the model writes; ask for fewer")

    def stream(self, prompt: Sequence[int], stop_strings: Sequence[str]) -> TextStream:
        """The text that a row's tokens become; it does not continue the one that was read."""
        return TextStream(self.tokenizer, (), stop_strings)

    def forced(self, max_new_tokens: int) -> Forced | None:
        first, last = (NOTHING if token is None else token for token in (self.config.first, self.config.last))
        return Forced(np.int32(first), np.int32(last), np.int32(max_new_tokens - 1))

    def read(self, rows: Sequence[Row], max_new_tokens: int) -> Read:
        """Read the rows' texts, and the token that the decoder begins with."""
        batch = self._padded_rows(len(rows))
        ids, lengths = padded([row.prompt for row in rows] + [[] for _ in range(batch - len(rows))])
        run = self.programs.run
        memory = run(stacked.read_text, (self.layout,), (self.params, ids, lengths), named={"kind": self.cache})
        cache = dataclasses.replace(self.new_cache(batch, self.slots(max_new_tokens)), memory=memory)
        starts, at, ones = np.full((batch, 1), self.config.start, np.int32), np.zeros(batch, np.int32), np.ones(batch, np.int32)
        logits, cache = run(stacked.extend, (self.layout,), (self.params, starts, at, ones, cache), donate=(4,))
        return Read(starts.tolist(), logits, cache)
