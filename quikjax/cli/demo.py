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
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Take a sentence encoder, all-MiniLM-L6-v2, and compare its embeddings.")
    ] = False,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences; left out, 8, of the encoder 32.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per calibration sequence and evaluation window; left out, 512, of the encoder 128.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize SmolLM2-135M four ways on this machine, offline, and compare; with --encoder, all-MiniLM-L6-v2 three ways."""
    samples, seqlen = samples or (32 if encoder else 8), seqlen or (128 if encoder else 512)
    if encoder:
        from quikjax.cli.demo_encoder import run as run_encoder

        figures = run_encoder(out, samples=samples, seqlen=seqlen, show=not as_json)
    else:
        from quikjax.cli.demo_run import run

        figures = run(out, samples=samples, seqlen=seqlen, show=not as_json)
    if as_json:
        print_json(figures)
