"""Compile every case of `attention_cases` for H100, A100 and L40S that are not there: `make gpu-compile`.

Prints a line for each, and exits with 1 if one spills, is not on the tensor cores, launches more than it should, or does not
compile.
"""

import argparse
import sys
import time
import warnings

import absent_gpu
import attention_cases
from attention_cases import CASES, DEVICES, Case

from quikjax.pallas_kernels.flash_attention import choice


def launches(case: Case, gpu: str) -> int:
    """Kernels of a call: attention, the parts put together, and ALiBi's slopes rounded, which a model holds as constants."""
    return 1 + (choice.tiles(case.problem, DEVICES[gpu]).splits > 1) + case.alibi


def problems(case: Case, gpu: str) -> list[str]:
    """List what is wrong with a case, nothing if it is as it should be."""
    if (reason := choice.why_not(case.problem, DEVICES[gpu])) is not None:
        return [f"refused: {reason}"]
    try:
        assembled = attention_cases.assemble(case, gpu)
    except Exception as failure:
        return [f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"]
    found = assembled.problems(case.problem)
    if (launched := assembled.program.launched()) != launches(case, gpu):
        found.append(f"{launched} kernels launched in place of {launches(case, gpu)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="*", default=list(DEVICES), choices=list(DEVICES))
    arguments = parser.parse_args()
    if (reason := absent_gpu.missing()) is not None:
        print(reason, file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    start, failures = time.monotonic(), 0
    for gpu in arguments.gpus:
        for case in CASES:
            found = problems(case, gpu)
            failures += bool(found)
            print(("FAILED " if found else "ok     ") + f"{gpu} {case.name}" + "".join(f"; {p}" for p in found), flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(arguments.gpus) * len(CASES)} attention kernels compiled, {failures} failed, {minutes:.1f} minutes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
