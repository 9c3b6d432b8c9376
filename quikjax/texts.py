"""Texts to calibrate and evaluate on: files, and a few names. What is offline by default ships inside every CPython."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from quikjax.errors import QuikError, did_you_mean
from quikjax.files import read_text, user_path

# Of pydoc's topics every fourth, in alphabetical order, is kept for evaluation.
_EVERY = 4
NAMES = ("pydoc", "wikitext2", "ptb", "c4")
# C4 is evaluated on the first documents of its first validation file, and calibrated on those of its first training file.
_C4_DOCUMENTS = 1100


class Text(NamedTuple):
    """A text and, for people, where it came from."""

    origin: str
    content: str


def calibration_text(name: str | Path) -> Text:
    """A text to calibrate on: a file, "pydoc" (three of four topics of `pydoc_data.topics`), or a training set by name.

    Names are "wikitext2", "ptb" and "c4" (the first 1100 documents), through `datasets`, prepared as the papers do.

    Raises:
        QuikError: no such file or name, the file is empty or not UTF-8, or the data set cannot be had.
    """
    return _text(name, evaluation=False)


def evaluation_text(name: str | Path) -> Text:
    """A text to evaluate on: a file, "pydoc" (the quarter that calibration never sees), or a test set by name.

    Names are "wikitext2", "ptb" and "c4" (the first 1100 documents of its validation set).

    Raises:
        QuikError: as `calibration_text`.
    """
    return _text(name, evaluation=True)


def _text(name: str | Path, *, evaluation: bool) -> Text:
    path = user_path(name)
    if path.is_file():
        return Text(path.name, _read(path))
    if str(name) == "pydoc":
        return _pydoc(evaluation=evaluation)
    if str(name) in NAMES:
        return _published(str(name), "test" if evaluation else "train")
    if path.is_dir():
        raise QuikError(f"{path} is a directory; give a text file, or one of: {', '.join(NAMES)}")
    raise QuikError(f'there is no text file "{name}"; {did_you_mean(str(name), NAMES)}')


def _read(path: Path) -> str:
    content = read_text(path)
    if not content.strip():
        raise QuikError(f"{path} is empty; give a file with text")
    return content


def _pydoc(*, evaluation: bool) -> Text:
    from pydoc_data.topics import topics

    held_out: dict[str, None] = {}
    others: dict[str, None] = {}
    for index, key in enumerate(sorted(topics)):
        paragraphs = dict.fromkeys(part.strip("\n") for part in topics[key].split("\n\n") if part.strip())
        (held_out if index % _EVERY == _EVERY - 1 else others).update(paragraphs)
    # Topics quote each other, whole paragraphs long: none may stand on both sides of the split.
    chosen = held_out if evaluation else [part for part in others if part not in held_out]
    part = "every fourth topic" if evaluation else "the other three of four topics"
    return Text(f"pydoc_data.topics ({part})", "\n\n".join(chosen))


def _published(name: str, split: str) -> Text:
    """A data set through `datasets`, its rows joined as GPTQ's code does, which the later papers took over."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise QuikError(
            f"{name} comes through the package `datasets`; run: pip install 'quikjax[datasets]', or give a text file"
        ) from None
    try:
        if name == "wikitext2":
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
            return Text(f"wikitext-2-raw-v1 ({split})", "\n\n".join(rows["text"]))
        if name == "ptb":
            # The branch that the hub made of what was published as a script.
            rows = load_dataset("ptb-text-only/ptb_text_only", "penn_treebank", revision="refs/convert/parquet", split=split)
            return Text(f"Penn Treebank ({split})", " ".join(rows["sentence"]))
        split = "train" if split == "train" else "validation"
        file = f"en/c4-{split}.00000-of-{'01024' if split == 'train' else '00008'}.json.gz"
        rows = load_dataset("allenai/c4", data_files={split: file}, split=split)
        return Text(f"C4 ({split}, first {_C4_DOCUMENTS} documents)", " ".join(rows[:_C4_DOCUMENTS]["text"]))
    except Exception as error:  # whatever the network and the hub raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise QuikError(f"{name} could not be loaded ({reason}); give a text file instead") from None


