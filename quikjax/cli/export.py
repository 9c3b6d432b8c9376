"""`quikjax export`: an artifact in a format that others read."""

from pathlib import Path
from typing import Annotated

import typer

from quikjax.cli.options import Artifact, Json, parse_dtype
from quikjax.cli.printing import megabytes, print_json, say, show
from quikjax.errors import QuikError, did_you_mean

FORMATS = ("safetensors-dequantized",)


def export(
    artifact: Artifact,
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist, or be empty.")],
    format: Annotated[str, typer.Option(help="safetensors-dequantized: a Hugging Face directory, weights dequantized.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out, the artifact's own.")] = None,
    as_json: Json = False,
) -> None:
    """Write an artifact in a format that others read. One transformer block is in memory at a time."""
    if format not in FORMATS:
        raise QuikError(f'there is no format "{format}" to export to; {did_you_mean(format, FORMATS)}')
    if dtype is not None:
        parse_dtype(dtype)

    from quikjax.checkpoint.export.dequantized import export_safetensors

    def progress(done: int, total: int) -> None:
        say(f"  part {done} of {total} written")

    done = export_safetensors(artifact, out, dtype=dtype, progress=progress)
    if as_json:
        print_json({"out": str(out), "files": list(done.files), "bytes": done.bytes, "dtype": done.dtype})
    else:
        show(f"{out}: {len(done.files)} file{'s' if len(done.files) > 1 else ''}, {megabytes(done.bytes)} in {done.dtype}")
