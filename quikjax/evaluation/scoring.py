"""Log-likelihoods of texts and greedy continuations: what a harness of tasks asks of a model.

Requests are sorted by length and go through the model in batches of about `BATCH_TOKENS` tokens, padded to a few lengths so that
few programs are compiled. Padding stands behind a row's tokens, where causal attention does not look, and activations are
quantized token by token: a request's result does not depend on its neighbours but for the order of float sums.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from quikjax.errors import QuikError
from quikjax.evaluation.forward import CHUNK, by_chunks, hidden_states
from quikjax.generation import Generator
from quikjax.models.base import CausalLM, Transformer
from quikjax.models.registry import pure_params
from quikjax.models.tokens import checked_model

BATCH_TOKENS = 2048
# Rows are padded to a multiple of this.
_STEP = 32

# Told after every batch: requests done, requests in all.
OnBatch = Callable[[int, int], None]


class Scorer:
    """A model and its tokenizer, asked for log-likelihoods and continuations.

    `prefix` is the token that stands before a text without context: the tokenizer's BOS, or its EOS where it has none.
    """

    def __init__(self, model: Transformer, tokenizer: Any, on_batch: OnBatch | None = None) -> None:
        self.model = model = checked_model(model)
        self.tokenizer = tokenizer
        self.length = model.config.context_length
        self._graphdef, self._params = nnx.split(model)[0], pure_params(model)
        self._told = on_batch or (lambda _done, _total: None)
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise QuikError("the tokenizer has neither a BOS nor an EOS token to put before a text; tasks cannot be scored")
        self.prefix = int(prefix)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A text's tokens; with `special`, with those that the tokenizer puts around a text, unless it begins with one."""
        if special and text.startswith(self.tokenizer.decode([self.prefix])):
            special = False
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows it, cut where they are cut when written together.

        Spaces at the end of the context go to the continuation, as words begin with theirs. Without context, the prefix stands
        there.
        """
        if not context:
            after = self.encode(continuation, special=False)
            return ([self.prefix], after) if after[:1] != [self.prefix] else (after[:1], after[1:])
        bare = context.rstrip()
        whole = self.encode(bare + context[len(bare) :] + continuation)
        before = self.encode(bare) if bare else [self.prefix]
        return before, whole[len(before) :] if bare else self.encode(context + continuation, special=False)

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-likelihood, and whether it is the greedy one.

        A pair longer than the model's context loses its beginning.

        Raises:
            QuikError: a continuation has no tokens, or more than the model's context; a result is not finite.
        """
        return self.score([self.encode_pair(*pair) for pair in pairs])

    def rolling_loglikelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text, every token predicted once, with as much context as the model has room for."""
        windows = [list(self._windows(self.encode(text, special=False))) for text in texts]
        scores = iter(self.score([window for part in windows for window in part]))
        return [float(sum(next(scores)[0] for _ in part)) for part in windows]

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts and the tokens to predict behind them: first a whole window after the prefix, then single new ones."""
        first = min(self.length, len(tokens))
        if first:
            yield [self.prefix], tokens[:first]
        # As the harness: each later window predicts one token more than a context of one leaves room for.
        done = first
        while done < len(tokens):
            end = min(done + self.length, len(tokens))
            yield tokens[end - self.length - 1 : done], tokens[done:end]
            done = end

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """`loglikelihoods` of tokens."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        lengths = []
        for before, after in pairs:
            if not after or len(after) > self.length:
                raise QuikError(
                    f"a continuation has {len(after)} tokens, where 1 to {self.length} can be scored; is the task's text empty?"
                )
            lengths.append(min(len(before) + len(after), self.length + 1) - 1)
        done = 0
        for members, length in batches(lengths):
            rows = np.zeros((max(1, BATCH_TOKENS // length), length), np.int32)
            where, targets, owner = [], [], []
            for row, index in enumerate(members):
                before, after = pairs[index]
                tokens = [*before, *after][-(self.length + 1) :]
                rows[row, : len(tokens) - 1] = tokens[:-1]
                where += [row * length + at for at in range(len(tokens) - 1 - len(after), len(tokens) - 1)]
                targets += after
                owner += [index] * len(after)
            hidden = hidden_states(self.model, rows)
            # Padded to chunks, so that few numbers of continuation tokens are compiled for.
            spare = -len(where) % CHUNK
            places = jnp.asarray(where + [0] * spare, jnp.int32)
            logs, best = _score(self._graphdef, self._params, hidden, places, jnp.asarray(targets + [0] * spare, jnp.int32))
            for index, log, greedy in zip(owner, np.asarray(logs, np.float64).tolist(), np.asarray(best).tolist(), strict=False):
                results[index] = (results[index][0] + log, results[index][1] and greedy)
            done += len(members)
            self._told(done, len(pairs))
        if not np.isfinite([log for log, _ in results]).all():
            raise QuikError("the model's logits are not finite; a weight or an activation overflowed, try dtype float32")
        return results

    def continuations(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (prompt, options) the greedy continuation, ending before the first of the texts `until`.

        Options are the harness': `until`, a text or several; `max_gen_toks`, by default 256. One generator answers all: prompts
        with the same options are decoded together, and programs are compiled once per bucket of lengths. A prompt that leaves
        no room for new tokens loses its beginning.

        Raises:
            QuikError: options ask for sampling, or for more tokens than the context has.
        """
        prompts = [self._prompt(*request) for request in requests]
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, (_, count, until) in enumerate(prompts):
            groups.setdefault((count, tuple(until)), []).append(index)
        results = [""] * len(requests)
        done = 0
        for (count, ends), members in groups.items():
            members.sort(key=lambda index: len(prompts[index][0]))
            for first in range(0, len(members), self._generator.batch_size):
                part = members[first : first + self._generator.batch_size]
                made = self._generator.generate(
                    [prompts[index][0] for index in part], max_new_tokens=count, stop_strings=[text for text in ends if text]
                )
                assert made.texts is not None  # it has a tokenizer
                for index, text in zip(part, made.texts, strict=True):
                    results[index] = text
                done += len(part)
                self._told(done, len(requests))
        return results

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, tokenizer=self.tokenizer)

    def _prompt(self, text: str, options: Mapping[str, Any]) -> tuple[list[int], int, list[str]]:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise QuikError("the task asks for sampling; only greedy continuations are made here")
        until = options.get("until") or []
        count = int(options.get("max_gen_toks", 256))
        room = self.length - count
        if count < 1 or room < 1:
            raise QuikError(f"the task asks for {count} new tokens; the model's context has {self.length}")
        return self.encode(text)[-room:] or [self.prefix], count, [until] if isinstance(until, str) else list(until)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it; with `answer`, up to where the model is to go on.

        Raises:
            QuikError: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise QuikError("the model's tokenizer has no chat template; evaluate without one")
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer, continue_final_message=not answer
        )
        return text


