"""`quikjax classify`: the class of each text, by a published classifier."""

from typing import Annotated

import typer

from quikjax.cli.options import Json, Model, parse_dtype
from quikjax.cli.text_options import BatchSize, Length, Pairs, Texts, read_texts, say_work


def classify(
    model: Model,
    texts: Texts,
    pairs: Pairs = False,
    labels: Annotated[str | None, typer.Option(help="Names of the classes in order, by commas, for a model without.")] = None,
    length: Length = None,
    batch_size: BatchSize = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    as_json: Json = False,
) -> None:
    """Classify texts, or pairs of texts, with a model that has a classifier; each text's class and score are printed."""
    floating = parse_dtype(dtype)
    read = read_texts(texts, pairs)
    names = None if labels is None else [label.strip() for label in labels.split(",")]

    from quikjax.checkpoint.load import load
    from quikjax.cli.embed import shortened
    from quikjax.cli.printing import print_json, show, table
    from quikjax.encoding.classify import classify_with
    from quikjax.encoding.text_encoder import TextEncoder

    network, tokenizer = load(model, dtype=floating)
    encoder = TextEncoder(network, tokenizer, length=length, batch_size=batch_size)
    found = classify_with(encoder, read, labels=names)
    say_work(len(read), found.work, encoder.length)
    best = found.best
    if as_json:
        rows = [
            {"label": label, "scores": dict(zip(found.labels, map(float, row), strict=True))}
            for label, row in zip(best, found.scores, strict=True)
        ]
        print_json({"model": model, "labels": list(found.labels), "kind": found.kind, "rows": rows})
        return
    cells = [[shortened(text), label, f"{row.max():.4f}"] for text, label, row in zip(read, best, found.scores, strict=True)]
    show(table(("text", "class", "probability" if found.kind != "values" else "value"), cells))
