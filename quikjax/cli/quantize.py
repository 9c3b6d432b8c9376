"""`quikjax quantize`: from a published checkpoint to an artifact, going on where a killed run stopped."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quikjax.cli.options import (
    BlockSize,
    Context,
    Json,
    Keep,
    Method,
    Model,
    Outliers,
    Proxy,
    RecipeName,
    Samples,
    SeqLen,
    check_kept,
    check_models,
    choose_recipe,
    parse_activation_memory,
    parse_dtype,
)
from quikjax.errors import Interrupted


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist, or be empty.")],
    recipe: RecipeName = "quik-4b",
    outliers: Outliers = None,
    block: BlockSize = None,
    proxy: Proxy = None,
    method: Method = None,
    keep: Keep = None,
    calibration: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, or wikitext2.")] = "pydoc",
    samples: Samples = None,
    seqlen: SeqLen = None,
    activation_memory: Annotated[
        float | None,
        typer.Option(
            help="GB (10^9 bytes) of memory for activations between blocks; what takes more is on disk, in OUT.work, and the "
            "result is the same. Left out, a quarter of all memory."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of all that is not quantized.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that exists, once the new one is whole.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a killed run has finished.")] = False,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Quantize a published model and save it. A killed run goes on where it stopped.

    log.jsonl in OUT (until it is whole, in OUT.partial) gets a line for each layer as it is done: follow it with tail -f.
    """
    from quikjax.checkpoint.output import refuse_existing

    # Everything that can be wrong is looked at before anything is loaded.
    check_models(model)
    refuse_existing(out, force=force)
    activation_bytes = parse_activation_memory(activation_memory)
    floating = parse_dtype(dtype)
    chosen = choose_recipe(recipe, outliers, block, proxy, method, keep)

    from quikjax.cli.printing import ProgressLines, duration, megabytes, print_json, say
    from quikjax.loading import open_source
    from quikjax.models.registry import abstract_model, dotted, pure_params
    from quikjax.quantizing.calibration import calibration_size, calibration_tokens
    from quikjax.quantizing.checkpoint import quantize_checkpoint
    from quikjax.quantizing.memory import default_activation_bytes
    from quikjax.reports.sizes import size_of_artifact, sizes_of_layers
    from quikjax.texts import calibration_text

    text = calibration_text(calibration) if chosen.needs_data() else None
    source = open_source(model)
    abstract = abstract_model(source.config, floating, context=context)
    check_kept(keep, dotted(pure_params(abstract)))
    samples, length = calibration_size(abstract, samples, seqlen)
    say(f"model        {model}, activations and unquantized weights in {dtype}")
    given = {"outliers": outliers, "blocks of": block, "proxy outliers": proxy, "method": method}
    say("recipe       " + ", ".join([chosen.name, *(f"{name} {value}" for name, value in given.items() if value is not None)]))
    if text is not None:
        say(f"calibration  {samples} x {length} tokens of {text.origin}")
        budget = default_activation_bytes() if activation_bytes is None else activation_bytes
        say(f"activations  in memory up to {megabytes(budget)}, beyond that on disk")
    say(f"output       {out}")

    def windows(tokenizer: Any) -> Any:
        assert text is not None
        return calibration_tokens(abstract, tokenizer, text.content, samples, length)

    try:
        done = quantize_checkpoint(
            source,
            out,
            chosen,
            None if text is None else windows,
            dtype=floating,
            force=force,
            restart=restart,
            activation_bytes=activation_bytes,
            progress=ProgressLines(chosen),
            context=context,
        )
    except KeyboardInterrupt:
        raise Interrupted("finished blocks are kept, run the same command again to go on") from None
    layers, disk = sizes_of_layers(done.layers), size_of_artifact(out)
    say(f"saved {out} ({megabytes(disk)}) in {duration(done.seconds)}, fingerprint {done.fingerprint[:16]}")
    if layers.layers:
        say(
            f"{layers.layers} layers quantized: {layers.bits_per_weight:.2f} bits per weight, "
            f"{layers.relative_to_fp16:.3f} of their size in FP16"
        )
    if proxy is not None:
        with_outliers = sum(row["outliers"] > 0 for row in done.layers)
        say(f"proxy outliers in {with_outliers} of {layers.layers} layers; quikjax plan says why there are none in the others")
    if as_json:
        print_json(
            {
                "artifact": str(out),
                "fingerprint": done.fingerprint,
                "seconds": done.seconds,
                "bytes_on_disk": disk,
                **layers.as_json(),
                "layers": done.layers,
            }
        )
