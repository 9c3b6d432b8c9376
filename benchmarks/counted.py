"""Counts where nothing can be timed: kernels, bytes, instructions of the inner loop, and the times that these would make.

    PYTHONPATH=.venv/gpu-compile JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python benchmarks/counted.py --models llama-2-7b --rows 1 2048

needs no GPU, only what `make gpu-compile` installs. One line per layer and one per model, as a markdown table. Bytes and kernels
follow from shapes; instructions are read from machine code; times are predicted from the assumptions printed above the table, and
a run of `benchmarks/gpu.py` is to be held against them. `--no-code` leaves the compiler out and the instructions with it.
`--decode` compiles the whole program that decodes, with 8 blocks and with 32, and counts what that launches and copies.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

from quikjax.pallas_kernels import layout
from quikjax.pallas_kernels.arg_specs import MODELS, LinearSpec
from quikjax.pallas_kernels.quik_matmul.mosaic import DIRECT_ROWS
from quikjax.planning.counts import ASSUMED, count, dense_microseconds, joined, quik_microseconds, splits_inside, tiles_of

# Layers that read one tensor share a split and are one product: how many of each there are. Other models' are fused as published.
JOINED = {"q": 3, "k": 0, "gate": 2}
# Layers whose result is added to the hidden state.
ONTO = ("o", "down", "out", "fc2", "dense", "4h_to_h")


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers of a block that read one tensor, and what running them launches: a split, products, and slices behind them.

    `inside`: one kernel, whose thread blocks split their one row themselves.
    """

    name: str
    spec: LinearSpec
    outputs: tuple[int, ...]
    products: int
    slices: int
    residual: bool
    inside: bool


def groups(model: str, rows: int, separate: bool) -> list[Group]:
    """The groups of a model's block. `separate`: as before products were joined, sliced, split and added to in themselves."""
    specs = {spec.name: spec for spec in MODELS[model]}
    found = []
    for name, spec in specs.items():
        members = JOINED.get(name, 1)
        if members == 0:
            continue
        outputs = (spec.outputs,) * members
        if name == "q" and "k" in specs:
            outputs = (spec.outputs, specs["k"].outputs, specs["k"].outputs)
        cut = rows % 8 != 0 and (separate or rows > DIRECT_ROWS)
        products = members if separate else 1
        residual = name in ONTO and not separate and rows <= DIRECT_ROWS
        inside = not separate and splits_inside(joined(spec, outputs), rows)
        found.append(Group(name, spec, outputs, products, members * cut, residual, inside))
    return found


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of machine code around products: instructions a turn, how many are products, and loads from shared memory."""

    instructions: int
    products: int
    shared_loads: int


def loop_body(listing: str, product: str) -> list[str]:
    """Names of the instructions of a listing's shortest loop with one that begins with `product`, none where there is no loop."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    found: list[list[str]] = []
    for line in listing.splitlines():
        if (label := re.match(r"(\.L_x_\d+):", line)) is not None:
            labels[label[1]] = len(lines)
        elif (code := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)", line)) is not None:
            lines.append(code[1])
            back = re.search(r"\((\.L_x_\d+)\)", code[2]) if code[1].startswith("BRA") else None
            if back is not None and back[1] in labels:
                found.append(lines[labels[back[1]] :])
    return min((body for body in found if any(name.startswith(product) for name in body)), key=len, default=[])


def inner_loop(listing: str, product: str) -> Loop | None:
    """The shortest loop of a listing with an instruction whose name begins with `product` (`IGMMA`, `HGMMA`)."""
    body = loop_body(listing, product)
    if not body:
        return None
    products = sum(name.startswith(product) for name in body)
    return Loop(len(body), products, sum(name.startswith(("LDS", "LDSM")) for name in body))


def code_of(spec: LinearSpec, rows: int) -> str:
    """Inner loop of a layer's product, as `instructions / products / shared loads` a turn and warp, and its tiles."""
    import kernel_cases
    from ptx import sass
    from ptx.compiled import compile_kernel

    make = kernel_cases.row_kernel if splits_inside(spec, rows) else kernel_cases.product_kernel
    _, function, shapes = make(spec, rows)
    loop = inner_loop(sass.listing(compile_kernel(function, *shapes).ptx), "IGMMA" if spec.bits < 16 else "HGMMA")
    return "no loop" if loop is None else f"{loop.instructions} / {loop.products} / {loop.shared_loads}"


