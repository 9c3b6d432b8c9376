"""`quikjax train`: classifiers of texts, in floats or quantization-aware; `quikjax accuracy`: how often one is right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from quikjax.cli.options import Json
from quikjax.errors import Interrupted, QuikError


def train(
    model: Annotated[str, typer.Argument(help="What the student begins as: an encoder in floats, with or without a classifier.")],
    data: Annotated[Path, typer.Option(help="Labelled texts to train on: .tsv, .csv or .jsonl with a column called label.")],
    validation: Annotated[Path, typer.Option(help="Others, to choose the best step on.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    teacher: Annotated[
        str | None, typer.Option(help="A classifier in floats to learn from; left out, only labels teach.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="How the student's layers are quantized while it learns; fp: not at all.")] = "fp",
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Texts per step.")] = 32,
    longest: Annotated[int, typer.Option(help="Tokens of a text; what is longer is cut.")] = 128,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 250,
    seed: Annotated[int, typer.Option(help="Of the order of texts, and of a new classifier.")] = 0,
    rate: Annotated[float, typer.Option(help="Largest rate of AdamW.")] = 5e-5,
    step_size_rate: Annotated[
        float | None, typer.Option(help="Largest rate of the logarithms of step sizes; left out, that of everything.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Share of zeros in the student's hidden states while it learns.")] = 0.0,
    average: Annotated[
        float, typer.Option(help="Decay of a running average of the parameters, which is what is kept; 0: none, 0.999: of many.")
    ] = 0.0,
    label_weight: Annotated[float, typer.Option(help="Of the loss against labels; 1 without a teacher.")] = 0.0,
    soft_weight: Annotated[float, typer.Option(help="Of the loss against the teacher's classes.")] = 1.0,
    hidden_weight: Annotated[float, typer.Option(help="Of the loss of hidden states.")] = 1.0,
    attention_weight: Annotated[float, typer.Option(help="Of the loss of attention scores.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the teacher's classes.")] = 1.0,
    prune: Annotated[
        str | None, typer.Option(help="2:4, unstructured, heads, or intermediate: what is zero in the student's layers.")
    ] = None,
    prune_share: Annotated[float, typer.Option(help="How much of it; 2:4 is always half.")] = 0.5,
    prune_every: Annotated[int, typer.Option(help="Steps after which it is chosen anew; 0: once.")] = 0,
    quantize_first: Annotated[bool, typer.Option("--quantize-first", help="Prune what quantization has left.")] = False,
    remove_blocks: Annotated[int, typer.Option(help="Blocks to take out of the student, spread evenly.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists, once the new one is whole.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a killed run has done.")] = False,
    as_json: Json = False,
) -> None:
    """Train a classifier of texts: in floats (a teacher), or quantized, with or without pruning, distilled from a teacher.

    The result is an ordinary artifact that runs on the integer kernels. What is kept is the best step on the validation texts,
    the beginning included. A killed run goes on where it stopped, to the same bytes.
    """
    from pydantic import ValidationError

    from quikjax.training.train_settings import TrainSettings

    given: dict[str, Any] = {
        "steps": steps,
        "batch": batch,
        "longest": longest,
        "evaluate_every": evaluate_every,
        "seed": seed,
        "rate": rate,
        "step_size_rate": step_size_rate,
        "dropout": dropout,
        "average": average,
        "label_weight": label_weight,
        "soft_weight": soft_weight,
        "hidden_weight": hidden_weight,
        "attention_weight": attention_weight,
        "temperature": temperature,
        "prune": prune,
        "prune_share": prune_share,
        "prune_every": prune_every,
        "prune_first": not quantize_first,
        "remove_blocks": remove_blocks,
    }
    try:
        settings = TrainSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"--{str(step).replace('_', '-')}: " for step in first["loc"][:1])
        raise QuikError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None

    from quikjax.checkpoint.load import load
    from quikjax.cli.printing import TrainingLines, duration, print_json, say
    from quikjax.quantizing.checkpoint import refuse_existing
    from quikjax.quantizing.recipe import find_recipe
    from quikjax.training.train import train as run

    refuse_existing(out, force=force)
    find_recipe(recipe)
    student, tokenizer = load(model)
    guide = None if teacher is None else load(teacher)[0]
    say(f"student      {model}, recipe {recipe}" + (f", {prune} pruned" if prune else ""))
    say(f"teacher      {teacher or 'labels'}")
    say(f"steps        {steps} of {batch} texts, the best of every {evaluate_every} is kept")
    say(f"output       {out}")
    try:
        done = run(
            student,
            tokenizer,
            data,
            out,
            settings,
            validation=validation,
            recipe=recipe,
            teacher=guide,
            force=force,
            restart=restart,
            progress=TrainingLines("loss", _figures, "validation texts"),
        )
    except KeyboardInterrupt:
        raise Interrupted("run the same command again to go on from the last saved step") from None
    say(f"saved {out} in {duration(done.seconds)}, fingerprint {done.fingerprint[:16]}")
    say(f"step {done.step}: accuracy {done.accuracy_before:.2%} -> {done.accuracy:.2%} on validation texts")
    if as_json:
        print_json(
            {
                "artifact": str(out),
                "fingerprint": done.fingerprint,
                "accuracy_before": done.accuracy_before,
                "accuracy": done.accuracy,
                "step": done.step,
                "evaluations": [
                    {"step": int(step), "accuracy": 1 - error, "loss": loss} for step, error, loss in done.evaluations
                ],
                "seconds": done.seconds,
            }
        )


def _figures(figures: Mapping[str, float]) -> str:
    return f"accuracy {1 - figures['error']:.2%}, loss {figures['loss']:.4f}"


def accuracy(
    model: Annotated[str, typer.Argument(help="A classifier of texts: an artifact, or a published one.")],
    data: Annotated[Path, typer.Option(help="Labelled texts: .tsv, .csv or .jsonl with a column called label.")],
    batch: Annotated[int, typer.Option(help="Texts at a time.")] = 32,
    as_json: Json = False,
) -> None:
    """Measure how often a classifier of texts is right, with the standard error of that share."""
    from quikjax.checkpoint.load import load
    from quikjax.cli.printing import print_json, show
    from quikjax.training.accuracy import accuracy as measure

    found = measure(*load(model), data, rows=batch)
    if as_json:
        print_json({"model": model, **found._asdict()})
    else:
        show(f"accuracy {found.accuracy:.2%} ± {found.error:.2%} on {found.texts} texts, loss {found.loss:.4f}")
