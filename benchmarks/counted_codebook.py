"""Counts for 4-bit codebooks where nothing can be timed: NF4's kernel against a bf16 product, by bytes and by instructions.

    PYTHONPATH=.venv/gpu-compile JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/counted_codebook.py --models llama-2-7b

needs no GPU, only what `make gpu-compile` installs. Bytes follow from shapes; the instructions of the loop over 128 columns are
read from machine code. Three times are predicted for a layer on an H100: of its bytes, of its instructions if every scheduler
issues one a cycle, and of its integer ones at half that rate, the rate of look-ups (`prmt`); the slowest counts. The assumptions
are printed above the table, and a run of `benchmarks/gpu.py` is to be held against them. `--no-code` leaves the compiler out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import counted

from quikjax.pallas_kernels import layout
from quikjax.pallas_kernels.arg_specs import MODELS, LinearSpec
from quikjax.pallas_kernels.codebook_matmul import api, mosaic
from quikjax.pallas_kernels.codebook_matmul.layout import TILE
from quikjax.pallas_kernels.devices import H100
from quikjax.planning import counts

CLOCK = 1.755e9
WARPS = 4 * mosaic.COMPUTE  # of a thread block that run the loop
INTEGER = ("PRMT", "LOP3", "SHF", "IADD3", "IMAD", "LEA", "ISETP", "SEL")


def loop_of(spec: LinearSpec, rows: int) -> tuple[int, int, int]:
    """Instructions of the loop over 128 columns: all, integer ones among them, and tensor-core products."""
    import kernel_cases
    from ptx import sass
    from ptx.compiled import compile_kernel

    _, function, shapes = kernel_cases.codebook_kernel(spec, rows)
    body = counted.loop_body(sass.listing(compile_kernel(function, *shapes).ptx), "HGMMA")
    return len(body), sum(name.startswith(INTEGER) for name in body), sum(name.startswith("HGMMA") for name in body)


def seconds_of_code(spec: LinearSpec, rows: int, instructions: int, integer: int) -> float:
    """The slower of issuing and of integer arithmetic, over the multiprocessor with the most tiles."""
    blocks, steps = layout.round_up(spec.outputs, TILE) // TILE, layout.round_up(spec.inputs, TILE) // TILE
    splits = mosaic.default_tiles(rows, blocks * TILE, steps * TILE, H100.cores).splits
    waves = -(-blocks * splits // H100.cores)
    turns = waves * -(-steps // splits) * WARPS / 4  # of each of the four schedulers
    return max(turns * instructions, turns * integer * 2) / CLOCK


def layers_like(model: str, spec: LinearSpec) -> int:
    """How many layers of a block have this shape: the list names one of q, k, v and one of gate, up."""
    if spec.name == "gate":
        return 2
    has_keys = any(other.name == "k" for other in MODELS[model])
    return {"q": 1 if has_keys else 3, "k": 2}.get(spec.name, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=["llama-2-7b"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--no-code", action="store_true", help="without compiling, and without the loop")
    arguments = parser.parse_args()
    if any(not 1 <= rows <= mosaic.MOST_ROWS for rows in arguments.rows):
        parser.error(f"--rows must be between 1 and {mosaic.MOST_ROWS}")
    if not arguments.no_code:
        import absent_gpu
        from ptx import sass

        if (reason := absent_gpu.missing() or sass.missing()) is not None:
            print(f"{reason}; --no-code does without", file=sys.stderr)
            return 1
    device = counts.ASSUMED[0]
    print(
        f"{device.name}: assumed {device.bandwidth / 1e12:.1f} TB/s copied, {device.rate / 1e12:.0f} TFLOP/s bf16, "
        f"{device.fixed} us a kernel beside, {H100.cores} multiprocessors at {CLOCK / 1e9:.3f} GHz"
    )
    print("loop: instructions / integer ones / products a warp and turn of 128 columns, in machine code")
    print()
    print("| layer | rows | MB NF4 | MB bf16 | loop | us of bytes | us of code | NF4 us | bf16 us | ratio |")
    print("|---" * 10 + "|")
    seen: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for model in arguments.models:
        for rows in arguments.rows:
            total = [0.0, 0.0]
            for spec in MODELS[model]:
                times = layers_like(model, spec)
                moved = api.bytes_moved(rows, spec.outputs, spec.inputs)
                dense = 2 * (rows * spec.inputs + spec.outputs * spec.inputs + rows * spec.outputs)
                flops = 2 * rows * spec.outputs * spec.inputs
                key = (rows, spec.outputs, spec.inputs)
                if key not in seen:
                    seen[key] = (0, 0, 0) if arguments.no_code else loop_of(spec, rows)
                instructions, integer, products = seen[key]
                code = 1e6 * seconds_of_code(spec, rows, instructions, integer)
                ours = max(counts.microseconds(device, moved, flops), device.fixed + code)
                theirs = counts.microseconds(device, dense, flops)
                total[0] += times * ours
                total[1] += times * theirs
                name = f"{model}.{spec.name}" + (f" (x{times})" if times > 1 else "")
                print(
                    f"| {name} | {rows} | {moved / 1e6:.2f} | {dense / 1e6:.2f} | {instructions} / {integer} / {products} "
                    f"| {1e6 * moved / device.bandwidth:.1f} | {code:.1f} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |"
                )
            sums = f"{total[0]:.1f} | {total[1]:.1f} | {total[1] / total[0]:.2f}"
            print(f"| **{model}, linears of a block** | {rows} | | | | | | {sums} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