def table(models: list[str], rows: list[int], with_code: bool, separate: bool = False) -> list[str]:
    """The table's lines."""
    times = [f"{device.name} us, bf16, ratio" for device in ASSUMED]
    lines = ["| layer | rows | kernels | MB split | MB product | tiles | loop | " + " | ".join(times) + " |"]
    lines.append("|---" * (7 + len(times)) + "|")
    seen: dict[tuple[object, ...], str] = {}
    for model in models:
        for m in rows:
            kernels, totals = 0, [[0.0, 0.0] for _ in ASSUMED]
            for group in groups(model, m, separate):
                spec = group.spec
                parts: list[tuple[int, ...]] = [(n,) for n in group.outputs] if separate else [group.outputs]
                counts = [count(spec, m, part, group.residual) for part in parts]
                padded = [joined(spec, part).outputs for part in parts]
                base = layout.round_up(spec.base, layout.WEIGHT_TILE)
                tiles = tiles_of(spec, m, parts[0], group.inside)
                key = (
                    layout.round_up(m, 8),
                    padded[0],
                    base,
                    spec.outliers,
                    spec.weight_bits,
                    spec.bits,
                    spec.bias,
                    group.inside,
                )
                if key not in seen:
                    seen[key] = code_of(dataclasses.replace(spec, outputs=padded[0]), m) if with_code else ""
                cells = []
                for device, total in zip(ASSUMED, totals, strict=True):
                    ours = quik_microseconds(device, spec, m, parts, group.residual, group.inside)
                    dense = dense_microseconds(device, spec, m, group.outputs)
                    total[0] += ours
                    total[1] += dense
                    cells.append(f"{ours:.1f}, {dense:.1f}, {dense / ours:.2f}")
                launched = (not group.inside) + group.products + group.slices
                kernels += launched
                size = f"{tiles.n}x{tiles.m}, {tiles.stages} slots, {tiles.splits} parts"
                moved = "" if group.inside else f"{counts[0].split_bytes / 1e6:.2f}"
                numbers = f"{moved} | {sum(c.product_bytes for c in counts) / 1e6:.2f}"
                name = f"{model}.{group.name}" + (f" (x{len(group.outputs)})" if len(group.outputs) > 1 else "")
                lines.append(f"| {name} | {m} | {launched} | {numbers} | {size} | {seen[key]} | " + " | ".join(cells) + " |")
            sums = [f"{ours:.1f}, {dense:.1f}, {dense / ours:.2f}" for ours, dense in totals]
            lines.append(f"| **{model}, linears of a block** | {m} | {kernels} | | | | | " + " | ".join(sums) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=["llama-2-7b", "llama-2-70b"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 2048])
    parser.add_argument("--no-code", action="store_true", help="without compiling, and without the inner loops")
    parser.add_argument("--separate", action="store_true", help="as it was before products were joined")
    parser.add_argument("--decode", action="store_true", help="the whole program that decodes instead, compiled")
    arguments = parser.parse_args()
    if any(rows < 1 for rows in arguments.rows):
        parser.error("--rows must be at least 1")
    if arguments.decode or not arguments.no_code:
        import absent_gpu
        from ptx import sass

        if (reason := absent_gpu.missing() or sass.missing()) is not None:
            print(f"{reason}; --no-code does without", file=sys.stderr)
            return 1
    if arguments.decode:
        from counted_decode import table as decode_table

        for rows in arguments.rows:
            print("\n".join(decode_table(rows, (8, 32))), flush=True)
        return 0
    for device in ASSUMED:
        print(
            f"{device.name}: assumed {device.bandwidth / 1e12:.1f} TB/s copied, {device.rate / 1e12:.0f} TFLOP/s bf16, "
            f"int8 at twice that, {device.fixed} us a kernel beside its bytes and operations, {device.split} us of it before the "
            "first product where that splits a row, less what the ring takes meanwhile"
        )
    print(
        f"kernels: a split, the product behind it (with the residual in it), and above {DIRECT_ROWS} rows that are no multiple of"
    )
    print("8 a slice of each result (which XLA may fuse into what reads it: slices are counted, their time is not)")
    print("loop: instructions / products / loads from shared memory a turn of the base product, in machine code")
    print()
    print("\n".join(table(arguments.models, arguments.rows, not arguments.no_code, arguments.separate)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