def tokenize(tokenizer: Any, text: str) -> Int32[np.ndarray, " tokens"]:
    """The text as one row of tokens, to be continued: what the tokenizer puts before a text is there, what it puts behind is not.

    A prompt is not a finished text, and neither is one that windows are cut from: an end behind it would make a model begin
    another. BOS that the text itself begins with is not doubled.
    """
    inner = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before = _before(tokenizer, text[:16] if inner else "a")
    # Less what the text begins with itself.
    typed = next((n for n in range(len(before), 0, -1) if inner[:n] == before[-n:]), 0)
    return np.asarray([*before[: len(before) - typed], *inner], np.int32)


def _before(tokenizer: Any, text: str) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    inner = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    around = tokenizer(text, verbose=False)["input_ids"]
    return next((around[:at] for at in range(len(around)) if around[at : at + len(inner)] == inner), [])


def continuation(tokenizer: Any, prompt: Iterable[Any], new: Iterable[Any]) -> str:
    """The text that the tokens `new` add behind the tokens `prompt`, without special tokens.

    It is what decoding both together has more than decoding the prompt alone. Tokens decoded by themselves would lose the space
    that some tokenizers write before the first word, and the character whose first bytes are the prompt's last token.
    """
    before, both = (_decode(tokenizer, [*map(int, ids)]) for ids in (prompt, [*prompt, *new]))
    common = next((at for at, (a, b) in enumerate(zip(before, both, strict=False)) if a != b), min(len(before), len(both)))
    return both[common:]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Cleaning up would move spaces where prompt and continuation meet.
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def without_final_newline(text: str) -> str:
    """A text from standard input, without the newline with which `echo` and editors end it.

    >>> without_final_newline("x\\n"), without_final_newline("x\\n\\n")
    ('x', 'x\\n')
    """
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def calibration_windows(tokens: Int32[np.ndarray, " tokens"], samples: int, length: int) -> Int32[np.ndarray, "samples length"]:
    """The first `samples` windows of `length` tokens of a text, not overlapping.

    Raises:
        QuikError: the text is too short, or a number is not positive.
    """
    if samples < 1 or length < 1:
        raise QuikError(f"samples and seqlen must be positive, not {samples} and {length}")
    if len(tokens) < samples * length:
        raise QuikError(
            f"the calibration text has {len(tokens)} tokens, {samples} x {length} = {samples * length} are needed; "
            "give more text, or lower --samples or --seqlen"
        )
    return tokens[: samples * length].reshape(samples, length)


class Framed(NamedTuple):
    """A text as tokens, and the tokens that a tokenizer puts around one ([CLS] and [SEP])."""

    inner: Int32[np.ndarray, " tokens"]
    before: tuple[int, ...]
    behind: tuple[int, ...]

    def room(self, length: int) -> int:
        """How many tokens of the text fit a window of `length`.

        Raises:
            QuikError: none.
        """
        room = length - len(self.before) - len(self.behind)
        if length > 0 and room < 1:
            around = len(self.before) + len(self.behind)
            raise QuikError(f"a window of {length} tokens has no room for a text beside the {around} around it")
        return room

    def around(self, rows: Int32[np.ndarray, "samples room"]) -> Int32[np.ndarray, "samples length"]:
        """Pieces of the text, each with what belongs around it."""
        frame = [np.tile(np.asarray(tokens, np.int32), (len(rows), 1)) for tokens in (self.before, self.behind)]
        return np.concatenate([frame[0], rows, frame[1]], axis=1)


def framed(tokenizer: Any, text: str) -> Framed:
    """A text as tokens, apart from what its tokenizer puts around it."""
    inner = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    around = tokenizer(text, verbose=False)["input_ids"]
    at = next((at for at in range(len(around)) if around[at : at + len(inner)] == inner), 0)
    return Framed(np.asarray(inner, np.int32), tuple(around[:at]), tuple(around[at + len(inner) :]))


def framed_windows(tokenizer: Any, text: str, samples: int, length: int) -> Int32[np.ndarray, "samples length"]:
    """The first `samples` windows of a text, each with what the tokenizer puts around one, `length` tokens in all.

    Raises:
        QuikError: the text is too short, `length` leaves no room for a token of it, or a number is not positive.
    """
    found = framed(tokenizer, text)
    return found.around(calibration_windows(found.inner, samples, found.room(length)))


def tokens_fingerprint(tokens: Int32[np.ndarray, "..."]) -> str:
    """SHA-256 over the tokens and their shape."""
    return hashlib.sha256(repr(tokens.shape).encode() + np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
