"""Compile every distinct kernel of `arg_specs` for an H100 that is not there: `make gpu-compile`.

Every layer of every model at every number of rows is lowered; what lowers to the same program is compiled once. Prints a line
per kernel, the reasons on stderr, and exits with 1 if any kernel spills, has no integer tensor-core product, or fails.
"""

import argparse
import hashlib
import sys
import time

import absent_gpu
import kernel_cases

from quikjax.pallas_kernels.arg_specs import ROWS, LinearSpec, all_linears
from quikjax.pallas_kernels.split_quantize.producers import SiluMul


def _extra() -> list[LinearSpec]:
    """Formats that no model of the list uses: weight-only, and weights wider than activations or the other way round."""
    shapes = [(4, 16), (8, 16), (8, 4), (4, 8)]
    return [LinearSpec("bits", f"w{w}a{a}", 4096, 4096, 256, w, a) for w, a in shapes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--models", nargs="*", help="only these models")
    parser.add_argument("--minutes", type=float, default=35, help="fail when it takes longer (default 35)")
    arguments = parser.parse_args()
    if (reason := absent_gpu.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    start, seen, failures, lowered_count = time.monotonic(), set(), 0, 0
    for spec in all_linears() + _extra():
        if arguments.models and spec.model not in arguments.models:
            continue
        for rows in arguments.rows:
            function, shapes = kernel_cases.layer_shapes(spec, rows)
            size = f"{rows} x {spec.outputs} x {spec.inputs} O={spec.outliers}"
            label = f"{spec.model}.{spec.name} {size} W{spec.weight_bits}A{spec.bits}"
            lowered_count += 1
            try:
                lowered = absent_gpu.lower("h100", function, *shapes)
                digest = hashlib.sha256(lowered.as_text().encode()).hexdigest()
                if digest in seen:
                    continue
                seen.add(digest)
                compiled = absent_gpu.compile_lowered(lowered)
                problems = compiled.complaints(exact_division=not isinstance(spec.producer, SiluMul))
                if compiled.kernels != (1 if spec.bits == 16 else 2):
                    problems.append(f"{compiled.kernels} kernels")
                if compiled.products and spec.bits < 16 and not any(".s32.s8.s8" in p for p in compiled.products):
                    problems.append("no integer tensor-core product")
            except Exception as failure:
                problems = [f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"]
            failures += bool(problems)
            print(("FAILED " if problems else "ok     ") + label + "".join(f"; {problem}" for problem in problems), flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{lowered_count} layers, {len(seen)} distinct programs compiled for an H100, {failures} failed, {minutes:.1f} minutes")
    if minutes > arguments.minutes:
        print(f"took longer than {arguments.minutes} minutes", file=sys.stderr)
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
