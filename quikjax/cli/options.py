"""Options that several commands take, and what their text means."""

import math
from typing import Annotated, Any

import typer

from quikjax.errors import QuikError, did_you_mean

Model = Annotated[str, typer.Argument(help="smollm2-135m, a directory, a .gguf file, or a hub name org/name[@revision].")]
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


def parse_dtype(name: str) -> Any:
    """A floating dtype by its name."""
    known = ("float32", "bfloat16", "float16")
    if name not in known:
        raise QuikError(f'there is no dtype "{name}" to compute in; {did_you_mean(name, known)}')
    import jax.numpy as jnp

    return jnp.dtype(name)
