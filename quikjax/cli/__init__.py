"""The command line. Results on stdout, progress and errors on stderr; heavy imports wait inside the commands."""

import os
import sys
import warnings

from quikjax.errors import Interrupted, QuikError


def main() -> None:
    """Entry point of `quikjax`. A mistake ends in one sentence and exit status 1, Ctrl-C in one line and 130.

    `--debug` shows the traceback of an error.
    """
    debug = "--debug" in sys.argv
    try:
        from quikjax.cli.streams import prepare_streams

        prepare_streams()
        warnings.formatwarning = _warning
        from quikjax.cli.app import app

        app()
    except (KeyboardInterrupt, Interrupted) as error:
        _end(f"interrupted{f'; {error}' if str(error) else ''}", 130)
    except QuikError as error:
        if debug:
            raise
        _end(f"error: {error}")
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _end(f"error: {unexpected(error)}")


def _end(line: str, status: int = 1) -> None:
    # One line, whatever a library's error or a file's name has in it.
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(status)


def _warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A library's warning as one line, without the path and the source line that mean nothing to who runs a command."""
    return f"warning: {' '.join(str(message).split())}\n"


def unexpected(error: Exception) -> str:
    """One sentence about an error that is not the user's mistake; out of memory is the one that has a remedy.

    >>> unexpected(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes"))
    'not enough memory; use a smaller --window, --samples or --seqlen, or a smaller model (--debug shows where)'
    >>> unexpected(FileNotFoundError(2, "No such file or directory", "x/y"))
    'x/y: No such file or directory'
    >>> unexpected(ValueError("odd"))
    'ValueError: odd (this is a fault of quikjax; please report it with the output of --debug)'
    """
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first or "Out of memory" in first:
        return "not enough memory; use a smaller --window, --samples or --seqlen, or a smaller model (--debug shows where)"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {first} (this is a fault of quikjax; please report it with the output of --debug)"
