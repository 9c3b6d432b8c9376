"""`quikjax demo --encoder`: what quantization does to a real sentence encoder, on this machine, without a network."""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from quikjax.checkpoint.load import load
from quikjax.checkpoint.output import real_path, refuse_existing
from quikjax.cli.printing import ProgressLines, duration, megabytes, say, show, table
from quikjax.encoding.embed import embed_with
from quikjax.encoding.text_encoder import TextEncoder
from quikjax.evaluation.similarity import compare_embeddings
from quikjax.loading import open_source
from quikjax.models.registry import abstract_model
from quikjax.quantizing.calibration import calibration_tokens
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.quantizing.recipe import find_recipe
from quikjax.reports.sizes import size_of_artifact, sizes_of_layers
from quikjax.texts import calibration_text, evaluation_text

MODEL = "all-minilm-l6-v2"
RECIPES = (("RTN-W4A4", "rtn-w4a4"), ("QUIK-4B", "quik-4b"), ("W4A8", "w4a8"))
SHOWN = "quik-4b"
MEASURED = 200  # sentences
SENTENCES = (
    "A dog is running across the beach.",
    "The stock market fell sharply on Monday.",
    "How do I reset my password?",
    "She is learning to play the violin.",
    "The recipe needs two cups of flour.",
    "A puppy races along the shore.",
    "Shares dropped steeply at the start of the week.",
    "I cannot log in, because I forgot my passphrase.",
    "He takes lessons on a string instrument.",
    "Mix the dough from half a pound of wheat.",
)


def run(out: Path | None, *, samples: int, seqlen: int, show: bool) -> dict[str, Any]:
    """Run the demo; keep its artifacts in `out`, if given. Figures are returned, and printed on stdout with `show`."""
    if out is not None:
        refuse_existing(out, force=False)
        return _run(real_path(out), samples, seqlen, show)
    with tempfile.TemporaryDirectory(prefix="quikjax-demo-") as directory:
        return _run(Path(directory), samples, seqlen, show)


def _run(directory: Path, samples: int, seqlen: int, show: bool) -> dict[str, Any]:
    source = open_source(MODEL)
    calibration, evaluation = calibration_text("pydoc"), evaluation_text("pydoc")
    measured = sentences(evaluation.content, MEASURED)
    say(f"""all-MiniLM-L6-v2, a sentence encoder, is quantized three ways and compared with itself.
  RTN-W4A4  4-bit weights and activations, rounded to nearest, no outliers: what breaks
  QUIK-4B   the same bits, but 1/16 of the columns kept in FP16, GPTQ, and 8 bits where an MLP returns (output.dense)
  W4A8      4-bit weights, 8-bit activations, 1/16 of the columns in FP16
Calibration: {samples} x {seqlen} tokens of {calibration.origin}.
Measured on {len(measured)} sentences of {evaluation.origin}.
Everything is on this machine; nothing is downloaded. Progress is on stderr, results on stdout.""")
    abstract = abstract_model(source.config)

    def tokens(tokenizer: Any) -> np.ndarray:
        return calibration_tokens(abstract, tokenizer, calibration.content, samples, seqlen)

    say("\n== the original")
    original = _embedded(MODEL, measured)
    rows, shown = [], {"original": original[0]}
    for title, name in RECIPES:
        say(f"\n== {title}: calibrating and quantizing")
        made = quantize_checkpoint(
            source, directory / name, name, tokens, progress=ProgressLines(find_recipe(name), layers=False)
        )
        size, layers = size_of_artifact(directory / name), sizes_of_layers(made.layers)
        say(f"saved {directory / name}, {megabytes(size)}, in {duration(made.seconds)}")
        found = _embedded(directory / name, measured)
        figures = compare_embeddings(original[1], found[1])
        say(f"{title}: mean cosine to the original {figures.cosine:.4f}")
        rows.append({"recipe": title, **figures._asdict(), "bits_per_weight": layers.bits_per_weight, "bytes_on_disk": size})
        if name == SHOWN:
            shown[name] = found[0]
    figures_of = {
        "model": MODEL,
        "sentences": list(SENTENCES),
        "nearest": {name: _nearest(vectors) for name, vectors in shown.items()},
        "rows": rows,
    }
    if show:
        _print(figures_of)
    return figures_of


def sentences(text: str, count: int) -> list[str]:
    """The first different sentences of a text that look like prose, each on one line."""
    found: dict[str, None] = {}
    for paragraph in text.split("\n\n"):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            if 30 <= len(sentence) <= 200 and sentence[0].isupper() and sentence[-1] == ".":
                found[sentence] = None
    return list(found)[:count]


def _embedded(model: str | Path, measured: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the sentences that are shown, and of those that are measured."""
    network, tokenizer = load(str(model))
    vectors, work = embed_with(TextEncoder(network, tokenizer), [*SENTENCES, *measured])
    rate = len(vectors) / work.seconds
    say(f"embedded {len(vectors)} sentences at {rate:.0f} a second, compiled in {work.compile_seconds:.1f} s")
    return vectors[: len(SENTENCES)], vectors[len(SENTENCES) :]


def _nearest(vectors: np.ndarray) -> list[tuple[int, float]]:
    cosines = vectors @ vectors.T - 2 * np.eye(len(vectors))
    return [(int(row.argmax()), float(row.max())) for row in cosines]


def _print(figures: dict[str, Any]) -> None:
    original, quantized = figures["nearest"]["original"], figures["nearest"][SHOWN]
    cells = [
        [
            text,
            SENTENCES[near],
            f"{cosine:.3f}",
            f"{other:.3f}" if near == other_near else f"{other:.3f}: {SENTENCES[other_near]}",
        ]
        for text, (near, cosine), (other_near, other) in zip(SENTENCES, original, quantized, strict=True)
    ]
    show(table(("sentence", "nearest to it", "cosine", "in QUIK-4B"), cells))
    show("")
    rows = [
        [
            row["recipe"],
            *(f"{row[name]:.4f}" for name in ("cosine", "cosine_5th_percentile", "spearman")),
            f"{row['same_nearest']:.1%}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes_on_disk'] / 1e6:.1f}",
        ]
        for row in figures["rows"]
    ]
    head = ("model", "cosine to original", "5th percentile", "Spearman", "same nearest", "bits/weight", "MB on disk")
    show(table(head, rows))
    show("")
    show(
        "Cosine: between a sentence's embedding and the original's. Spearman: of the similarities of all pairs of sentences. "
        "Bits are of the transformer blocks' linear layers, everything counted; on disk is the whole model, most of it the token "
        "table."
    )
