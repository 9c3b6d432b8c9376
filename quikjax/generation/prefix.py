"""Texts that grow: the cache of one text kept, so that only what is new of the next one is read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quikjax.generation.decode import Kind, place
from quikjax.generation.generator import Decoding, Generator
from quikjax.generation.rows import Row, padded
from quikjax.generation.sampling import Values
from quikjax.models import cache as caches
from quikjax.models import stacked
from quikjax.models.cache import Fresh, StackedCache


class Prefix:
    """One text's keys and values, from request to request. `tokens` are those that the cache holds.

    `reused` counts the tokens of the last prompt that did not have to be read again. An exception in the middle of a request
    (Ctrl-C) loses the cache, not the text: the next request reads all of it.
    """

    def __init__(self, generator: Generator) -> None:
        self.tokens: list[int] = []
        self.reused = 0
        self._generator = generator
        self._cache: StackedCache | None = None

    def start(self, row: Row, max_new_tokens: int, values: Values, stops: np.ndarray, kind: Kind) -> Decoding:
        """Read what of the row's prompt is new, and choose the first token. Give the result to `keep` when it has ended."""
        generator, prompt = self._generator, row.prompt
        common = next((i for i, (a, b) in enumerate(zip(self.tokens, prompt, strict=False)) if a != b), None)
        # The last token is read again where nothing is new: its logits are not kept.
        self.reused = min(len(self.tokens) if common is None else common, len(prompt) - 1)
        cache, self._cache = self._cache, None
        ids, lengths = padded([prompt[self.reused :]])
        slots = generator.slots(max(len(prompt) + max_new_tokens, self.reused + ids.shape[1]))
        logits: Any = np.zeros((1, generator.config.vocab_size), np.float32)
        run = generator.programs.run
        if cache is None or not self.reused:
            self.reused = 0
            ids, lengths = padded([prompt])
            cache = cache if cache is not None and cache.slots >= slots else generator.new_cache(1, slots)
            given, fresh = run(
                stacked.read, (generator.layout,), (generator.params, ids, lengths), named={"kind": generator.cache}
            )
            cache, logits = run(place, (), (cache, logits, fresh, given, np.int32(0)), donate=(0,))
        else:
            if cache.slots < slots:
                whole = Fresh(cache.keys, cache.values, cache.key_scale, cache.value_scale)
                cache = run(caches.insert, (), (generator.new_cache(1, slots), whole, np.int32(0)), donate=(0,))
            start = np.array([self.reused], np.int32)
            logits, cache = run(stacked.extend, (generator.layout,), (generator.params, ids, start, lengths, cache), donate=(4,))
        self.tokens = list(prompt)
        seeds, numbers = np.array([row.seed], np.uint32), np.array([row.sample], np.int32)
        real, whole_lengths = np.array([True]), np.array([len(prompt)], np.int32)
        assert cache is not None
        return generator.begin([prompt], logits, cache, whole_lengths, real, seeds, numbers, max_new_tokens, values, stops, kind)

    def keep(self, decoding: Decoding, chosen: Sequence[int]) -> None:
        """Take the cache back from a decoding that chose these tokens, its stop token included."""
        # The token chosen last has not been read.
        self.tokens += [int(token) for token in chosen[:-1]]
        self._cache = decoding.state.cache

    def forget(self) -> None:
        """Drop the text; the memory stays for the next."""
        self.tokens = []
