"""Standard input and output that cannot fail on what is read from or written to them."""

import codecs
import os
import sys

# What our own tables and sentences hold beyond ASCII, for a terminal that has no more than that.
_PLAIN = {"±": "+-", "×": "x", "…": "...", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'", "→": "->", "·": "-"}


def prepare_streams() -> None:
    """Open what the caller closed (`2>&-`), on nothing, and let no character fail in stdout's or stderr's encoding.

    A result of hours must not be lost because a locale has no `±`. A closed descriptor would be given to the next file that is
    opened, and libraries that write to 1 or 2 would write into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is the one that is missing.
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8")  # noqa: SIM115
    codecs.register_error("quikjax", _encode)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="quikjax")
    if hasattr(sys.stdin, "reconfigure"):  # a byte that is no text is said by whoever reads the line
        sys.stdin.reconfigure(errors="surrogateescape")


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    """Substitutes for characters that an encoding lacks: plain ones, the byte of a file's name that is no text, or `\\u1234`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode(), error.start + 1
