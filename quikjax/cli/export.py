"""`quikjax export`: a model in a format that others read."""

from pathlib import Path
from typing import Annotated

import typer

from quikjax.cli.generation_options import KvCache
from quikjax.cli.options import Artifact, Json, check_artifact, check_models, parse_dtype
from quikjax.cli.printing import megabytes, print_json, say, show
from quikjax.errors import QuikError, did_you_mean

FORMATS = ("safetensors-dequantized", "awq", "jax-export")


def export(
    artifact: Artifact,
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist, or be empty.")],
    format: Annotated[
        str,
        typer.Option(
            help="safetensors-dequantized: a Hugging Face directory, weights dequantized. awq: the same with 4-bit weights in "
            "groups packed as AWQ's readers (vLLM, transformers) want them. jax-export: compiled generation with its parameters "
            "and a run.py, for a process without quikjax."
        ),
    ],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out, the artifact's own, with awq float16.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="jax-export: tokens that prompts are padded to; left out, 128.")] = None,
    context: Annotated[
        int | None,
        typer.Option(help="jax-export: tokens of prompt and continuation at most; left out, 1024, or the model's own if less."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="jax-export: rows generated together; left out, 1.")] = None,
    kv_cache: KvCache = None,
    platform: Annotated[
        list[str] | None, typer.Option(help="jax-export: cpu or cuda (plain XLA); may be given twice. Left out, cpu.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model in a format that others read. Of a directory, one transformer block is in memory at a time."""
    if format not in FORMATS:
        raise QuikError(f'there is no format "{format}" to export to; {did_you_mean(format, FORMATS)}')
    if format == "jax-export":
        check_models(artifact)
        if dtype is not None:
            raise QuikError("--dtype is of directories; exported programs compute in what the artifact is in")
        _programs(artifact, out, length, context, 1 if batch is None else batch, kv_cache, platform or ["cpu"], as_json)
        return
    check_artifact(artifact)
    others = {"--length": length, "--context": context, "--batch": batch, "--kv-cache": kv_cache, "--platform": platform}
    for option, value in others.items():
        if value is not None:
            raise QuikError(f"{option} is of jax-export; {format} has no programs")
    if dtype is not None:
        parse_dtype(dtype)

    from quikjax.checkpoint.export.awq import export_awq
    from quikjax.checkpoint.export.dequantized import export_safetensors

    def progress(done: int, total: int) -> None:
        say(f"  part {done} of {total} written")

    done = (export_awq if format == "awq" else export_safetensors)(artifact, out, dtype=dtype, progress=progress)
    if as_json:
        print_json({"out": str(out), "files": list(done.files), "bytes": done.bytes, "dtype": done.dtype})
    else:
        show(f"{out}: {len(done.files)} file{'s' if len(done.files) > 1 else ''}, {megabytes(done.bytes)} in {done.dtype}")


def _programs(
    artifact: str,
    out: Path,
    length: int | None,
    context: int | None,
    batch: int,
    kv_cache: str | None,
    platforms: list[str],
    as_json: bool,
) -> None:
    from quikjax.checkpoint.export.programs import NOT_EXPORTED, export_jax

    done = export_jax(artifact, out, length=length, context=context, batch=batch, cache=kv_cache, platforms=platforms)
    made = done.programs
    for what, reason in NOT_EXPORTED.items():
        say(f"  not exported: {what}: {reason}")
    if as_json:
        figures = {"length": made.length, "context": made.context, "batch": made.batch, "kv_cache": made.cache}
        print_json({"out": str(out), "files": list(done.files), "bytes": done.bytes, "platforms": list(made.programs), **figures})
    else:
        show(
            f"{out}: {len(done.files)} files, {megabytes(done.bytes)}, for {' and '.join(made.programs)}: {made.batch} "
            f"row{'s' if made.batch > 1 else ''}, prompts up to {made.length} tokens, {made.context} with their continuation"
        )
