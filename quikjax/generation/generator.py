"""A model made ready to generate: blocks stacked, programs compiled once per bucket and kept, a cache of a stated size."""

import bisect
import dataclasses
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import numpy as np
from jaxtyping import Int

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.generation import beams as search
from quikjax.generation import decode
from quikjax.generation.decode import CHUNK, NOTHING, Kind, Past, State
from quikjax.generation.programs import Programs
from quikjax.generation.rows import Generation, Row, bucket, collected, padded
from quikjax.generation.sampling import Forced, Values, row_keys
from quikjax.generation.settings import Beams, Sampling, check_seed
from quikjax.generation.text import TextStream
from quikjax.models import cache as caches
from quikjax.models import stacked
from quikjax.models.base import Transformer
from quikjax.models.cache import StackedCache
from quikjax.models.dtypes import check_cache_kind
from quikjax.models.memory import device_memory, most_slots
from quikjax.models.tokens import checked_model, checked_prompts, whole_number
from quikjax.weights.compiled import why_no_compiled_products

# Slots that attention takes at a time on a CPU, and everywhere with `deterministic`; a cache is a multiple of it, and more than
# one: XLA copies the cache for every block of the model where a single step of the loop takes it all.
KEY_BLOCK = 64
_STOPS = 8  # stop tokens are padded to a multiple of this

Prompts = Sequence[Sequence[int]] | Int[Any, "rows length"]


class Read(NamedTuple):
    """Texts read: their tokens, as far as decoding goes on with them, the logits behind each, and the cache that they are in."""

    texts: Sequence[Sequence[int]]
    logits: Any
    cache: StackedCache


@dataclasses.dataclass
class Decoding:
    """A batch being decoded: `advance` gives the next tokens of every row."""

    generator: "Generator"
    state: State
    stops: np.ndarray
    values: Values
    kind: Kind
    remaining: int
    first: tuple[np.ndarray, np.ndarray | None] | None

    def advance(self, limit: int = CHUNK) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens `[batch, n]` of the next at most `limit` steps, `NOTHING` behind a row's end; and their log-probabilities."""
        if self.first is not None:
            given, self.first = self.first, None
            return given
        steps = min(limit, CHUNK, self.remaining)
        tokens, logprobs, self.state = self.generator.programs.run(
            decode.chunk,
            (self.generator.layout,),
            (self.generator.params, self.state, self.stops, self.values, np.int32(steps)),
            donate=(1,),
            named={"kind": self.kind},
        )
        self.remaining -= steps
        return np.asarray(tokens)[:, :steps], None if logprobs is None else np.asarray(logprobs)[:, :steps]

    @property
    def running(self) -> np.ndarray:
        """Which rows have not stopped."""
        return np.asarray(self.state.running)

    def end(self, rows: np.ndarray) -> None:
        """End the rows that are true, whatever they would go on with."""
        self.state = dataclasses.replace(self.state, running=self.running & ~rows)


