"""A conversation: turns put into the model's own template, the oldest forgotten when the context is full, the cache kept."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from quikjax.errors import QuikError
from quikjax.generation.decode import NOTHING, Kind
from quikjax.generation.generator import Generator
from quikjax.generation.prefix import Prefix
from quikjax.generation.settings import Sampling

Message = dict[str, str]


def render(tokenizer: Any, messages: list[Message], template: str | None = None) -> list[int]:
    """The tokens of a conversation in the tokenizer's chat template (or another), ready for the assistant's answer.

    Raises:
        QuikError: there is no template, or it fails, with its own reason.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise QuikError(
            "the model has no chat template, so it is a base model that continues texts; give --template FILE to chat"
        )
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # whatever a template's author, or Jinja, raises
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise QuikError(f"the chat template fails: {reason[0]}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise QuikError("the chat template makes an empty text of the conversation")
    return [int(token) for token in ids]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer: its text, why it ended, and figures. `reused` of the prompt's tokens were in the cache; `dropped` counts the
    turns forgotten for it; seconds are without compiling.
    """

    text: str
    finished: str
    prompt_tokens: int
    reused: int
    new_tokens: int
    dropped: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded per second, 0 for a single one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class Conversation:
    """Turns of a user and a model. `messages` are those still remembered, a system message first if there is one.

    Args:
        generator: with a tokenizer.
        template: a Jinja chat template in place of the tokenizer's own.
        system: the system message.

    Raises:
        QuikError: there is no tokenizer, or no template, or it fails on a first message.
    """

    def __init__(self, generator: Generator, *, template: str | None = None, system: str | None = None) -> None:
        if generator.tokenizer is None:
            raise QuikError("the model has no tokenizer, so it cannot chat; put its tokenizer.json beside it")
        self._generator = generator
        self._template = template
        self._prefix = Prefix(generator)
        self._system = system
        self.messages: list[Message] = []
        self.reset(system)
        render(generator.tokenizer, [*self.messages, {"role": "user", "content": "?"}], template)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns; `system`, if given, becomes the system message."""
        self._system = self._system if system is None else system
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        step: int = 4,
    ) -> Answer:
        """The model's answer to a message, which both become part of the conversation.

        Whole turns, the oldest first, are forgotten until the prompt and `max_new_tokens` fit the context. `on_text` is called
        with what became final. After Ctrl-C the conversation holds what was answered until then.

        Raises:
            QuikError: the message does not fit the context by itself, or the template fails; the conversation is as before.
        """
        generator, sampling = self._generator, sampling or Sampling()
        messages, dropped = [*self.messages, {"role": "user", "content": text}], 0
        ids = render(generator.tokenizer, messages, self._template)
        first = 1 if messages[0]["role"] == "system" else 0
        while len(ids) + max_new_tokens > generator.context and len(messages) - first > 1:
            del messages[first : first + 2]
            dropped += 1
            ids = render(generator.tokenizer, messages, self._template)
        (row,) = generator.rows([ids], max_new_tokens, sampling, seed, 1, ())
        generator.check_memory(len(ids) + max_new_tokens, 1)
        stops = generator.stops(None)
        ended = frozenset(stops.tolist()) - {NOTHING}
        kind = Kind.of(sampling)
        start, compiling = time.perf_counter(), generator.programs.seconds
        decoding = self._prefix.start(row, max_new_tokens, sampling.values(), stops, kind)
        read, compiled = time.perf_counter(), generator.programs.seconds
        chosen: list[int] = []
        self.messages = messages
        assert row.text is not None
        try:
            while True:
                tokens, _ = decoding.advance(step)
                chosen += [token for token in tokens[0].tolist() if token != NOTHING]
                piece = row.take(tokens[0].tolist(), None, ended)
                if piece and on_text is not None:
                    on_text(piece)
                if row.finished or decoding.remaining <= 0:
                    break
            if not row.finished:
                row.finished = "length"
                if (piece := row.text.finish()) and on_text is not None:
                    on_text(piece)
            self._prefix.keep(decoding, chosen)
        finally:
            self.messages = [*messages, {"role": "assistant", "content": row.text.text}]
        return Answer(
            text=row.text.text,
            finished=row.finished,
            prompt_tokens=len(ids),
            reused=self._prefix.reused,
            new_tokens=len(chosen),
            dropped=dropped,
            prefill_seconds=read - start - (compiled - compiling),
            decode_seconds=time.perf_counter() - read - (generator.programs.seconds - compiled),
        )
