"""Options of the commands that generate text."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.errors import QuikError

if TYPE_CHECKING:
    from quikjax.generation.sampling import Sampling

Temperature = Annotated[
    float | None, typer.Option(help="Divides the logits; 0 is greedy. Left out: 0, or 1 where tokens are chosen among.")
]
TopK = Annotated[int, typer.Option(help="Draw among so many most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Draw among the fewest tokens with this much probability.")]
MinP = Annotated[float, typer.Option(help="Draw among tokens at least so many times as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens of the text so far become less likely.")]
Seed = Annotated[int, typer.Option(help="A text depends on its prompt and this number.")]
System = Annotated[str | None, typer.Option(help="The chat's system message.")]
Template = Annotated[Path | None, typer.Option(help="A Jinja chat template in place of the model's own.")]
KvCache = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16 or int8 (per token and head); left out, the activations' dtype, on a CPU float32."
    ),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The bits of a row do not depend on the rows beside it; slower.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")]
CacheDir = Annotated[
    Path | None, typer.Option(help="Folder where compiled programs are kept [default: $QUIKJAX_CACHE, or ~/.cache/quikjax].")
]


def sampling_of(temperature: float | None, top_k: int, top_p: float, min_p: float, repetition_penalty: float) -> "Sampling":
    """The settings as given; without a temperature it is 1 where tokens are chosen among, and greedy otherwise."""
    from quikjax.generation.sampling import Sampling

    if temperature is None:
        temperature = 1.0 if top_k or top_p < 1 or min_p else 0.0
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)


def read_template(path: Path | None) -> str | None:
    """A chat template's text."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuikError(
            f"cannot read the template {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from None


@contextlib.contextmanager
def interrupted(finish: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C inside ends the command, after `finish`: what was printed stays, and its line is ended."""
    try:
        yield
    except KeyboardInterrupt:
        finish()
        raise
