"""Measure how well proxy outliers name the true ones: Spearman and overlap per group of layers, on a model and a text.

    python benchmarks/proxy_overlap.py smollm2-135m --text pydoc --windows 4 --share 0.02

The proxy needs no data; the truth is the largest activation of every input column over the text. One line per group of layers:
Spearman's rank correlation and the share of the top columns that both name, means over the blocks. Last line JSON, every block.
"""

import argparse
import json
from collections import defaultdict

import numpy as np
from flax import nnx

from quikjax.algorithms.ranks import spearman
from quikjax.evaluation import windows
from quikjax.loading import load_published
from quikjax.models.registry import dotted, pure_params
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.quantizing.model import calibrate
from quikjax.quantizing.proxies import gaps, model_proxies, overlap, producers
from quikjax.texts import calibration_text, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.02)
    args = parser.parse_args()
    model, tokenizer = load_published(args.model)
    ids = windows(tokenize(tokenizer, calibration_text(args.text).content), args.window, args.windows)
    params = pure_params(model)
    scores = model_proxies(model, dotted(params))
    stats = calibrate(nnx.split(model)[0], params, [row[None] for row in ids])
    rule = CodebookRule(match="", data_type="int", proxy=args.share)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    block = next(iter(model.blocks.values()))
    for key in model.blocks:
        for group, layers in block.groups.items():
            path = ".".join((*model.block_path, key, layers[0], "weight"))
            if path in scores:
                proxy, true = np.asarray(scores[path]), np.asarray(stats[path].absmax)
                count = rule.outlier_count(len(proxy))
                found[group].append({"spearman": spearman(proxy, true), "overlap": overlap(proxy, true, count)})
    for group, rows in found.items():
        means = {name: float(np.mean([row[name] for row in rows])) for name in ("spearman", "overlap")}
        source = ", ".join(producers(model)[group].layers)
        print(f"{group:<18} from {source:<28} Spearman {means['spearman']:+.3f}, overlap of the top {means['overlap']:.1%}")
    for gap in gaps(model):
        print(f"none for {gap}")
    print(json.dumps({"model": args.model, "share": args.share, "groups": found}))


if __name__ == "__main__":
    main()
