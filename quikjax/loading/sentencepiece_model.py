"""SentencePiece's `tokenizer.model`: its pieces and the rules for a text, read from the Protocol Buffers message that it is.

Only the few fields are read that decide how a text becomes tokens (`sentencepiece_model.proto`), so that neither the package
`sentencepiece` nor `protobuf` has to be installed.
"""

import enum
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from quikjax.errors import QuikError


class Kind(enum.IntEnum):
    """The kinds of pieces, numbered as in `ModelProto.SentencePiece.Type`; GGUF's `tokenizer.ggml.token_type` is the same."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Pieces(NamedTuple):
    """A vocabulary: three lists of one length, by token id."""

    tokens: list[str]
    scores: list[float]
    kinds: list[int]


class SentencePieceModel(NamedTuple):
    """A `tokenizer.model`: the vocabulary, how it is applied, and the ids of its special tokens (negative: there is none)."""

    pieces: Pieces
    unigram: bool  # else BPE
    space_prefix: bool  # a space is put in front of a text
    collapse_spaces: bool  # spaces at both ends go, several between become one
    charsmap: bytes  # compiled normalization of characters; empty for none
    unk_id: int
    bos_id: int
    eos_id: int
    pad_id: int


_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


def read_model(path: Path) -> SentencePieceModel:
    """The model in the file at `path`.

    Raises:
        QuikError: the file is damaged, or of a kind whose tokens could not be reproduced.
    """
    try:
        message = list(_fields(path.read_bytes()))
        pieces = Pieces([], [], [])
        for number, value in message:
            if number == 1:
                fields = dict(_fields(value))
                pieces.tokens.append(fields[1].decode("utf-8"))
                pieces.scores.append(struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0)
                pieces.kinds.append(fields.get(3, Kind.NORMAL))
        trainer, normalizer = ({k: v for number, part in message if number == of for k, v in _fields(part)} for of in (2, 3))
        charsmap = bytes(normalizer.get(2, b""))
    except OSError as problem:
        raise QuikError(f"{path} cannot be read ({problem.strerror})") from None
    except (ValueError, KeyError, IndexError, struct.error, AttributeError, TypeError):
        raise QuikError(f"the tokenizer in {path} cannot be read: it is damaged; copy or download it again") from None
    if not pieces.tokens:
        raise QuikError(f"the tokenizer in {path} cannot be read: it has no pieces; copy or download it again")
    kind = trainer.get(3, 1)
    if kind not in (1, 2):
        named = _MODEL_TYPES.get(kind, kind)
        raise QuikError(f"{path}: SentencePiece models of type {named} are not supported, only BPE and unigram")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise QuikError(f"{path}: a SentencePiece model that writes spaces behind words, or as spaces, is not supported")
    return SentencePieceModel(
        pieces,
        unigram=kind == 1,
        space_prefix=bool(normalizer.get(3, 1)),
        collapse_spaces=bool(normalizer.get(4, 1)),
        charsmap=charsmap,
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        pad_id=_signed(trainer.get(43, (1 << 64) - 1)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message in order, by number: whole numbers as they are, everything else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == 0:
            value, at = _varint(message, at)
        elif wire in (1, 2, 5):
            size, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(message, at)
            if at + size > len(message):
                raise ValueError("a field reaches beyond the end")
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"there is no wire type {wire}")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, seven bits a byte, the lowest first; and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _signed(value: int) -> int:
    """An int32, which the format writes as the two's complement of 64 bits."""
    return value - (1 << 64) if value >> 63 else value
