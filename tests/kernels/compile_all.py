"""Compile every distinct kernel of `arg_specs` for an H100 that is not there: `make gpu-compile`.

Every layer of every model at every number of rows asks for a split and a product, and at few rows for one with a codebook. What
several layers ask for in the same shape is compiled once, on every core of this machine. Prints a line per kernel, and exits with
1 if any of them spills, has no tensor-core product of its kind, divides inexactly, or does not compile.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import absent_gpu
import kernel_cases

from quikjax.pallas_kernels.arg_specs import ROWS, LinearSpec, all_linears
from quikjax.pallas_kernels.codebook_matmul import mosaic as codebook_mosaic
from quikjax.pallas_kernels.split_quantize.producers import Gelu, SiluMul


def _extra() -> list[LinearSpec]:
    """Formats that no model of the list uses: weight-only, and weights wider than activations or the other way round."""
    shapes = [(4, 16), (8, 16), (8, 4), (4, 8)]
    return [LinearSpec("bits", f"w{w}a{a}", 4096, 4096, 256, w, a) for w, a in shapes]


class Kernel(NamedTuple):
    """A kernel of a layer: what another process needs to make it."""

    make: str  # a function of `kernel_cases`
    spec: LinearSpec
    rows: int


def _problems(kernel: Kernel) -> list[str]:
    """List what is wrong with one kernel, nothing if it is as it should be."""
    spec = kernel.spec
    key, function, shapes = getattr(kernel_cases, kernel.make)(spec, kernel.rows)
    try:
        compiled = absent_gpu.compile_for("h100", function, *shapes)
    except Exception as failure:
        return [f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"]
    if not compiled.log:
        return ["nothing was printed, so nothing is checked: was the same kernel compiled before under another key?"]
    splits = key[0] in ("split", "row")
    problems = compiled.complaints(exact_division=not (splits and isinstance(spec.producer, SiluMul | Gelu)))
    if compiled.kernels != 1:
        problems.append(f"{compiled.kernels} kernels")
    wanted = ".s32.s8.s8" if spec.bits < 16 and key[0] != "codebook" else ".f32.bf16.bf16"
    if key[0] != "split" and not any(wanted in product for product in compiled.products):
        problems.append(f"no {wanted} product on the tensor cores")
    return problems


def _asked(models: list[str] | None, rows: list[int]) -> Iterator[Kernel]:
    """Every kernel that a layer of the lists asks for, those that several ask for as often."""
    for spec in all_linears() + _extra():
        if models and spec.model not in models:
            continue
        for count in rows:
            yield Kernel("product_kernel", spec, count)
            if kernel_cases.has_split_kernel(spec, count):
                yield Kernel("split_kernel", spec, count)
            if kernel_cases.splits_inside(spec, count):
                yield Kernel("row_kernel", spec, count)
            if count <= codebook_mosaic.MOST_ROWS:
                yield Kernel("codebook_kernel", spec, count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--models", nargs="*", help="only these models")
    parser.add_argument("--minutes", type=float, default=35, help="fail when it takes longer (default 35)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many compile at a time (default all cores)")
    arguments = parser.parse_args()
    if (reason := absent_gpu.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    start, asked, failures = time.monotonic(), 0, 0
    distinct: dict[tuple[Any, ...], Kernel] = {}
    for kernel in _asked(arguments.models, arguments.rows):
        asked += 1
        distinct.setdefault(getattr(kernel_cases, kernel.make)(kernel.spec, kernel.rows)[0], kernel)
    # A fresh process each: a fork would share the threads of the JAX that is running here.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        for (key, kernel), problems in zip(distinct.items(), pool.map(_problems, distinct.values(), chunksize=4), strict=True):
            failures += bool(problems)
            label = f"{kernel.spec.model}.{kernel.spec.name} {' '.join(str(part) for part in key)}"
            print(("FAILED " if problems else "ok     ") + label + "".join(f"; {p}" for p in problems), flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{asked} kernels asked for, {len(distinct)} distinct, compiled for an H100; {failures} failed, {minutes:.1f} minutes")
    if minutes > arguments.minutes:
        print(f"took longer than {arguments.minutes} minutes", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
