"""The command line. Results on stdout, progress and errors on stderr; heavy imports wait inside the commands."""

import os
import sys

from quikjax.errors import QuikError


def main() -> None:
    """Entry point of `quikjax`. A mistake ends in one sentence and exit status 1; `--debug` shows the traceback."""
    from quikjax.cli.app import app

    debug = "--debug" in sys.argv
    try:
        app()
    except QuikError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        print(f"error: {unexpected(error)}", file=sys.stderr)
        sys.exit(1)


def unexpected(error: Exception) -> str:
    """One sentence about an error that is not the user's mistake; out of memory is the one that has a remedy.

    >>> unexpected(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes"))
    'not enough memory; use a smaller --window, --samples or --seqlen, or a smaller model (--debug shows where)'
    >>> unexpected(ValueError("odd"))
    'ValueError: odd (this is a fault of quikjax; please report it with the output of --debug)'
    """
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first or "Out of memory" in first:
        return "not enough memory; use a smaller --window, --samples or --seqlen, or a smaller model (--debug shows where)"
    return f"{type(error).__name__}: {first} (this is a fault of quikjax; please report it with the output of --debug)"
