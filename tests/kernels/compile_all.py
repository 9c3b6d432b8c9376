"""Compile every distinct kernel of `arg_specs` for an H100 that is not there: `make gpu-compile`.

Every layer of every model at every number of rows asks for a split and a product, and at few rows for one with a codebook. What
several layers ask for in the same shape is compiled once. Prints a line per kernel, and exits with 1 if any of them spills, has
no tensor-core product of its kind, divides inexactly, or does not compile.
"""

import argparse
import sys
import time
from typing import Any

import absent_gpu
import kernel_cases

from quikjax.pallas_kernels.arg_specs import ROWS, LinearSpec, all_linears
from quikjax.pallas_kernels.codebook_matmul import mosaic as codebook_mosaic
from quikjax.pallas_kernels.split_quantize.producers import SiluMul


def _extra() -> list[LinearSpec]:
    """Formats that no model of the list uses: weight-only, and weights wider than activations or the other way round."""
    shapes = [(4, 16), (8, 16), (8, 4), (4, 8)]
    return [LinearSpec("bits", f"w{w}a{a}", 4096, 4096, 256, w, a) for w, a in shapes]


def _problems(spec: LinearSpec, key: tuple[Any, ...], function: Any, shapes: tuple[Any, ...]) -> list[str]:
    """List what is wrong with one kernel, nothing if it is as it should be."""
    try:
        compiled = absent_gpu.compile_for("h100", function, *shapes)
    except Exception as failure:
        return [f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"]
    splits = key[0] in ("split", "row")
    problems = compiled.complaints(exact_division=not (splits and isinstance(spec.producer, SiluMul)))
    if compiled.kernels != 1:
        problems.append(f"{compiled.kernels} kernels")
    wanted = ".s32.s8.s8" if spec.bits < 16 and key[0] != "codebook" else ".f32.bf16.bf16"
    if key[0] != "split" and not any(wanted in product for product in compiled.products):
        problems.append(f"no {wanted} product on the tensor cores")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--models", nargs="*", help="only these models")
    parser.add_argument("--minutes", type=float, default=35, help="fail when it takes longer (default 35)")
    arguments = parser.parse_args()
    if (reason := absent_gpu.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    start, seen, failures, asked = time.monotonic(), set(), 0, 0
    for spec in all_linears() + _extra():
        if arguments.models and spec.model not in arguments.models:
            continue
        for rows in arguments.rows:
            splits = [kernel_cases.split_kernel] if kernel_cases.has_split_kernel(spec, rows) else []
            codebooks = [kernel_cases.codebook_kernel] if rows <= codebook_mosaic.MOST_ROWS else []
            inside = [kernel_cases.row_kernel] if kernel_cases.splits_inside(spec, rows) else []
            makers = [kernel_cases.product_kernel, *splits, *inside, *codebooks]
            for make in makers:
                key, function, shapes = make(spec, rows)
                asked += 1
                if key in seen:
                    continue
                seen.add(key)
                problems = _problems(spec, key, function, shapes)
                failures += bool(problems)
                label = f"{spec.model}.{spec.name} {' '.join(str(part) for part in key)}"
                print(("FAILED " if problems else "ok     ") + label + "".join(f"; {p}" for p in problems), flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{asked} kernels asked for, {len(seen)} distinct ones compiled for an H100, {failures} failed, {minutes:.1f} minutes")
    if minutes > arguments.minutes:
        print(f"took longer than {arguments.minutes} minutes", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
