"""`quikjax eval`: perplexity, and how far a model is from another."""

from typing import Annotated

import typer

from quikjax.cli.options import Context, Json, Model, parse_dtype
from quikjax.errors import QuikError


def eval_(
    model: Model,
    perplexity: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, or wikitext2.")],
    window: Annotated[int | None, typer.Option(help="Tokens per window; left out, 2048 or the model's context.")] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows, from the start of the text; left out, all.")] = None,
    against: Annotated[str | None, typer.Option(help="Another model, for KL divergence and top-1 agreement.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Perplexity over non-overlapping windows, with its standard error."""
    from quikjax.texts import evaluation_text, tokenize

    floating = parse_dtype(dtype)
    text = evaluation_text(perplexity)

    from quikjax.checkpoint.load import load
    from quikjax.cli.printing import print_json, say, show
    from quikjax.evaluation import evaluate, reference
    from quikjax.evaluation import windows as cut

    network, tokenizer = load(model, dtype=floating, context=context)
    if tokenizer is None:
        raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
    if window is None:
        window = min(2048, network.config.context_length)
    ids = cut(tokenize(tokenizer, text.content), window, windows)
    say(f"{len(ids)} windows of {window} tokens of {text.origin}, not overlapping, all but the first token of each predicted")
    other = None
    if against is not None:
        other_model, _ = load(against, dtype=floating, context=context)
        if other_model.config.vocab_size != network.config.vocab_size:
            raise QuikError(f"{against} has another vocabulary than {model}; the two cannot be compared token by token")
        other = reference(other_model, ids)
    result = evaluate(network, ids, other)
    if as_json:
        print_json({"model": model, "text": text.origin, **result.as_json()})
        return
    show(f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f}  ({result.tokens} tokens, {result.tokens_per_second:.0f}/s)")
    if result.kl is not None:
        show(f"KL divergence to {against} {result.kl:.5f} ± {result.kl_stderr:.5f}, top-1 agreement {result.top1_agreement:.2%}")
