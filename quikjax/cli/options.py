"""Options that several commands take, and what their text means."""

import math
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quikjax.errors import QuikError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    from quikjax.quantizing.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(help="smollm2-135m, all-minilm-l6-v2, a directory, a .gguf file, or a hub name org/name[@revision]."),
]
Artifact = Annotated[str, typer.Argument(help="What `quantize` wrote: its directory, or a hub name org/name[@revision].")]
Context = Annotated[
    int | None,
    typer.Option(help="The longest text in tokens, in place of what the model declares; left out, what it declares."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

RecipeName = Annotated[
    str,
    typer.Option(
        help="quik-4b, quik-4b+, quik-8b, w4a8, rtn-w4a4 (-sym: symmetric activations), gptq-w4a16 (-g128: in groups), "
        "quik-4b-sparse, zeroquant-w4a8 (-lkd: distilled); codebooks of weights: int3 to int8, float3 to float8, dynamic4, "
        "quantile4, nf4, fp4; fp; or a .json file."
    ),
]
Samples = Annotated[
    int | None, typer.Option(help="Calibration sequences; left out, 16, of an encoder as many as make 8192 tokens.")
]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens per calibration sequence; left out, 2048 or the model's context, of an encoder 128."),
]
Outliers = Annotated[str | None, typer.Option(help="Columns in FP16: a count, or a fraction such as 0.0625 or 1/16.")]
BlockSize = Annotated[
    str | None,
    typer.Option(
        help="Of a codebook recipe: weights that share one absmax, or tensor; left out, 64. Of one in groups: inputs that share "
        "a scale; left out, 128."
    ),
]
Proxy = Annotated[
    str | None,
    typer.Option(help="Of a codebook recipe: the share of input columns kept in FP16 by the producing layer's weights."),
]
Method = Annotated[
    str | None,
    typer.Option(help="Of a codebook recipe: rtn, to the nearest value; or gptq, with calibration text. Left out, rtn."),
]

Keep = Annotated[
    str | None,
    typer.Option(help="Layers that stay in 16 bits: a part of their path, attention.output, or a regular expression, fc1|fc2."),
]


def choose_recipe(
    name: str, outliers: str | None, block: str | None, proxy: str | None, method: str | None, keep: str | None = None
) -> "Recipe":
    """A recipe by name or file, with the options that were given.

    Raises:
        QuikError: there is no such recipe, or an option is none of its.
    """
    from quikjax.quantizing.group_rule import GroupRule
    from quikjax.quantizing.recipe import find_recipe

    chosen = find_recipe(name)
    if outliers is not None:
        chosen = chosen.with_outliers(parse_outliers(outliers))
    fields: dict[str, Any] = {}
    if block is not None:
        size = parse_block(block)
        if isinstance(size, int) and any(isinstance(rule, GroupRule) for rule in chosen.rules):
            chosen = chosen.with_group_size(size)
        else:
            fields["block"] = size
    if proxy is not None:
        fields["proxy"] = float(parse_outliers(proxy, "--proxy"))
    if method is not None:
        if method not in ("rtn", "gptq"):
            raise QuikError(f'there is no method "{method}"; {did_you_mean(method, ("rtn", "gptq"))}')
        fields["method"] = method
    chosen = chosen.with_codebook(**fields) if fields else chosen
    return chosen if keep is None else chosen.keeping(keep)


def check_kept(keep: str | None, paths: "Iterable[str]") -> None:
    """Refuse to keep layers that there are not.

    Raises:
        QuikError: `keep` is found in none of the `paths` of a model's parameters.
    """
    if keep is not None and not any(re.search(keep, path) for path in paths):
        raise QuikError(f'--keep "{keep}" is in no layer\'s path; quikjax plan prints the paths')


def check_models(*models: str | None) -> None:
    """Refuse names that nothing on this machine has, before anything heavy is imported. Hub names are looked up later.

    Raises:
        QuikError: naming the first of them and what is near it.
    """
    from quikjax.loading.locate import find_here

    for model in models:
        if model is not None:
            find_here(model)


def check_artifact(artifact: str) -> "Path":
    """`check_models` for what must be an artifact; its directory.

    Raises:
        QuikError: there is no such directory, or it is not an artifact's.
    """
    from quikjax.checkpoint.locate import locate, refuse_foreign

    directory = locate(artifact)
    refuse_foreign(directory)
    return directory


def parse_block(text: str) -> int | str:
    """A number of weights, or "tensor".

    >>> parse_block("64"), parse_block("tensor")
    (64, 'tensor')
    """
    if text == "tensor":
        return text
    if not text.isdigit() or int(text) < 1:
        raise QuikError(f'--block takes a number of weights such as 64, or tensor, not "{text}"')
    return int(text)


def parse_outliers(text: str, option: str = "--outliers") -> int | float:
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
        raise QuikError(f'{option} takes a count or a fraction such as 0.0625 or 1/16, not "{text}"') from None


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
        from quikjax.files import typed_text

        text = typed_text(prompt, "the prompt")
    if not text:
        raise QuikError("the prompt is empty; give some text")
    return text


def parse_dtype(name: str) -> Any:
    """A floating dtype by its name."""
    from quikjax.models.dtypes import floating_dtype

    return floating_dtype(name)
