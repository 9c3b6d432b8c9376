"""`quikjax demo`: what QUIK does to a real model, on this machine, without a network."""

from pathlib import Path
from typing import Annotated

import typer

from quikjax.cli.options import Json
from quikjax.cli.printing import print_json


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the artifacts in this directory (it must not exist, or be empty).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens per calibration sequence and evaluation window.")] = 512,
    as_json: Json = False,
) -> None:
    """Quantize SmolLM2-135M four ways on this machine, offline, and compare."""
    from quikjax.cli.demo_run import run

    figures = run(out, samples=samples, seqlen=seqlen, show=not as_json)
    if as_json:
        print_json(figures)