def batches(lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Rows that go together, longest first, and the length they are padded to.

    >>> list(batches([40, 3, 70, 64]))
    [([2], 96), ([3, 0], 64), ([1], 32)]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    at = 0
    while at < len(order):
        longest = lengths[order[at]]
        # Above a few steps, coarser ones: at most an eighth is padding, and few lengths are compiled for.
        step = _STEP * max(1, 2 ** ((longest // (8 * _STEP)).bit_length()) // 2)
        padded = -(-longest // step) * step
        size = max(1, BATCH_TOKENS // padded)
        members = [index for index in order[at : at + size] if lengths[index] > padded - step]
        yield members, padded
        at += len(members)


@partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef[CausalLM],
    params: Mapping[str, Any],
    hidden: Float[Array, "batch length hidden"],
    places: Int32[Array, " tokens"],
    targets: Int32[Array, " tokens"],
) -> tuple[Float32[Array, " tokens"], Bool[Array, " tokens"]]:
    """Log-probability of each target behind the hidden state at its place, and whether it is the most likely token."""
    model = nnx.merge(graphdef, params)

    def chunk(hidden: Array, targets: Array) -> tuple[Array, Array]:
        logs = jax.nn.log_softmax(model.head(hidden[None])[0])
        return jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0], jnp.argmax(logs, axis=1) == targets

    found: tuple[Array, Array] = by_chunks(chunk, hidden.reshape(-1, hidden.shape[2])[places], targets)
    return found
