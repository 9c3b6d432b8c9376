"""Rows of a batch on their way from prompt to text, and what they become."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from quikjax.generation.decode import NOTHING
from quikjax.generation.text import TextStream

_SHORTEST = 16


def bucket(length: int) -> int:
    """The padded length of a text: 16, 24, 32, 48, 64, 96, ...: at most half as much again is padding.

    >>> [bucket(n) for n in (1, 17, 25, 33, 1000)]
    [16, 24, 32, 48, 1024]
    """
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array, padded on the right to their bucket, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), bucket(int(lengths.max(initial=1)))), np.int32)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = prompt
    return ids, lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Generated tokens and texts, and their speed. A row is one prompt's, or one of its samples, in the order of the prompts.

    `tokens` int32 `[rows, new]`: the continuation of each row, from `lengths[row]` on filled with a stop token (the stop token
    itself is not counted, nor what a stop string cuts off). `finished` says of each row why it ended: "stop" or "length".
    `texts` are there where the generator has a tokenizer, `logprobs` float32 `[rows, new]` (0 behind the end) on request: of each
    token under the model's own distribution, whatever the sampling; `scores` float32 `[rows]` of a
    beam search, see `Beams`. Seconds of `prefill` and `decode` are of running alone; `compile` is apart. `decoded` counts the
    tokens that decoding gave, stop tokens included, without each row's first; of a search, its steps times the texts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finished: tuple[str, ...]
    prompt_tokens: int
    decoded: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    texts: tuple[str, ...] | None = None
    logprobs: np.ndarray | None = None
    scores: np.ndarray | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read per second, over all rows."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens decoded per second, over all rows; 0 where the prefill gave the only one."""
        return self.decoded / self.decode_seconds if self.decoded else 0.0


@dataclasses.dataclass
class Row:
    """One row on its way: its prompt and key, the tokens so far, and why it ended."""

    prompt: list[int]
    seed: int
    sample: int
    text: TextStream | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    kept: int = 0
    finished: str = ""

    def take(self, tokens: Sequence[int], logprobs: Sequence[float] | None, stops: frozenset[int]) -> str:
        """Add what a chunk gave this row, up to its end; returns the text that became final."""
        piece = ""
        for i, token in enumerate(tokens):
            if self.finished or token == NOTHING:
                break
            if token in stops:
                self.finished = "stop"
                break
            self.tokens.append(int(token))
            if logprobs is not None:
                self.logprobs.append(float(logprobs[i]))
            self.kept = len(self.tokens)
            if self.text is not None:
                piece += self.text.feed([int(token)])
                if self.text.stopped:
                    self.finished, self.kept = "stop", self.text.tokens
        if self.finished and self.text is not None:
            piece += self.text.finish()
        return piece


def collected(rows: Sequence[Row], new: int, fill: int, *, logprobs: bool, **known: Any) -> Generation:
    """The generation of ended rows, `[rows, new]`, filled behind their ends with the token `fill`; `known` are other fields."""
    tokens = np.full((len(rows), new), fill, np.int32)
    chances = np.zeros((len(rows), new), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : row.kept] = row.tokens[: row.kept]
        chances[i, : min(row.kept, len(row.logprobs))] = row.logprobs[: row.kept]
    texts = tuple(row.text.text for row in rows if row.text is not None)
    return Generation(
        tokens=tokens,
        lengths=np.array([row.kept for row in rows], np.int32),
        finished=tuple(row.finished for row in rows),
        texts=texts or None,
        logprobs=chances if logprobs else None,
        **known,
    )
