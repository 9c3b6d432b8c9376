"""`quikjax embed`: vectors of texts, and which texts are alike."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quikjax.cli.options import Json, Model, parse_dtype
from quikjax.cli.text_options import BatchSize, Length, Pairs, Texts, read_texts, say_work
from quikjax.errors import QuikError, did_you_mean

ALIKE = 12  # up to so many texts, every pair's cosine is printed


def embed(
    model: Model,
    texts: Texts,
    pooling: Annotated[str, typer.Option(help="mean over the tokens, the first token, or max of each dimension.")] = "mean",
    normalize: Annotated[bool, typer.Option("--normalize/--no-normalize", help="Divide each vector by its length.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the vectors to this .npy file, [texts, hidden] float32.")] = None,
    pairs: Pairs = False,
    length: Length = None,
    batch_size: BatchSize = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    as_json: Json = False,
) -> None:
    """Embed texts: with --out a .npy file, with --json the vectors; otherwise each text's nearest other one is printed."""
    floating = parse_dtype(dtype)
    if pooling not in ("mean", "first", "max"):
        raise QuikError(f'there is no pooling "{pooling}"; {did_you_mean(pooling, ("mean", "first", "max"))}')
    read = read_texts(texts, pairs)
    if out is not None and (out.suffix != ".npy" or out.exists()):
        raise QuikError(f"{out} exists; choose another file" if out.exists() else f"--out writes a .npy file, not {out.name}")

    import numpy as np

    from quikjax.checkpoint.load import load
    from quikjax.cli.printing import print_json, say, show
    from quikjax.encoding.embed import embed_with
    from quikjax.encoding.text_encoder import TextEncoder

    network, tokenizer = load(model, dtype=floating)
    encoder = TextEncoder(network, tokenizer, length=length, batch_size=batch_size)
    found = embed_with(encoder, read, pooling=pooling, normalize=normalize)
    say_work(len(read), found.work, encoder.length)
    if out is not None:
        try:
            with out.open("xb") as file:
                np.save(file, found.vectors)
        except OSError as problem:
            raise QuikError(f"cannot write {out} ({problem.strerror})") from None
        say(f"saved {out}, {found.vectors.shape[0]} x {found.vectors.shape[1]} float32")
    if as_json:
        figures: dict[str, Any] = {"model": model, "pooling": pooling, "normalized": normalize, "tokens": found.work.tokens}
        shown = {} if out is not None else {"embeddings": [[float(x) for x in row] for row in found.vectors]}
        print_json(
            {**figures, "texts": len(read), "width": found.vectors.shape[1], "out": None if out is None else str(out), **shown}
        )
    elif out is None:
        show(alike(read, found.vectors))


def alike(texts: list[Any], vectors: Any) -> str:
    """A table of each text's nearest other one, and of few texts the cosine of every pair."""
    import numpy as np

    from quikjax.cli.printing import table

    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = units @ units.T
    names = [shortened(text) for text in texts]
    if len(texts) == 1:
        first = ", ".join(f"{x:.4f}" for x in vectors[0][:8])
        return f"{len(vectors[0])} numbers ({first}, ...); give several texts to compare, --out FILE.npy or --json for all of it"
    others = cosines - 2 * np.eye(len(texts))
    nearest = np.argmax(others, axis=1)
    rows = [
        [str(i + 1), name, str(nearest[i] + 1), f"{cosines[i, nearest[i]]:.4f}", names[nearest[i]]]
        for i, name in enumerate(names)
    ]
    printed = table(("", "text", "nearest", "cosine", "which is"), rows)
    if len(texts) > ALIKE:
        return printed
    grid = [[str(i + 1), *(f"{value:.3f}" for value in row)] for i, row in enumerate(cosines)]
    return f"{printed}\n\n{table(('cosine', *(str(i + 1) for i in range(len(texts)))), grid)}"


def shortened(text: Any, width: int = 48) -> str:
    """A text or a pair in one line of a table.

    >>> shortened("a  b"), shortened(("a", "b"))
    ('a b', 'a / b')
    """
    line = " ".join((text if isinstance(text, str) else " / ".join(text)).split()).replace("|", "¦")
    return line if len(line) <= width else line[: width - 3] + "..."
