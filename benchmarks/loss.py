"""Print where an artifact loses accuracy, as tables and a last line of JSON.

python benchmarks/loss.py ARTIFACT MODEL --text FILE --first 100 --windows 2 --length 2048
"""

import argparse
import json
import sys

import numpy as np

from quikjax.checkpoint.load import load
from quikjax.cli.printing import table
from quikjax.evaluation import windows
from quikjax.study.loss import study_loss
from quikjax.texts import evaluation_text, tokenize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a UTF-8 text file, pydoc, or wikitext2")
    parser.add_argument("--first", type=int, default=0, help="the first window of the text")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    original, tokenizer = load(arguments.model)
    if tokenizer is None:
        parser.error(f"{arguments.model} has no tokenizer")
    text = evaluation_text(arguments.text)
    end = arguments.first + arguments.windows
    ids = windows(np.asarray(tokenize(tokenizer, text.content)), arguments.length, end)[arguments.first :]
    found = study_loss(
        original, load(arguments.artifact)[0], ids, lambda name, kl: print(f"{name}: {kl:.4f}", file=sys.stderr, flush=True)
    )
    print(table(("cause", "KL"), [[name, f"{kl:.4f}"] for name, kl in found.causes.items()]), end="\n\n")
    print(table(("tokens before", "KL"), [[f"{row.first}-{row.last}", f"{row.kl:.4f}"] for row in found.positions]), end="\n\n")
    print(table(("after block", "rel. error"), [[name, f"{error:.4f}"] for name, error in found.blocks.items()]), end="\n\n")
    spreads = [[row.group, f"{row.median:.2f}", f"{row.largest:.2f}"] for row in found.spreads]
    print(table(("spread of base channels: std of log rms", "median", "largest"), spreads), end="\n\n")
    print(json.dumps(found.as_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
