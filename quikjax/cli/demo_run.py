"""`quikjax demo`: what QUIK does to a real model, on this machine, without a network."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from quikjax.checkpoint.load import load
from quikjax.checkpoint.output import real_path, refuse_existing
from quikjax.cli.printing import ProgressLines, duration, megabytes, say, show, table
from quikjax.errors import QuikError
from quikjax.evaluation import Evaluation, Reference, evaluate, reference, windows
from quikjax.generation import generate
from quikjax.loading import open_source
from quikjax.models.registry import pure_params
from quikjax.quantizing.checkpoint import QuantizedCheckpoint, quantize_checkpoint
from quikjax.quantizing.recipe import find_recipe
from quikjax.reports.sizes import size_of_artifact, sizes_of_layers
from quikjax.texts import calibration_text, calibration_windows, continuation, evaluation_text, tokenize

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France?"
NEW_TOKENS = 32
EVALUATED = 8  # windows
RECIPES = (("RTN-W4A4", "rtn-w4a4"), ("QUIK-4B", "quik-4b"), ("QUIK-4B+", "quik-4b+"), ("W4A8", "w4a8"))
# Those that answer the question, each in a process of its own.
ASKED = ("quik-4b", "quik-4b+", "w4a8")


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
    say(f"""SmolLM2-135M-Instruct is quantized four ways and compared with itself.
  RTN-W4A4  4-bit weights and activations, rounded to nearest, no outliers: what breaks
  QUIK-4B   the same bits, but 1/16 of the columns kept in FP16, GPTQ, and 8 bits where an MLP returns (down_proj)
  QUIK-4B+  the same size and cost, nearer the original: finer steps of activations, outliers that many tokens share
  W4A8      4-bit weights, 8-bit activations, 1/16 of the columns in FP16: what `quikjax plan` recommends on today's devices
Calibration: {samples} x {seqlen} tokens of {calibration.origin} (a small setting; `quikjax quantize` takes 16 x 2048).
Evaluation: {EVALUATED} windows of {seqlen} tokens of {evaluation.origin}.
Everything is on this machine; nothing is downloaded. Progress is on stderr, results on stdout.""")

    converted: dict[str, QuantizedCheckpoint] = {}
    for title, name in RECIPES:
        say(f"\n== {title}: calibrating and quantizing")

        def tokens(tokenizer: Any) -> np.ndarray:
            return calibration_windows(tokenize(tokenizer, calibration.content), samples, seqlen)

        progress = ProgressLines(find_recipe(name), layers=name == "quik-4b+")
        converted[name] = quantize_checkpoint(source, directory / name, name, tokens, progress=progress)
        size = size_of_artifact(directory / name)
        say(f"saved {directory / name}, {megabytes(size)}, in {duration(converted[name].seconds)}")

    say("\n== the original")
    model, tokenizer = load(MODEL)
    assert tokenizer is not None  # the demo model has one
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    ids = tokenize(tokenizer, prompt)[None]
    said = generate(nnx.split(model)[0], pure_params(model), ids, max_new_tokens=NEW_TOKENS)
    original = continuation(tokenizer, ids[0], said.tokens[0, : said.lengths[0]])

    answers = {}
    for name in ASKED:
        say(f"\n== {name} restored in a fresh process")
        answers[name] = _in_fresh_process(directory / name, prompt)["text"]

    say("\n== measuring")
    cut = windows(tokenize(tokenizer, evaluation.content), seqlen, EVALUATED)
    base = reference(model, cut)
    rows = [_row("original", evaluate(model, cut, base), None, source.size)]
    for title, name in RECIPES:
        rows.append(_measured(title, directory / name, converted[name], cut, base))
        say(f"{title}: perplexity {rows[-1]['perplexity']:.2f}")
    figures = {
        "model": MODEL,
        "question": QUESTION,
        "original_answers": original,
        "answers": answers,
        "rows": rows,
    }
    if show:
        _print(figures, source.size)
    return figures


def _in_fresh_process(artifact: Path, prompt: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "quikjax.cli", "generate", str(artifact), prompt]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(NEW_TOKENS), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C is for this process, which ends that one, and is answered once
    )
    if done.returncode:
        raise QuikError(f"the artifact could not be used in a fresh process (exit {done.returncode}); its error is above")
    return dict(json.loads(done.stdout))


def _measured(title: str, path: Path, converted: QuantizedCheckpoint, cut: np.ndarray, base: Reference) -> dict[str, Any]:
    model, _ = load(path)
    return _row(title, evaluate(model, cut, base), converted, size_of_artifact(path))


def _row(title: str, result: Evaluation, converted: QuantizedCheckpoint | None, size: int) -> dict[str, Any]:
    layers = sizes_of_layers(converted.layers if converted else [])
    return {
        "model": title,
        **result.as_json(),
        "bits_per_weight": layers.bits_per_weight,
        "size_relative_to_fp16": layers.relative_to_fp16,
        "bytes_on_disk": size,
    }


def _print(figures: dict[str, Any], source_size: int) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        return [
            row["model"],
            f"{row['perplexity']:.2f} ± {row['stderr']:.2f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['kl']:.4f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['size_relative_to_fp16']:.3f}",
            f"{row['bytes_on_disk'] / 1e6:.1f}",
        ]

    show(f"question   {QUESTION}")
    show(f"original   {figures['original_answers'].strip()!r}")
    for title, name in RECIPES:
        if name in ASKED:
            show(f"{title:<10} {figures['answers'][name].strip()!r}")
    show("")
    head = ("model", "perplexity", "top-1 agreement", "KL to original", "bits/weight", "size/FP16", "MB on disk")
    show(table(head, [cells(row) for row in figures["rows"]]))
    show("")
    show(
        "Bits and size are of the transformer blocks' linear layers, everything counted; the original's are those of FP16. "
        f"On disk is the whole model: the original's {megabytes(source_size)} are its source file, itself a 4-bit one (Q4_1, "
        "embeddings in Q8_0); artifacts keep embeddings in float32."
    )
