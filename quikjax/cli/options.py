"""Options that several commands take, and what their text means."""

import math
import sys
from typing import Annotated, Any

import typer

from quikjax.errors import QuikError

Model = Annotated[str, typer.Argument(help="smollm2-135m, a directory, a .gguf file, or a hub name org/name[@revision].")]
Artifact = Annotated[str, typer.Argument(help="What `quantize` wrote: its directory, or a hub name org/name[@revision].")]
Context = Annotated[
    int | None,
    typer.Option(help="The longest text in tokens, in place of what the model declares; left out, what it declares."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def parse_outliers(text: str) -> int | float:
    """A count or a fraction.

    >>> parse_outliers("36"), parse_outliers("0.125"), parse_outliers("1/16")
    (36, 0.125, 0.0625)
    """
    try:
        if "/" in text:
            above, below = text.split("/")
            return int(above) / int(below)
        return float(text) if "." in text else int(text)
    except (ValueError, ZeroDivisionError):
        raise QuikError(f'--outliers takes a count or a fraction such as 0.0625 or 1/16, not "{text}"') from None


def parse_activation_memory(gigabytes: float | None) -> int | None:
    """GB as bytes.

    >>> parse_activation_memory(0.5), parse_activation_memory(None)
    (500000000, None)
    """
    if gigabytes is None:
        return None
    if not 0 < gigabytes < math.inf:
        raise QuikError(f"--activation-memory takes the GB that activations may use, more than 0, not {gigabytes:g}")
    return int(gigabytes * 1e9)


def read_prompt(prompt: str) -> str:
    """The prompt as typed, or what is on standard input for "-", without its final newline. A byte order mark is no part of it.

    Raises:
        QuikError: it is empty or not UTF-8, or standard input is closed.
    """
    if prompt == "-":
        if sys.stdin is None:
            raise QuikError("the prompt - is read from standard input, which is closed; pipe a text into it")
        from quikjax.files import decode
        from quikjax.texts import without_final_newline

        try:
            text = without_final_newline(decode(sys.stdin.buffer.read(), "the prompt on standard input"))
        except OSError as problem:
            raise QuikError(f"the prompt on standard input cannot be read ({problem.strerror})") from None
    else:
        text = prompt.removeprefix("\ufeff")
        # Bytes that are not UTF-8 arrive as lone halves of surrogate pairs.
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
            raise QuikError("the prompt is not UTF-8 text; convert it first")
    if not text:
        raise QuikError("the prompt is empty; give some text")
    return text


def parse_dtype(name: str) -> Any:
    """A floating dtype by its name."""
    from quikjax.models.registry import floating_dtype

    return floating_dtype(name)
