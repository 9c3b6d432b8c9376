"""Paths and small files as people write them: `~`, byte order marks, other encodings, files that are only pointers; and JSON out.

Everything that opens a file of the user's goes through here, so that each kind of accident has one sentence, everywhere the same.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError

# The first bytes of the small text file that git checks out where git-lfs is not installed.
_LFS = b"version https://git-lfs.github.com/spec/"
_LONGEST_NAME = 255  # bytes, on every common file system
# Byte order marks of encodings that are not UTF-8; UTF-32's little-endian one begins with UTF-16's.
_OTHER_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def user_path(path: Any) -> Path:
    """A path as a person gives it, with a leading `~` or `~user` expanded.

    Raises:
        QuikError: it is empty, holds a NUL character or a name that is too long, or is no path at all.
    """
    if not isinstance(path, str | os.PathLike):
        raise QuikError(f"a path is expected, as text or pathlib.Path, not {described(path)}")
    text = os.path.expanduser(os.fspath(path))
    if not isinstance(text, str):
        text = os.fsdecode(text)
    try:
        too_long = any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(text).parts)
    except UnicodeEncodeError:  # half of a surrogate pair, which no file system can hold
        too_long = True
    if not text or "\0" in text or too_long:
        shown = text if len(text) < 80 else f"{text[:60]}..."
        raise QuikError(f"{shown!r} is not a path")
    return Path(text)


def described(value: Any) -> str:
    """Describe a value of the wrong type for an error: its type, and the value where that is short.

    >>> described(3), described(None), described([1] * 99)
    ('3 (int)', 'None', 'a list')
    """
    if value is None:
        return "None"
    kind = type(value).__name__
    shown = repr(value) if isinstance(value, str | bytes | bool | int | float) else ""
    return f"{shown} ({kind})" if 0 < len(shown) <= 40 else f"a{'n' if kind[0].lower() in 'aeiou' else ''} {kind}"


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; lines end in "\\n", whatever they end in there.

    Raises:
        QuikError: it cannot be read, is in another encoding, or is the pointer that git-lfs leaves.
    """
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise QuikError(f"{path} cannot be read ({problem.strerror or problem})") from None
    if is_lfs_pointer(content):
        raise lfs_pointer(path)
    # As Python's text mode does: a text is the same tokens whether or not a system has put carriage returns into it.
    return decode(content, str(path)).replace("\r\n", "\n").replace("\r", "\n")


def decode(content: bytes, where: str) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises:
        QuikError: they are in another encoding; `where` names them.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise QuikError(f"{where} is {encoding} text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise QuikError(f"{where} is not UTF-8 text (byte {problem.start}); save it as UTF-8") from None


def typed_text(text: str, what: str) -> str:
    """A text as it was typed or piped in, without a byte order mark; `what` is what messages call it.

    Raises:
        QuikError: it is not UTF-8: such bytes arrive as lone halves of surrogate pairs.
    """
    text = text.removeprefix("\ufeff")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise QuikError(f"{what} is not UTF-8 text; convert it first")
    return text


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins so is not the file itself but what git-lfs fetches it by."""
    return beginning.startswith(_LFS)


def lfs_pointer(path: Path) -> QuikError:
    """The error about such a file."""
    return QuikError(f"{path} is a git-lfs pointer, not the file itself; fetch it with: git lfs pull")


def refuse_lfs_pointer(path: Path) -> None:
    """Look at a file's first bytes, if it is there and readable.

    Raises:
        QuikError: it is a pointer.
    """
    if is_lfs_pointer(beginning(path, len(_LFS))):
        raise lfs_pointer(path)


def beginning(path: Path, count: int) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(count)
    except OSError:
        return b""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        QuikError: it cannot be read, is not JSON, or holds something else.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise QuikError(f"{path} is not valid JSON ({problem}); copy or download it again") from None
    if not isinstance(content, dict):
        raise QuikError(f"{path} holds a JSON {type(content).__name__} where an object is expected")
    return content


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null, NumPy's become Python's, tuples lists.

    >>> finite({"a": float("inf"), "b": (1, float("nan"))})
    {'a': None, 'b': [1, None]}
    """
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
