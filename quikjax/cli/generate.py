"""`quikjax generate`: continue a text."""

from typing import Annotated

import typer

from quikjax.cli.options import Context, Json, Model, parse_dtype, read_prompt
from quikjax.errors import QuikError


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token (so far the only way).")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Continue a text. Only the continuation is printed on stdout."""
    floating = parse_dtype(dtype)
    from quikjax.texts import continuation, tokenize

    text = read_prompt(prompt)

    from flax import nnx

    from quikjax.checkpoint.load import load
    from quikjax.cli.printing import print_json, say, show
    from quikjax.generation.decode import generate as run
    from quikjax.models.registry import pure_params

    network, tokenizer = load(model, dtype=floating, context=context)
    if tokenizer is None:
        raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
    ids = tokenize(tokenizer, text)[None]
    out = run(nnx.split(network)[0], pure_params(network), ids, max_new_tokens=max_new_tokens)
    continued = continuation(tokenizer, ids[0], out.tokens[0, : out.lengths[0]])
    figures = {
        "prompt_tokens": out.prompt_tokens,
        "new_tokens": int(out.lengths[0]),
        "prefill_tokens_per_second": out.prefill_tokens_per_second,
        "decode_tokens_per_second": out.decode_tokens_per_second,
        "compile_seconds": out.compile_seconds,
    }
    if as_json:
        print_json({"text": continued, **figures})
    else:
        show(continued)
    say(
        f"prefill {out.prompt_tokens} tokens at {out.prefill_tokens_per_second:.0f} tokens/s, "
        f"decode {int(out.lengths[0])} at {out.decode_tokens_per_second:.1f} tokens/s, compiled in {out.compile_seconds:.1f} s"
    )
