"""`quikjax study failure`: where a model fails at few bits, by position, by depth, by part."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from quikjax.cli.options import Json, RecipeName, Samples, SeqLen, check_models
from quikjax.cli.study import DryRun, Out, carry_out
from quikjax.errors import QuikError


def failure(
    models: Annotated[list[str], typer.Argument(help="Published models, unquantized: decoders and encoders, to compare.")],
    out: Out = Path("studies/failure"),
    recipe: RecipeName = "rtn-w4a4",
    artifact: Annotated[
        str | None, typer.Option(help="Of one model: what `quantize` or `recover` made of it, in place of --recipe.")
    ] = None,
    evaluation: Annotated[str, typer.Option(help="The text to measure on: a UTF-8 text file, pydoc, wikitext2, ...")] = "pydoc",
    window: Annotated[int | None, typer.Option(help="Tokens per window; left out, what all models read, at most 2048.")] = None,
    windows: Annotated[int, typer.Option(help="How many windows, from the start of the text.")] = 3,
    parts: Annotated[str, typer.Option(help="Of each layer, with commas between them.")] = "both,weights,activations",
    calibration: Annotated[str, typer.Option(help="For recipes that need it: a UTF-8 text file, pydoc, ...")] = "pydoc",
    samples: Samples = None,
    seqlen: SeqLen = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Where models fail at few bits: by position in the window, by depth, weights or activations; families beside each other.

    Perplexity by position (of masked tokens, where a masked language model is given), errors of hidden states by position and
    block, and of layers, free-running and teacher-forced. A killed study goes on where it stopped.
    """
    # Everything that can be wrong is looked at before anything is loaded.
    check_models(*models)
    if artifact is not None and len(models) > 1:
        raise QuikError(f"--artifact is of one model, and {len(models)} are given; study each artifact by itself")

    from quikjax.quantizing.recipe import find_recipe
    from quikjax.study.failure import Calibration, choose_parts, failure_study, open_subjects, recipe_of
    from quikjax.study.results import check_directory
    from quikjax.texts import calibration_text, evaluation_text

    chosen = find_recipe(recipe) if artifact is None else recipe_of(artifact)
    wanted = choose_parts([name.strip() for name in parts.split(",")])
    text = evaluation_text(evaluation)
    if not dry_run:
        check_directory(out)
    given = None
    if artifact is None and chosen.needs_data():
        given = Calibration(calibration_text(calibration), samples, seqlen)
    subjects = open_subjects(models, text, chosen, given, window=window, count=windows)
    words = ["quikjax", "study", "failure", "--recipe", recipe] if artifact is None else ["quikjax", "study", "failure"]
    words += [] if artifact is None else ["--artifact", artifact]
    words += ["--evaluation", evaluation, f"--window={subjects[0].ids.shape[1]}", f"--windows={windows}"]
    if given is not None:
        sizes = {"--samples": samples, "--seqlen": seqlen}
        words += ["--calibration", calibration, *(f"{name}={size}" for name, size in sizes.items() if size is not None)]
    study = failure_study(subjects, chosen, text, parts=wanted, artifact=artifact, command=shlex.join(words))
    carry_out(study, out, dry_run=dry_run, as_json=as_json)
