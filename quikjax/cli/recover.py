"""`quikjax recover`: accuracy back at no cost, by distilling what an artifact holds in floats from its original."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from quikjax.cli.options import Context, Json, check_artifact
from quikjax.errors import Interrupted, QuikError


def recover(
    artifact: Annotated[str, typer.Argument(help="The directory of an artifact.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write; it must not exist.")] = None,
    original: Annotated[
        str | None, typer.Option(help="The model it was made of, as `quantize` took it; not needed for the demo model.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, or wikitext2: to train and choose on.")] = "pydoc",
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 100,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window; left out, 2048 or the context, of an encoder 64.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows per step; left out, 1, of an encoder 32.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to train on; left out, as many as the steps see.")] = None,
    validation: Annotated[
        int | None, typer.Option(help="Windows behind those, to choose on; left out, 16, of an encoder 64.")
    ] = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations on them.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    scale_rate: Annotated[
        float | None, typer.Option(help="Largest rate of the logarithms of scales; left out, 0.001, of an encoder 0.01.")
    ] = None,
    norm_rate: Annotated[float | None, typer.Option(help="Largest rate of norms; left out, 0.0005, of an encoder 0.001.")] = None,
    outlier_rate: Annotated[
        float | None, typer.Option(help="Largest rate of outlier columns; left out, 0.0001, of an encoder 0.001.")
    ] = None,
    codes: Annotated[bool, typer.Option("--codes", help="Let codes move too (experimental, several times the memory).")] = False,
    code_rate: Annotated[
        float | None, typer.Option(help="Largest rate of codes, in their steps; left out, 0.005, of an encoder 0.01.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, in memory and time, and do nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists, once the new one is whole.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a killed run has done.")] = False,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Train scales, norms and outlier columns of an artifact towards its original, codes frozen.

    A language model learns the original's predictions, an encoder its hidden states. The result is an artifact of the same
    format, size and cost. What is kept is the best step on windows of text that is not trained on, the beginning included. A
    killed run goes on where it stopped, to the same bytes.
    """
    directory = check_artifact(artifact)

    from quikjax.checkpoint.manifest import MANIFEST, Manifest, unseal_manifest
    from quikjax.training.recoverable import check_recoverable, is_encoder

    # Before JAX is imported, and before anything is printed.
    manifest = unseal_manifest(directory / MANIFEST)
    if isinstance(manifest, Manifest):
        check_recoverable(manifest.config, directory)

    from pydantic import ValidationError

    from quikjax.texts import calibration_text, framed, tokenize
    from quikjax.training.settings import RecoverySettings

    config = manifest.config if isinstance(manifest, Manifest) else None
    encoder = is_encoder(config)
    try:
        settings = RecoverySettings.of(
            config,
            context,
            steps=steps,
            batch=batch,
            seqlen=seqlen,
            windows=windows,
            validation=validation,
            evaluate_every=evaluate_every,
            seed=seed,
            sigma_rate=scale_rate,
            norm_rate=norm_rate,
            outlier_rate=outlier_rate,
            code_rate=code_rate,
            codes=codes,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise QuikError(f"--{str(first['loc'][0]).replace('_', '-').replace('sigma', 'scale')}: {first['msg']}") from None

    from quikjax.cli.printing import TrainingLines, duration, print_json, say, show, size

    if plan:
        from quikjax.training.memory import estimate

        made = estimate(artifact, settings)
        if as_json:
            print_json({"artifact": artifact, **made.as_json()})
        else:
            show(made.text(size, duration))
        return
    if out is None:
        raise QuikError("say where the result goes with --out, or ask for --plan")

    from quikjax.quantizing.checkpoint import refuse_existing
    from quikjax.training.memory import estimate
    from quikjax.training.recover import recover as run

    refuse_existing(out, force=force)
    text = calibration_text(calibration)
    say(f"artifact     {artifact}")
    say(f"text         {text.origin}, windows of {settings.seqlen} tokens")
    windows_a_step = f"{settings.batch} window{'s' if settings.batch > 1 else ''}"
    say(f"steps        {steps} of {windows_a_step}, the best of every {evaluate_every} is kept")
    for line in estimate(artifact, settings).text(size, duration).splitlines():
        say(line)
    say(f"output       {out}")

    def tokens(tokenizer: Any) -> Any:
        return framed(tokenizer, text.content).inner if encoder else tokenize(tokenizer, text.content)

    lines = TrainingLines("loss" if encoder else "KL", _figures, "validation windows")
    try:
        done = run(
            artifact, out, tokens, settings, original=original, context=context, force=force, restart=restart, progress=lines
        )
    except KeyboardInterrupt:
        raise Interrupted("run the same command again to go on from the last saved step") from None
    say(f"saved {out} in {duration(done.seconds)}, fingerprint {done.fingerprint[:16]}")
    measured = "distance of embeddings (1 - cosine)" if encoder else "KL"
    if done.step:
        change = f"{done.before:.4f} -> {done.after:.4f} ({done.after / done.before - 1:+.1%})"
        say(f"step {done.step}: {measured} to the original {change} on validation windows")
    else:
        found = f"{measured} {done.after:.4f} on validation windows"
        say(f"no step was better than the beginning ({found}): the weights are the artifact's own")
    if as_json:
        print_json(
            {
                "artifact": str(out),
                "fingerprint": done.fingerprint,
                f"{done.measure}_before": done.before,
                done.measure: done.after,
                "step": done.step,
                "evaluations": [{"step": step, **figures} for step, figures in done.evaluations],
                "seconds": done.seconds,
            }
        )


def _figures(figures: Mapping[str, float]) -> str:
    if "kl" in figures:
        return f"KL {figures['kl']:.4f}, perplexity {figures['perplexity']:.3f}"
    return f"distance of embeddings {figures['distance']:.4f}, error of hidden states {figures['error']:.4f}"