class Generator:
    """Generates with one model. Programs are compiled once per bucket of lengths and kept; `programs` counts them.

    Args:
        model: one of ours, dense or with packed weights.
        tokenizer: for texts and stop strings; without one there are tokens only.
        context: how many tokens a prompt and its continuation may have together; the model's own context when left out.
        cache: "float32", "bfloat16", "float16" or "int8" (one scale per token and head; smaller and not exact); left out, the
            dtype of the model's activations, and float32 on a CPU, which reads 16 bits several times slower.
        deterministic: a row's bits do not depend on the rows beside it. Prompts are read one by one, and decoding always takes
            `batch_size` rows at a time, so that every product is the same program's.
        batch_size: rows decoded together at most.
        release: free the model's own block parameters as they are stacked; the model cannot be used afterwards. Without it the
            blocks are held twice (on a GPU, where blocks are not stacked, what its kernels read in another form).
        unrolled: compile every block by itself, as on a GPU anyway, which takes longer by the number of blocks. An unquantized
            model decodes faster then on a CPU without compiled products, as no weight is copied out of stacked ones.
        programs: those of another generator, whose models of the same shapes then need no compiling.

    Raises:
        QuikError: the model is an encoder, the context is none that it has, or there is no such cache.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        tokenizer: Any = None,
        context: int | None = None,
        cache: str | None = None,
        deterministic: bool = False,
        batch_size: int = 8,
        release: bool = False,
        unrolled: bool = False,
        programs: Programs | None = None,
    ) -> None:
        model = self.checked(model)
        self.config = model.config
        context = None if context is None else whole_number(context, "the context")
        self.context = self.config.context_length if context is None else context
        if not 1 < self.context <= self.config.context_length:
            raise QuikError(
                f"the context may be 2 to {self.config.context_length} tokens, which is the model's own, not {self.context}"
            )
        batch_size = whole_number(batch_size, "the rows decoded together (batch_size)")
        if cache is not None:
            check_cache_kind(cache)
        self.tokenizer = tokenizer
        self.model_stops = tuple(model.stops)
        self.deterministic = deterministic
        self.batch_size = batch_size
        self.programs = Programs() if programs is None else programs
        cpu = jax.default_backend() == "cpu"
        panels = cpu and why_no_compiled_products() is None
        self.layout, self.params = stacked.stack(model, release=release, widen=cpu, panels=panels, unrolled=unrolled or None)
        self.cache = cache or ("float32" if cpu else self.layout.dtype)
        by_blocks = deterministic or cpu
        self.key_block = KEY_BLOCK if by_blocks else 0

    @staticmethod
    def checked(model: Any) -> Transformer:
        """`model`, if this class generates with such a one; `QuikError` if it does not."""
        return checked_model(model)

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        samples: int = 1,
        stop: SupportsIndex | Iterable[Any] | None = None,
        stop_strings: str | Sequence[str] = (),
        logprobs: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        step: int = CHUNK,
        beams: Beams | None = None,
    ) -> Generation:
        """Continue prompts, greedily unless `sampling` says otherwise.

        Args:
            prompts: rows of tokens, of any lengths.
            max_new_tokens: how many tokens to add at most to each.
            sampling: see `Sampling`.
            seed: for all prompts, or one for each. A row's text depends on its prompt, its seed and which sample it is.
            samples: continuations of each prompt.
            stop: a row ends before this token, or before any of several. Left out, they are the model's own (`model.stops`);
                empty, no row ends at a token.
            stop_strings: a row's text ends before this text, or before any of several.
            logprobs: return the log-probability of every token.
            on_text: called with a row's number and the text that became final, as it is decoded.
            step: steps between two looks at stop strings and two calls of `on_text`, at most 16.
            beams: search for the most likely continuations instead of choosing token by token; `samples` of them, the best
                first, are returned of each prompt, and `Generation.scores` has their scores. Texts become final as a whole.

        Raises:
            QuikError: a prompt is empty, has a token outside the vocabulary, or does not fit the context with what is asked for;
                a stop token is none of the vocabulary's; the cache does not fit the memory; beams are asked for together with
                drawing, stop strings, log-probabilities or `deterministic`, or fewer of them than samples.
        """
        sampling = Sampling() if sampling is None else sampling
        step = min(whole_number(step, "step"), CHUNK)
        if beams is not None and not isinstance(beams, Beams):
            raise QuikError(f"beams is a quikjax.Beams, such as Beams(count=4), not {described(beams)}")
        rows = self.rows(prompts, max_new_tokens, sampling, seed, 1 if beams else samples, stop_strings)
        stops = self.stops(stop)
        if beams is not None:
            samples = whole_number(samples, "the number of samples of each prompt")
            asked = {"stop_strings": bool(stop_strings), "logprobs": logprobs, "deterministic": self.deterministic}
            beams.check(samples, sampling, **asked)
            return self._searched(rows, max_new_tokens, sampling, samples, stops, on_text, beams)
        kind = Kind.of(sampling, logprobs)
        ended = frozenset(stops.tolist()) - {NOTHING}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        longest = max(len(row.prompt) for row in rows)
        self.check_memory(max(longest + max_new_tokens, bucket(longest)), min(len(rows), self.batch_size))
        compiling, prefill, decoding, decoded = self.programs.seconds, 0.0, 0.0, 0
        for group in groups:
            members = [rows[i] for i in group]
            start, before = time.perf_counter(), self.programs.seconds
            batch = self.start(members, max_new_tokens, sampling.values(), stops, kind)
            prefill += time.perf_counter() - start - (self.programs.seconds - before)
            start, before = time.perf_counter(), self.programs.seconds
            decoded -= len(members)  # the first tokens are the prefill's
            while True:
                given, given_logprobs = batch.advance(step)
                decoded += int((given[: len(members)] != NOTHING).sum())
                for b, row in enumerate(members):
                    piece = row.take(given[b].tolist(), None if given_logprobs is None else given_logprobs[b].tolist(), ended)
                    if piece and on_text is not None:
                        on_text(group[b], piece)
                batch.end(np.array([b >= len(members) or bool(members[b].finished) for b in range(len(given))]))
                if batch.remaining <= 0 or not batch.running.any():
                    break
            for b, row in enumerate(members):
                if not row.finished:
                    row.finished = "length"
                    if row.text is not None and (piece := row.text.finish()) and on_text is not None:
                        on_text(group[b], piece)
            decoding += time.perf_counter() - start - (self.programs.seconds - before)
        return collected(
            rows,
            max_new_tokens,
            max(int(stops[0]), 0),
            logprobs=logprobs,
            prompt_tokens=sum(len(row.prompt) for row in rows),
            decoded=decoded,
            prefill_seconds=prefill,
            decode_seconds=decoding,
            compile_seconds=self.programs.seconds - compiling,
        )

    def _searched(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        sampling: Sampling,
        samples: int,
        stops: np.ndarray,
        on_text: Callable[[int, str], None] | None,
        beams: Beams,
    ) -> Generation:
        """The best `samples` continuations of each row that a search finds."""
        values, kind = sampling.values(), Kind.of(sampling)
        ended = frozenset(stops.tolist()) - {NOTHING}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
        together = max(1, self.batch_size // beams.count)
        longest = max(len(row.prompt) for row in rows)
        texts = self._padded_rows(min(len(rows), together))
        self.check_memory(max(longest + max_new_tokens, bucket(longest)), texts * beams.count)
        found: dict[int, Row] = {}
        scores = np.zeros(len(rows) * samples, np.float32)
        compiling, prefill, decoding, decoded = self.programs.seconds, 0.0, 0.0, 0
        for group in (order[i : i + together] for i in range(0, len(order), together)):
            start, before = time.perf_counter(), self.programs.seconds
            batch = self.start_search([rows[i] for i in group], max_new_tokens, values, stops, kind, beams)
            prefill += time.perf_counter() - start - (self.programs.seconds - before)
            start, before = time.perf_counter(), self.programs.seconds
            while not batch.done:
                batch.advance()
            best = jax.tree.map(np.asarray, batch.search.ended)
            decoded += (int(batch.search.step) - 1) * len(group)
            decoding += time.perf_counter() - start - (self.programs.seconds - before)
            for b, i in enumerate(group):
                for sample in range(samples):
                    at = i * samples + sample
                    stream = None if self.tokenizer is None else self.stream(rows[i].prompt, ())
                    row = found[at] = Row(rows[i].prompt, rows[i].seed, sample, stream)
                    piece = row.take(best.tokens[b, sample, : best.lengths[b, sample]].tolist(), None, ended)
                    if not row.finished:
                        row.finished = "length"
                        piece += "" if row.text is None else row.text.finish()
                    scores[at] = best.scores[b, sample]
                    if piece and on_text is not None:
                        on_text(at, piece)
        return collected(
            [found[at] for at in range(len(scores))],
            max_new_tokens,
            max(int(stops[0]), 0),
            logprobs=False,
            prompt_tokens=sum(len(row.prompt) for row in rows),
            decoded=decoded,
            prefill_seconds=prefill,
            decode_seconds=decoding,
            compile_seconds=self.programs.seconds - compiling,
            scores=scores,
        )

    def rows(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | Sequence[int],
        samples: int,
        stop_strings: str | Sequence[str],
    ) -> list[Row]:
        """Rows to decode, checked."""
        if not isinstance(sampling, Sampling):
            raise QuikError(f"sampling is a quikjax.Sampling, such as Sampling(temperature=0.7), not {described(sampling)}")
        given = checked_prompts(prompts)
        given_seeds: Any = seed
        several = given_seeds if isinstance(seed, list | tuple) or np.ndim(given_seeds) else [seed] * len(given)
        seeds = [whole_number(one, "a seed", None) for one in several]
        if len(seeds) != len(given):
            raise QuikError(f"there are {len(given)} prompts and {len(seeds)} seeds; give one seed, or one for each prompt")
        for one in seeds:
            check_seed(one)
        samples = whole_number(samples, "the number of samples of each prompt")
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if any(not isinstance(text, str) for text in stop_strings):
            raise QuikError("stop strings are texts; tokens that end a text are given as stop")
        if samples > 1 and sampling.greedy:
            raise QuikError(f"{samples} greedy samples would be the same; give a temperature above 0")
        if any(not text for text in stop_strings):
            raise QuikError("a stop string is empty; every text would end at once")
        if stop_strings and self.tokenizer is None:
            raise QuikError("stop strings need a tokenizer; give one to the Generator, or stop at tokens")
        max_new_tokens = whole_number(max_new_tokens, "max_new_tokens")
        sampling.check_room(max_new_tokens)
        for prompt in given:
            self.check_prompt(prompt, max_new_tokens)

        return [
            Row(prompt, one, sample, None if self.tokenizer is None else self.stream(prompt, stop_strings))
            for prompt, one in zip(given, seeds, strict=True)
            for sample in range(samples)
        ]

    def stream(self, prompt: Sequence[int], stop_strings: Sequence[str]) -> TextStream:
        """The text that a row's tokens become, behind its prompt."""
        return TextStream(self.tokenizer, prompt, stop_strings)

    def forced(self, max_new_tokens: int) -> Forced | None:
        """The tokens that the model forces on a text of at most so many; a model that continues texts forces none."""
        return None

    def check_prompt(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise `QuikError` unless the prompt can be read and continued."""
        if len(prompt) == 0:
            raise QuikError("the prompt is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise QuikError(f"the prompt has a token outside the model's vocabulary of {self.config.vocab_size}")
        if len(prompt) + max_new_tokens > self.context:
            whose = "the model's context" if self.context == self.config.context_length else "the context"
            raise QuikError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed {whose} of {self.context}; "
                "shorten one of them"
            )

    def stops(self, stop: SupportsIndex | Iterable[Any] | None) -> np.ndarray:
        """Stop tokens as a program's argument, checked; `None` stands for the model's own."""
        several = self.model_stops if stop is None else stop if isinstance(stop, Iterable) else [stop]
        try:
            given = sorted({operator.index(token) for token in several})
        except TypeError:
            raise QuikError(f"stop is {stop!r}; give a token's number, or several of them") from None
        for token in given:
            if not 0 <= token < self.config.vocab_size:
                raise QuikError(f"the stop token {token} is outside the model's vocabulary of {self.config.vocab_size}")
        padded = np.full(-(-max(len(given), 1) // _STOPS) * _STOPS, NOTHING, np.int32)
        padded[: len(given)] = given
        return padded

    def slots(self, length: int) -> int:
        """Slots of a cache for texts of `length` tokens."""
        size = bucket(length)
        return max(-(-size // self.key_block), 2) * self.key_block if self.key_block else size

    def check_memory(self, length: int, rows: int) -> None:
        """Raise `QuikError` if a cache for texts of `length` tokens does not fit the memory that the parameters leave."""
        rows = self._padded_rows(rows)
        config, slots = self.config, self.slots(length)
        need = caches.cache_bytes(config.layers, config.kv_heads, rows, slots, config.head_size, self.cache)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        free = device_memory() - held
        if need <= free:
            return
        most = most_slots(config, self.cache, rows, free)
        # Slots only grow with the length, so the first length that has too many is found by bisection.
        fits = bisect.bisect_right(range(1, min(most, length) + 1), most, key=self.slots)
        raise QuikError(
            f"a {self.cache} KV cache for {rows} row{'s' if rows > 1 else ''} of {slots} tokens takes {need / 1e9:.3g} GB and "
            f"{max(free, 0) / 1e9:.3g} GB are free; at most {fits} tokens fit: "
            "give a smaller --context, fewer rows, or --kv-cache int8"
        )

    def _padded_rows(self, rows: int) -> int:
        if self.deterministic:
            return self.batch_size
        size = 1
        while size < rows:
            size *= 2
        return size

    def new_cache(self, batch: int, slots: int) -> StackedCache:
        """An empty cache."""
        config = self.config
        return self.programs.run(
            caches.empty_cache,
            (config.layers, config.kv_heads, batch, slots, config.head_size, self.cache, self.key_block),
            (),
        )

    def start(self, rows: Sequence[Row], max_new_tokens: int, values: Values, stops: np.ndarray, kind: Kind) -> Decoding:
        """Read the rows' prompts and choose their first tokens."""
        read = self.read(rows, max_new_tokens)
        batch = read.cache.batch
        lengths = np.array([len(text) for text in read.texts], np.int32)
        seeds = np.array([row.seed for row in rows] + [0] * (batch - len(rows)), np.uint32)
        numbers = np.array([row.sample for row in rows] + [0] * (batch - len(rows)), np.int32)
        real = np.arange(batch) < len(rows)
        return self.begin(read.texts, read.logits, read.cache, lengths, real, seeds, numbers, max_new_tokens, values, stops, kind)

    def start_search(
        self, rows: Sequence[Row], max_new_tokens: int, values: Values, stops: np.ndarray, kind: Kind, beams: Beams
    ) -> search.Searching:
        """Read the rows' prompts and choose the first tokens of their beams."""
        read = self.read(rows, max_new_tokens)
        lengths = np.array([len(text) for text in read.texts], np.int32)
        real, past = np.arange(read.cache.batch) < len(rows), self.past(read.texts, read.cache.slots, kind)
        given = (
            read.logits,
            read.cache,
            lengths,
            real,
            past,
            stops,
            values,
            self.forced(max_new_tokens),
            np.int32(max_new_tokens),
        )
        named = {"kind": kind, "beams": beams, "room": bucket(max_new_tokens)}
        state = self.programs.run(search.begin, (), given, named=named)
        return search.Searching(self.programs, self.layout, self.params, state, stops, values, max_new_tokens, kind, beams)

    def read(self, rows: Sequence[Row], max_new_tokens: int) -> Read:
        """Read the rows' prompts, and as many empty ones as make the batch whole, into a cache with room for the tokens."""
        batch = self._padded_rows(len(rows))
        prompts = [row.prompt for row in rows] + [[] for _ in range(batch - len(rows))]
        longest = max(len(prompt) for prompt in prompts)
        cache = self.new_cache(batch, self.slots(max(longest + max_new_tokens, bucket(longest))))
        logits: Any = np.zeros((batch, self.config.vocab_size), np.float32)
        # Prompts together, or each by itself as if it were alone.
        parts = [(b, prompts[b : b + 1]) for b in range(len(rows))] if self.deterministic else [(0, prompts)]
        for first, some in parts:
            ids, some_lengths = padded(some)
            given, fresh = self.programs.run(
                stacked.read, (self.layout,), (self.params, ids, some_lengths), named={"kind": self.cache}
            )
            cache, logits = self.programs.run(decode.place, (), (cache, logits, fresh, given, np.int32(first)), donate=(0,))
        return Read(prompts, logits, cache)

    def past(self, texts: Sequence[Sequence[int]], slots: int, kind: Kind) -> Past:
        """As much of texts as a program of this kind asks for, in a cache of so many slots."""
        seen = history = None
        if kind.penalized:
            seen = np.zeros((len(texts), self.config.vocab_size), bool)
            for b, text in enumerate(texts):
                seen[b, list(text)] = True
        if kind.ngram:
            history = np.full((len(texts), slots), NOTHING, np.int32)
            for b, text in enumerate(texts):
                history[b, : len(text)] = text
        return Past(seen=seen, history=history)

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        logits: Any,
        cache: StackedCache,
        lengths: np.ndarray,
        real: np.ndarray,
        seeds: np.ndarray,
        numbers: np.ndarray,
        max_new_tokens: int,
        values: Values,
        stops: np.ndarray,
        kind: Kind,
    ) -> Decoding:
        """Choose the first tokens from the logits behind the prompts, which are in the cache."""
        past = self.past(prompts, cache.slots, kind)
        keys = self.programs.run(row_keys, (), (seeds, numbers))
        tokens, logprobs, state = self.programs.run(
            decode.begin,
            (),
            (logits, cache, lengths, real, keys, past, stops, values, self.forced(max_new_tokens)),
            donate=(1,),
            named={"kind": kind},
        )
        first = (np.asarray(tokens), None if logprobs is None else np.asarray(logprobs))
        return Decoding(self, state, stops, values, kind, max_new_tokens - 1, first)
