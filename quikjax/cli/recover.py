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
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window; left out, 2048 or the model's context.")] = None,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 1,
    windows: Annotated[int | None, typer.Option(help="Windows to train on; left out, as many as the steps see.")] = None,
    validation: Annotated[int, typer.Option(help="Windows behind those, to choose the best step on.")] = 16,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations on them.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = 0,
    scale_rate: Annotated[float, typer.Option(help="Largest rate of the logarithms of scales.")] = 1e-3,
    norm_rate: Annotated[float, typer.Option(help="Largest rate of norms.")] = 5e-4,
    outlier_rate: Annotated[float, typer.Option(help="Largest rate of outlier columns.")] = 1e-4,
    codes: Annotated[bool, typer.Option("--codes", help="Let codes move too (experimental, several times the memory).")] = False,
    code_rate: Annotated[float, typer.Option(help="Largest rate of codes, in steps of a code.")] = 5e-3,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, in memory and time, and do nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists, once the new one is whole.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a killed run has done.")] = False,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Train scales, norms and outlier columns of an artifact towards its original, codes frozen.

    The result is an artifact of the same format, size and cost. What is kept is the best step on windows of text that is not
    trained on, the beginning included. A killed run goes on where it stopped, to the same bytes.
    """
    directory = check_artifact(artifact)

    from quikjax.checkpoint.manifest import MANIFEST, Manifest, unseal_manifest
    from quikjax.training.recoverable import check_decoder

    # Before JAX is imported, and before anything is printed.
    manifest = unseal_manifest(directory / MANIFEST)
    if isinstance(manifest, Manifest):
        check_decoder(manifest.config, directory)

    from pydantic import ValidationError

    from quikjax.texts import calibration_text, tokenize
    from quikjax.training.settings import RecoverySettings, default_seqlen

    length = default_seqlen(manifest.config if isinstance(manifest, Manifest) else None, context) if seqlen is None else seqlen
    try:
        settings = RecoverySettings(
            steps=steps,
            batch=batch,
            seqlen=length,
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
    say(f"text         {text.origin}, windows of {length} tokens")
    say(f"steps        {steps} of {batch} window{'s' if batch > 1 else ''}, the best of every {evaluate_every} is kept")
    for line in estimate(artifact, settings).text(size, duration).splitlines():
        say(line)
    say(f"output       {out}")

    def tokens(tokenizer: Any) -> Any:
        return tokenize(tokenizer, text.content)

    lines = TrainingLines("KL", _figures, "validation windows")
    try:
        done = run(
            artifact, out, tokens, settings, original=original, context=context, force=force, restart=restart, progress=lines
        )
    except KeyboardInterrupt:
        raise Interrupted("run the same command again to go on from the last saved step") from None
    say(f"saved {out} in {duration(done.seconds)}, fingerprint {done.fingerprint[:16]}")
    if done.step:
        change = done.kl / done.kl_before - 1
        say(f"step {done.step}: KL to the original {done.kl_before:.4f} -> {done.kl:.4f} ({change:+.1%}) on validation windows")
    else:
        say(f"no step was better than the beginning (KL {done.kl:.4f} on validation windows): the weights are the artifact's own")
    if as_json:
        print_json(
            {
                "artifact": str(out),
                "fingerprint": done.fingerprint,
                "kl_before": done.kl_before,
                "kl": done.kl,
                "step": done.step,
                "evaluations": [{"step": int(step), "kl": kl, "perplexity": ppl} for step, kl, ppl in done.evaluations],
                "seconds": done.seconds,
            }
        )


def _figures(figures: Mapping[str, float]) -> str:
    return f"KL {figures['kl']:.4f}, perplexity {figures['perplexity']:.3f}"
