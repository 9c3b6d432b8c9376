"""The commands: quantize, generate, eval, demo; plan and report are in `inspect`, export in `export`."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quikjax.cli import inspect
from quikjax.cli.export import export
from quikjax.errors import QuikError

app = typer.Typer(
    name="quikjax",
    help="Published language models in QUIK 4-bit format, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="smollm2-135m, a directory, a .gguf file, or a hub name org/name[@revision].")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        from quikjax import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


app.command()(inspect.plan)
app.command()(inspect.report)
app.command()(export)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    recipe: Annotated[str, typer.Option(help="quik-4b, quik-8b, w4a8, rtn-w4a4, gptq-w4a16, fp, or a .json file.")] = "quik-4b",
    outliers: Annotated[str | None, typer.Option(help="Columns in FP16: a count, or a fraction such as 0.0625 or 1/16.")] = None,
    calibration: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, or wikitext2.")] = "pydoc",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 2048,
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
    as_json: Json = False,
) -> None:
    """Quantize a published model and save it. A killed run goes on where it stopped.

    OUT.log.jsonl, beside the artifact, gets a line for each layer as it is done: follow it with tail -f.
    """
    from quikjax.cli.show import Lines, duration, megabytes, say
    from quikjax.conversion import convert, refuse_existing
    from quikjax.memory import default_activation_bytes
    from quikjax.recipe import find_recipe
    from quikjax.sizes import size_of_artifact, sizes_of_layers
    from quikjax.texts import calibration_text, calibration_windows, tokenize

    # Everything that can be wrong is looked at before anything is loaded.
    chosen = find_recipe(recipe)
    if outliers is not None:
        chosen = chosen.with_outliers(parse_outliers(outliers))
    activation_bytes = parse_activation_memory(activation_memory)
    floating = parse_dtype(dtype)
    refuse_existing(out, force=force)
    text = calibration_text(calibration) if chosen.needs_data() else None
    say(f"model        {model}, activations and unquantized weights in {dtype}")
    say(f"recipe       {chosen.name}" + (f", outliers {outliers}" if outliers is not None else ""))
    if text is not None:
        say(f"calibration  {samples} x {seqlen} tokens of {text.origin}")
        budget = default_activation_bytes() if activation_bytes is None else activation_bytes
        say(f"activations  in memory up to {megabytes(budget)}, beyond that on disk")
    say(f"output       {out}")

    def windows(tokenizer: Any) -> Any:
        assert text is not None
        return calibration_windows(tokenize(tokenizer, text.content), samples, seqlen)

    try:
        done = convert(
            model,
            out,
            chosen,
            None if text is None else windows,
            dtype=floating,
            force=force,
            restart=restart,
            activation_bytes=activation_bytes,
            progress=Lines(),
        )
    except KeyboardInterrupt:
        raise QuikError("interrupted; finished blocks are kept, run the same command again to go on") from None
    layers, disk = sizes_of_layers(done.report), size_of_artifact(out)
    say(f"saved {out} ({megabytes(disk)}) in {duration(done.seconds)}, fingerprint {done.fingerprint[:16]}")
    if layers.layers:
        say(
            f"{layers.layers} layers quantized: {layers.bits_per_weight:.2f} bits per weight, "
            f"{layers.relative_to_fp16:.3f} of their size in FP16"
        )
    if as_json:
        print_json(
            {
                "artifact": str(out),
                "fingerprint": done.fingerprint,
                "seconds": done.seconds,
                "bytes_on_disk": disk,
                **layers.as_json(),
                "layers": done.report,
            }
        )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token (so far the only way).")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    as_json: Json = False,
) -> None:
    """Continue a text. Only the continuation is printed on stdout."""
    floating = parse_dtype(dtype)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise QuikError("the prompt is empty; give some text")

    from flax import nnx

    from quikjax.cli.show import say
    from quikjax.generation import generate as run
    from quikjax.loading import load
    from quikjax.models.registry import pure_params
    from quikjax.texts import tokenize

    network, tokenizer = load(model, dtype=floating)
    if tokenizer is None:
        raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
    ids = tokenize(tokenizer, text)[None]
    out = run(nnx.split(network)[0], pure_params(network), ids, max_new_tokens=max_new_tokens, stop=tokenizer.eos_token_id)
    continuation = tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist(), skip_special_tokens=True)
    figures = {
        "prompt_tokens": out.prompt_tokens,
        "new_tokens": int(out.lengths[0]),
        "prefill_tokens_per_second": out.prefill_tokens_per_second,
        "decode_tokens_per_second": out.decode_tokens_per_second,
        "compile_seconds": out.compile_seconds,
    }
    if as_json:
        print_json({"text": continuation, **figures})
    else:
        print(continuation)
    say(
        f"prefill {out.prompt_tokens} tokens at {out.prefill_tokens_per_second:.0f} tokens/s, "
        f"decode {int(out.lengths[0])} at {out.decode_tokens_per_second:.1f} tokens/s, compiled in {out.compile_seconds:.1f} s"
    )


@app.command("eval")
def evaluate_command(
    model: Model,
    perplexity: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, or wikitext2.")],
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="How many windows, from the start of the text; left out, all.")] = None,
    against: Annotated[str | None, typer.Option(help="Another model, for KL divergence and top-1 agreement.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    as_json: Json = False,
) -> None:
    """Perplexity over non-overlapping windows, with its standard error."""
    from quikjax.texts import evaluation_text, tokenize

    floating = parse_dtype(dtype)
    text = evaluation_text(perplexity)

    from quikjax.cli.show import say
    from quikjax.evaluation import evaluate, reference
    from quikjax.evaluation import windows as cut
    from quikjax.loading import load

    network, tokenizer = load(model, dtype=floating)
    if tokenizer is None:
        raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
    ids = cut(tokenize(tokenizer, text.content), window, windows)
    say(f"{len(ids)} windows of {window} tokens of {text.origin}, not overlapping, all but the first token of each predicted")
    other = None
    if against is not None:
        other_model, _ = load(against, dtype=floating)
        if other_model.config.vocab_size != network.config.vocab_size:
            raise QuikError(f"{against} has another vocabulary than {model}; the two cannot be compared token by token")
        other = reference(other_model, ids)
    result = evaluate(network, ids, other)
    if as_json:
        print_json({"model": model, "text": text.origin, **result.as_json()})
        return
    print(f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f}  ({result.tokens} tokens, {result.tokens_per_second:.0f}/s)")
    if result.kl is not None:
        print(f"KL divergence to {against} {result.kl:.5f} ± {result.kl_stderr:.5f}, top-1 agreement {result.top1_agreement:.2%}")


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the artifacts in this directory (it must not exist).")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration sequence and evaluation window.")] = 512,
    as_json: Json = False,
) -> None:
    """Quantize SmolLM2-135M three ways on this machine, offline, and compare."""
    from quikjax.cli.demo import run

    figures = run(out, samples=samples, seqlen=seqlen, show=not as_json)
    if as_json:
        print_json(figures)


def parse_outliers(text: str) -> int | float:
    """A count or a fraction.

    >>> parse_outliers("36"), parse_outliers("0.125"), parse_outliers("1/16")
    (36, 0.125, 0.0625)
    """
    try:
        if "/" in text:
            above, below = text.split("/")
            return int(above) / int(below)
        return float(text) if "." in text else int(text)
    except (ValueError, ZeroDivisionError):
        raise QuikError(f'--outliers takes a count or a fraction such as 0.0625 or 1/16, not "{text}"') from None


def parse_activation_memory(gigabytes: float | None) -> int | None:
    """GB as bytes.

    >>> parse_activation_memory(0.5), parse_activation_memory(None)
    (500000000, None)
    """
    if gigabytes is None:
        return None
    if not 0 < gigabytes < math.inf:
        raise QuikError(f"--activation-memory takes the GB that activations may use, more than 0, not {gigabytes:g}")
    return int(gigabytes * 1e9)


def parse_dtype(name: str) -> Any:
    """A floating dtype by its name."""
    from quikjax.errors import did_you_mean

    known = ("float32", "bfloat16", "float16")
    if name not in known:
        raise QuikError(f'there is no dtype "{name}" to compute in; {did_you_mean(name, known)}')
    import jax.numpy as jnp

    return jnp.dtype(name)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, allow_nan=False, indent=2))
