"""What quantization leaves of a sentence encoder's similarities.

    python benchmarks/encoder_similarity.py sst2_dev.tsv [--recipes quik-4b,quik-4b+,quik-8b,w4a8,rtn-w4a4] [--count 500]
    python benchmarks/encoder_similarity.py sst2_dev.tsv --recipes quik-4b --parts
    python benchmarks/encoder_similarity.py sst2_dev.tsv --artifacts DIR [DIR ...]

The first `--count` sentences of a file (one a line; of a .tsv the column `sentence`, or its longest one) are embedded by the
original and by each recipe's model, or each artifact's, mean over the tokens, normalized. Reported are

- the cosine between a sentence's two embeddings: mean, 5th percentile and least;
- Spearman's rank correlation of the similarities of all pairs of sentences, the original's against the quantized model's;
- how often a sentence's nearest other one is the same.

Calibration is on other text than what is measured: by default pydoc, in windows that are whole texts. Progress is on stderr, a
table on stdout, its last line one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from quikjax.checkpoint.load import load
from quikjax.encoding.embed import embed
from quikjax.errors import QuikError
from quikjax.evaluation.rounding import PARTS, only
from quikjax.evaluation.similarity import compare_embeddings
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.quantizing.calibration import calibration_tokens
from quikjax.quantizing.model import quantize_model
from quikjax.reports.tables import markdown_table
from quikjax.texts import calibration_text
from quikjax.weights.formats import is_packed

RECIPES = "quik-4b,quik-4b+,quik-8b,w4a8,rtn-w4a4"


def sentences(path: Path, count: int) -> list[str]:
    """The first sentences of a file.

    Raises:
        QuikError: it has too few.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".tsv":
        rows = [line.split("\t") for line in lines]
        if "sentence" in rows[0]:
            column, rows = rows[0].index("sentence"), rows[1:]
        else:
            column = max(range(len(rows[0])), key=lambda at: sum(len(row[at]) for row in rows[:50]))
        lines = [row[column].strip() for row in rows]
    if len(lines) < count:
        raise QuikError(f"{path} has {len(lines)} sentences, {count} are wanted")
    return lines[:count]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def bits_per_weight(params: Any) -> float:
    """Of the packed layers, everything counted."""
    packed = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(leaf)]
    return sum(leaf.bits() for leaf in packed) / sum(leaf.outputs * leaf.inputs for leaf in packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--calibration", default="pydoc", help="a text file, or pydoc")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--parts", action="store_true", help="also with weights, and with activations, quantized alone")
    parser.add_argument("--artifacts", nargs="+", default=[], help="measure these in place of recipes")
    arguments = parser.parse_args()

    texts = sentences(arguments.sentences, arguments.count)
    model, tokenizer = load(arguments.model)
    original = embed(model, tokenizer, texts).vectors
    say(f"{len(texts)} sentences of {arguments.sentences.name}")
    rows = []

    def measure(name: str, quantized: Any) -> None:
        figures = compare_embeddings(original, embed(quantized, tokenizer, texts).vectors)
        rows.append({"recipe": name, **figures._asdict(), "bits_per_weight": bits_per_weight(pure_params(quantized))})
        say(f"{name}: cosine {figures.cosine:.4f}, Spearman {figures.spearman:.4f}")

    for name in arguments.artifacts:
        measure(Path(name).name, load(name)[0])
    if not arguments.artifacts:
        text = calibration_text(arguments.calibration)
        tokens = calibration_tokens(model, tokenizer, text.content, arguments.samples, arguments.seqlen)
        say(f"calibration: {len(tokens)} x {tokens.shape[1]} of {text.origin}")
        for recipe in arguments.recipes.split(","):
            params = quantize_model(model, recipe, [row[None] for row in tokens])
            graphdef, dense = nnx.split(model)[0], dotted(pure_params(model))
            measure(recipe, nnx.merge(graphdef, params))
            for part in PARTS[1:] if arguments.parts else ():
                measure(f"{recipe}, {part}", nnx.merge(graphdef, nested(only(part, dotted(params), dense))))
    head = ("recipe", "bits/weight", "cosine", "5th percentile", "least", "Spearman", "same nearest")
    cells = [
        [
            row["recipe"],
            f"{row['bits_per_weight']:.2f}",
            *(f"{row[name]:.4f}" for name in ("cosine", "cosine_5th_percentile", "cosine_least", "spearman")),
            f"{row['same_nearest']:.1%}",
        ]
        for row in rows
    ]
    print(markdown_table(head, cells))
    protocol = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    print(json.dumps({"protocol": protocol, "sentences": len(texts), "rows": rows}))


if __name__ == "__main__":
    main()
