"""Errors a user can act on: one sentence that says what is wrong and what to do."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class QuikError(Exception):
    """A mistake in the input or the surroundings, told in one sentence. The command line prints it without a traceback."""


class Interrupted(Exception):
    """Ctrl-C ended a command. The command line says so in one line and exits with 130; a text says what remains to be done."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, then all of them.

    >>> did_you_mean("quik4b", ["quik-4b", "fp"])
    'did you mean "quik-4b"? (known: quik-4b, fp)'
    >>> did_you_mean("zzz", ["quik-4b", "fp"])
    'known: quik-4b, fp'
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    listing = "known: " + ", ".join(known)
    return f'did you mean "{near[0]}"? ({listing})' if near else listing


@contextlib.contextmanager
def resumable(doing: str) -> Iterator[None]:
    """Turn an error of the disk in a run that can go on later into one sentence, `doing` before it.

    >>> with resumable("cannot write x"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    quikjax.errors.QuikError: cannot write x: No space left on device; make room and run the same command again
    """
    try:
        yield
    except OSError as error:
        # NumPy's own errors of writing have text only.
        raise QuikError(f"{doing}: {error.strerror or error}; make room and run the same command again") from None
