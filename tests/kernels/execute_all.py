"""Execute the compiled PTX of more kernels than `make test` has time for, and check their machine code: `make gpu-compile`.

    python tests/kernels/execute_all.py             # all of it, a few minutes
    python tests/kernels/execute_all.py --few       # a part of the tests' cases: for another pair of Python and JAX

All of the tests' cases, products of every kind with the tiles that an H100 would be given, and one real layer: LLaMA-2-7B's
q_proj at one row, split in its kernel behind the norm. Prints a line per case; exits with 1 if one is wrong.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator

import absent_gpu
from ptx import sass
from ptx.cases import Product, Row, Split, product_run, row_run, wrong
from ptx.codebook_cases import Codebook, codebook_run
from ptx.codebook_cases import wrong as wrong_codebook
from test_ptx import PRODUCTS, ROWS, SPLITS
from test_ptx_codebook import CODEBOOKS

from quikjax.pallas_kernels import layout
from quikjax.pallas_kernels.codebook_matmul import mosaic as codebook_mosaic
from quikjax.pallas_kernels.devices import H100
from quikjax.pallas_kernels.quik_matmul import tiles as matmul
from quikjax.pallas_kernels.split_quantize import mosaic as split
from quikjax.pallas_kernels.split_quantize.producers import Producer, RmsNorm, SiluMul

# rows, outputs, inputs, outliers, weight bits, activation bits: with the tiles that an H100 would be given.
_SHAPES = [
    (1, 1024, 2048, 128, 4, 4),
    (16, 512, 1376, 86, 8, 8),
    (64, 768, 1024, 64, 4, 8),
    (129, 512, 1024, 64, 4, 4),
    (200, 264, 640, 36, 4, 4),
    (300, 256, 512, 0, 8, 8),
    (64, 256, 1024, 64, 4, 16),
    (130, 256, 512, 36, 4, 16),
]


def _product(rows: int, outputs: int, inputs: int, outliers: int, weight_bits: int, bits: int) -> Product:
    padded, base = layout.round_up(outputs, layout.WEIGHT_TILE), layout.round_up(inputs - outliers, layout.WEIGHT_TILE)
    tiles = matmul.default_tiles(rows, padded, base, weight_bits, bits, H100.cores)
    return Product(rows, outputs, inputs, outliers, weight_bits, bits, True, tiles, cores=H100.cores)


def _split(rows: int, inputs: int, outliers: int, bits: int, producer: Producer) -> Split:
    return Split(rows, inputs, outliers, bits, producer, split.default_tiles(rows, inputs, producer))


def cases(few: bool) -> Iterator[Product | Split | Row]:
    """The cases in order."""
    if few:
        yield from PRODUCTS[::3]
        yield from SPLITS[::4]
        yield from ROWS[::4]
        return
    yield from PRODUCTS
    yield from SPLITS
    yield from ROWS
    for shape in _SHAPES:
        yield _product(*shape)
    yield _split(3, 4096, 256, 4, RmsNorm(1e-5))
    yield _split(1, 11008, 688, 8, SiluMul())
    # LLaMA-2-7B, q_proj.
    yield Row(dataclasses.replace(_product(1, 4096, 4096, 256, 4, 4), bias=False), RmsNorm(1e-6))


def codebooks(few: bool) -> list[Codebook]:
    """Products with codebooks: the tests' cases, and an eighth of LLaMA-2-7B's q_proj at one row and at 64."""
    if few:
        return CODEBOOKS[::3]
    real = [Codebook(rows, 512, 4096, 64, False, codebook_mosaic.default_tiles(rows, 4096, 4096, H100.cores)) for rows in (1, 64)]
    return CODEBOOKS + real


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="a part of the tests' cases")
    few = parser.parse_args().few
    reason = absent_gpu.missing() or (None if few else sass.missing())
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    start, count, failures = time.monotonic(), 0, 0
    for book in codebooks(few):
        begun = time.monotonic()
        problems = wrong_codebook(book)
        if not few:
            code = sass.listing(codebook_run(book).compiled.ptx)
            problems += [f"before its wait: {text}" for text in sass.touched_too_early(code)[:3]]
        count, failures = count + 1, failures + bool(problems)
        state = "FAILED " if problems else "right  "
        print(f"{state}codebook {book} {time.monotonic() - begun:.1f} s" + "".join(f"; {p}" for p in problems), flush=True)
    for case in cases(few):
        begun = time.monotonic()
        problems = wrong(case)
        if isinstance(case, Product | Row) and not few:
            run = product_run(case) if isinstance(case, Product) else row_run(case)
            code = sass.listing(run.compiled.ptx)
            problems += [f"before its wait: {text}" for text in sass.touched_too_early(code)[:3]]
        count, failures = count + 1, failures + bool(problems)
        kind = type(case).__name__.lower()
        state = "FAILED " if problems else "right  "
        print(f"{state}{kind} {case} {time.monotonic() - begun:.1f} s" + "".join(f"; {p}" for p in problems), flush=True)
    print(f"{count} kernels executed under two timings, {failures} wrong, {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
