"""Text as it comes: the pieces make the text that decoding everything at once gives, and no piece is taken back."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.generation.text import TextStream
from quikjax.testing import tiny_tokenizer
from quikjax.texts import continuation

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=5), text=st.text(max_size=20))
def test_pieces_make_the_text_and_characters_are_whole(prompt: str, text: str) -> None:
    stream = TextStream(TOKENIZER, ids(prompt))
    pieces = [stream.feed([token]) for token in ids(text)]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert stream.tokens == len(ids(text))


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="ab\n é", max_size=30), stop=st.sampled_from(["ab", "\n\n", "é", "aab"]))
def test_what_follows_a_stop_string_is_never_shown(text: str, stop: str) -> None:
    stream = TextStream(TOKENIZER, [], [stop])
    pieces = [stream.feed([token]) for token in ids(text)]
    pieces.append(stream.finish())
    expected = text.split(stop)[0]
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (stop in text)
    assert TOKENIZER.decode(ids(text)[: stream.tokens]) == expected


def test_bytes_that_are_no_character_are_shown_and_do_not_hold_the_rest_back() -> None:
    stream = TextStream(TOKENIZER)
    whole = [ids("é")[0]] * 6 + ids("ok")
    pieces = [stream.feed([token]) for token in whole]
    assert "ok" in "".join(pieces)
    stream.finish()
    assert stream.text.endswith("ok")


class Spaced:
    """Decodes as SentencePiece does: words carry their space, and the first one of a text loses it."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f" w{token}" for token in tokens).removeprefix(" ")


@pytest.mark.parametrize("prompt", [[], [1], [1, 2, 3, 4, 5, 6]])
def test_leading_spaces_are_kept(prompt: list[int]) -> None:
    stream = TextStream(Spaced(), prompt)
    shown = stream.feed([7]) + stream.feed([8, 9]) + stream.finish()
    assert shown == continuation(Spaced(), prompt, [7, 8, 9]) == (" w7 w8 w9" if prompt else "w7 w8 w9")
