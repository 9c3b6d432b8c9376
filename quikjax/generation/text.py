"""From tokens to text as they come: characters whole, leading spaces kept, stop strings never shown."""

from collections.abc import Sequence
from typing import Any

# What a decoder puts for bytes that are not (yet) a character.
_INCOMPLETE = "\ufffd"
# A character is at most 4 bytes; more unreadable tokens in a row are not the start of one.
_MOST_INCOMPLETE = 4
# As many of the prompt's last tokens stand before a continuation while it is decoded: decoders drop the space before a text.
_CONTEXT = 4


class TextStream:
    """Text of a continuation, fed token by token.

    `text` is all that is final so far. `feed` returns what became final: a character whose bytes are not all there is held back,
    and so is what may be the beginning of a stop string. Once a stop string is found, `stopped` is true, `text` ends before it,
    and `tokens` counts the tokens that lie before it entirely.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self.tokens = 0
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._window = [int(token) for token in prompt[-_CONTEXT:]]
        self._read = len(self._window)  # of the window, how many tokens are text already
        self._held = ""
        self._fed = 0
        self._ends: list[int] = []  # where the text ended after each token

    def feed(self, tokens: Sequence[int]) -> str:
        """Text that became final with these tokens."""
        before = len(self.text)
        for token in tokens:
            if self.stopped:
                break
            self._one(int(token))
        return self.text[before:]

    def finish(self) -> str:
        """The text that was held back: no more follows."""
        before = len(self.text)
        if not self.stopped:
            self._accept(self._pending(), final=True)
            self.tokens = self._fed
        return self.text[before:]

    def _one(self, token: int) -> None:
        self._window.append(token)
        self._fed += 1
        pending = self._pending()
        if pending.endswith(_INCOMPLETE) and len(self._window) - self._read < _MOST_INCOMPLETE:
            return
        # The next text is decoded behind this one, so that the decoder sees what it continues.
        self._window = self._window[-max(_CONTEXT, len(self._window) - self._read) :]
        self._read = len(self._window)
        # The tokens of one character end together.
        self._ends += [len(self.text) + len(self._held) + len(pending)] * (self._fed - len(self._ends))
        self._accept(pending, final=False)
        if not self.stopped:
            self.tokens = self._fed

    def _pending(self) -> str:
        """The text of the window's tokens that are not text yet."""
        if self._read == len(self._window):
            return ""
        known, whole = (self._decode(self._window[:count]) for count in (self._read, None))
        return whole[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _accept(self, piece: str, *, final: bool) -> None:
        held = self._held + piece
        found = [at for stop in self._stop_strings if (at := held.find(stop)) >= 0]
        if found:
            self.text += held[: min(found)]
            self._held, self.stopped = "", True
            self.tokens = sum(end <= len(self.text) for end in self._ends)
            return
        keep = 0 if final else max((_overlap(held, stop) for stop in self._stop_strings), default=0)
        self.text += held[: len(held) - keep]
        self._held = held[len(held) - keep :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`.

    >>> _overlap("ab\\n", "\\n\\n"), _overlap("ab", "x")
    (1, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
