"""Find the kernels' tiles on this GPU and write them as package data: `pallas_kernels/tiles/<device>.json`.

    python benchmarks/tune.py                              # every layer of arg_specs at every number of rows
    python benchmarks/tune.py --models targets llama-2-7b --minutes 8    # what the benchmark times first, ends in time
    python benchmarks/tune.py --models llama-2-7b --rows 1 2048
    python benchmarks/tune.py --list --rows 2048           # anywhere: the candidates, nothing is run

Each candidate is first checked against the reference, bit for bit for the split and within a bound for the product; what fails
is named, never timed and never written. The rest is ranked by the median of device time. Every layer is a case of its own in a
child process (`isolated.py`): a candidate that hangs ends its layer, and what was found before it is kept.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_checks
import gpu_peers
import gpu_timing
import isolated
import jax
import jax.numpy as jnp
import numpy as np
from gpu_report import OPS_TARGETS

from quikjax.pallas_kernels import api, layout, reference, tuned
from quikjax.pallas_kernels.arg_specs import MODELS, ROWS, LinearSpec
from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer
from quikjax.pallas_kernels.quik_matmul import mosaic as matmul_kernel
from quikjax.pallas_kernels.quik_matmul.tiles import LONGEST_ROWS, MatmulTiles, why_not
from quikjax.pallas_kernels.split_quantize import mosaic as split_kernel
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles
from quikjax.pallas_kernels.split_quantize.producers import Producer

TILES = Path(__file__).resolve().parent.parent / "pallas_kernels" / "tiles"
Tiles = TypeVar("Tiles", SplitTiles, MatmulTiles)
# Called with every candidate that was timed: operation, tiles, milliseconds.
Found = Callable[[str, Any, float], None]
# The shapes that the benchmark holds against the targets, at their own numbers of rows.
TARGETS = [
    (LinearSpec("targets", f"{n}x{k}", n, k, k // 16, *bits), rows)
    for counts, n, k, *_ in OPS_TARGETS
    for rows in counts
    for bits in ((4, 4), (4, 16), (8, 8))
]


def split_candidates(rows: int, inputs: int, outliers: int, producer: Producer) -> list[SplitTiles]:
    """Every tiling that the kernel takes: one to four rows a thread block, one to eight warpgroups."""
    base, padded = layout.round_up(inputs - outliers, layout.COLUMN_TILE), layout.round_up(outliers, layout.COLUMN_TILE)
    tilings = [SplitTiles(r, w) for r, w in itertools.product((1, 2, 4), range(1, 9)) if r <= rows]
    return [t for t in tilings if split_kernel.why_not(inputs, base, padded, jnp.bfloat16, producer, t) is None]


def matmul_candidates(rows: int, base: int, weight_bits: int, bits: int) -> list[MatmulTiles]:
    """Every sensible tiling: tiles not much longer than the rows, as deep a ring as fits, K split only for few rows."""
    if rows <= 64:
        m = next(m for m in (8, 16, 32, 64) if rows <= m)
        tilings = [MatmulTiles(n, m, stages, 1, s) for n in (64, 128) for stages in (4, 6, 8, 12) for s in (1, 2, 3, 4, 8)]
    else:
        sides = [(128, 128), (128, 64), (64, 128), (64, 64)]
        tilings = [MatmulTiles(n, m, stages, strip) for n, m in sides for stages in (3, 4, 5, 6) for strip in (1, 4, 8, 16)]
    return [t for t in tilings if why_not(t, base, weight_bits, bits) is None]


def rank(
    candidates: Sequence[Tiles], correct: Callable[[Tiles], bool], milliseconds: Callable[[Tiles], float]
) -> tuple[Tiles | None, list[tuple[float, Tiles]], list[tuple[Tiles, str]]]:
    """The fastest correct candidate, all correct ones by time, and the refused ones with the reason.

    A candidate is timed only after it was found correct. One that raises is refused with its error's first line.
    """
    timed, refused = [], []
    for tiles in candidates:
        try:
            if not correct(tiles):
                refused.append((tiles, "differs from the reference"))
                continue
            timed.append((milliseconds(tiles), tiles))
        except Exception as failure:
            refused.append((tiles, f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:120]}"))
    timed.sort(key=lambda pair: pair[0])
    return (timed[0][1] if timed else None), timed, refused


def _program(function: Callable[..., Any], arguments: tuple[Any, ...]) -> gpu_timing.Program:
    """Compiled once, for the check and for the clock."""
    (program,) = gpu_timing.compile_all([(function, arguments, ())])
    if isinstance(program, Exception):
        raise program
    assert isinstance(program, gpu_timing.Program)
    return program


def tune_split(spec: LinearSpec, rows: int, clock: gpu_timing.Clock, found: Found) -> None:
    """Time the tiles of `split_quantize` for a layer's input on the current device."""
    columns = jax.random.permutation(jax.random.key(0), spec.inputs).astype(jnp.int32)
    tiled = layout.tile_columns(columns, spec.base, spec.inputs)
    parameters = tuple(jnp.ones(spec.inputs, jnp.bfloat16) for _ in range(spec.producer.parameters))

    def make(key: jax.Array) -> tuple[Any, ...]:
        shape = (rows, spec.inputs)
        keys = jax.random.split(key, spec.producer.inputs)
        return tuple(jax.random.normal(k, shape, jnp.float32).astype(jnp.bfloat16) for k in keys)

    def run(tiles: SplitTiles) -> Callable[..., Any]:
        padded = layout.round_up(spec.base, layout.COLUMN_TILE)
        return lambda *inputs: split_kernel.split_quantize(
            inputs, tiled, spec.base, padded, spec.bits, spec.producer, parameters, tiles, LONGEST_ROWS
        )

    sets = gpu_timing.make_sets(make, 1, False)
    want = gpu_checks.exactly(
        lambda inputs, columns, parameters: reference.split_quantize(
            spec.producer(*inputs, *parameters), columns, spec.base, spec.bits
        ),
        sets[0],
        columns,
        parameters,
    )
    program = functools.lru_cache(maxsize=1)(lambda tiles: _program(run(tiles), sets[0]))

    def correct(tiles: SplitTiles) -> bool:
        codes = np.asarray(program(tiles).call(*sets[0])[0])[:rows, : spec.base].astype(np.int32)
        off = np.abs(codes - np.asarray(want.codes, np.int32))
        exact = spec.producer.exact
        return bool(off.max(initial=0) <= (not exact) and (off > 0).mean() <= (0 if exact else 1e-3))

    def milliseconds(tiles: SplitTiles) -> float:
        ms = clock.time_program(program(tiles), sets).median
        found("split_quantize", tiles, ms)
        return ms

    *_, refused = rank(split_candidates(rows, spec.inputs, spec.outliers, spec.producer), correct, milliseconds)
    _complain("split_quantize", spec, rows, refused)


def tune_matmul(spec: LinearSpec, rows: int, clock: gpu_timing.Clock, device: api.Device, found: Found) -> None:
    """Time the tiles of `quik_matmul` for a layer on the current device."""

    def make(key: jax.Array) -> tuple[Any, ...]:
        x, packed = gpu_peers.random_layer(key, spec, rows, jnp.bfloat16)
        split = mosaic_layer.split((x,), packed.columns, spec.base, spec.bits, api.Identity(), (), device)
        return split, packed

    def run(tiles: MatmulTiles) -> Callable[..., Any]:
        return lambda split, packed: matmul_kernel.quik_matmul(
            split, packed, None, rows=rows, bits=spec.bits, out_dtype=jnp.bfloat16, tiles=tiles, cores=device.cores
        )[0]

    sets = gpu_timing.make_sets(make, 1, False)
    want = np.asarray(_reference(spec, rows, *sets[0]), np.float32)
    program = functools.lru_cache(maxsize=1)(lambda tiles: _program(run(tiles), sets[0]))

    def correct(tiles: MatmulTiles) -> bool:
        got = np.asarray(program(tiles).call(*sets[0]), np.float32)[:rows]
        return bool(np.abs(got - want).max() <= 2**-7 * np.abs(want).max())

    def milliseconds(tiles: MatmulTiles) -> float:
        ms = clock.time_program(program(tiles), sets).median
        found("quik_matmul", tiles, ms)
        return ms

    candidates = matmul_candidates(rows, layout.round_up(spec.base, layout.WEIGHT_TILE), spec.weight_bits, spec.bits)
    *_, refused = rank(candidates, correct, milliseconds)
    _complain("quik_matmul", spec, rows, refused)


def _reference(spec: LinearSpec, rows: int, split: layout.TileSplit, packed: api.Tiled) -> jax.Array:
    """The product that every candidate is held against, from the split that it reads."""
    plain = api.from_tiles(packed)
    if spec.bits == 16:
        outliers = jnp.zeros((rows, 0)) if split.outliers is None else split.outliers[:rows, : spec.outliers]
        y = reference.float_matmul(split.tokens[:rows, : spec.base], plain.qweight.astype(jnp.int8)) * plain.scale
        return y + reference.float_matmul(outliers, plain.outliers)
    exact = mosaic_layer.exact_split(split, rows, spec.base, spec.outliers)
    return reference.quik_matmul(exact, plain.qweight, plain.scale, plain.reduced, plain.outliers, None, spec.bits)


def _complain(operation: str, spec: LinearSpec, rows: int, refused: list[tuple[Any, str]]) -> None:
    for tiles, reason in refused:
        print(f"{operation} {spec.model}.{spec.name} {rows} rows: {tiles} refused: {reason}", file=sys.stderr, flush=True)


def keys(spec: LinearSpec, rows: int) -> tuple[str, str]:
    """The names under which `tuned` looks for a layer's tiles: of its split, of its product."""
    outputs, base = layout.round_up(spec.outputs, layout.WEIGHT_TILE), layout.round_up(spec.base, layout.WEIGHT_TILE)
    return (
        tuned.split_key(rows, spec.inputs, spec.producer),
        tuned.matmul_key(rows, outputs, base, spec.weight_bits, spec.bits),
    )


def _jobs(models: Sequence[str], rows: Sequence[int]) -> dict[str, tuple[LinearSpec, int]]:
    """Layers and numbers of rows by name; what would tune the same two kernels again is left out."""
    asked = [job for name in models for job in (TARGETS if name == "targets" else itertools.product(MODELS[name], rows))]
    distinct: dict[tuple[str, str], tuple[LinearSpec, int]] = {}
    for spec, count in asked:
        distinct.setdefault(keys(spec, count), (spec, count))
    return {
        f"{spec.model}.{spec.name} W{spec.weight_bits}A{spec.bits} {count} rows": (spec, count)
        for spec, count in distinct.values()
    }


class Table:
    """The tiles' file: rewritten with every candidate that is faster than what it holds of this run."""

    def __init__(self, path: Path, head: Mapping[str, Any]):
        self.path = path
        old = json.loads(path.read_text()) if path.exists() else {}
        self.content: dict[str, Any] = {"split_quantize": {}, "quik_matmul": {}, **old, **head}
        self.best: dict[tuple[str, str], float] = {}

    def take(self, row: isolated.Row) -> None:
        """One candidate's row, or that of a layer that failed."""
        if "failed" in row:
            print(f"{row['name']}: {row['failed']}", file=sys.stderr, flush=True)
            return
        place = (row["operation"], row["key"])
        if row["milliseconds"] >= self.best.get(place, float("inf")):
            return
        self.best[place] = row["milliseconds"]
        self.content[row["operation"]][row["key"]] = row["tiles"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")
        partial.replace(self.path)


def _tuner(given: Mapping[str, Any]) -> Callable[[str, Callable[[isolated.Row], None]], None]:
    """The child: tunes one layer, a row for every candidate that is right."""
    jobs, clock = _jobs(given["models"], given["rows"]), gpu_timing.Clock("device", given["repetitions"])
    device = api.current_device()
    # Layers share kernels: q and o have one product.
    done: set[str] = set()

    def tune(case: str, emit: Callable[[isolated.Row], None]) -> None:
        spec, rows = jobs[case]
        names = dict(zip(("split_quantize", "quik_matmul"), keys(spec, rows), strict=True))

        def found(operation: str, tiles: Any, ms: float) -> None:
            emit({"operation": operation, "key": names[operation], "tiles": tuned.as_json(tiles), "milliseconds": ms})

        if spec.bits < 16 and names["split_quantize"] not in done:
            tune_split(spec, rows, clock, found)
        if names["quik_matmul"] not in done:
            tune_matmul(spec, rows, clock, device, found)
        done.update(names.values())

    return tune


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["targets", *MODELS]
    parser.add_argument("--models", nargs="*", choices=known, default=known)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="of the models; the targets have their own")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="stop after so many; what was found is written")
    parser.add_argument(
        "--patience", type=float, default=90, help="seconds without a word that are taken for a hang (default 90)"
    )
    parser.add_argument("--out", type=Path, default=TILES)
    parser.add_argument("--list", action="store_true", help="print the candidates and run nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return isolated.serve(_tuner)
    if arguments.repetitions < 1 or any(rows < 1 for rows in arguments.rows):
        parser.error("--repetitions and --rows must be at least 1")
    jobs = _jobs(arguments.models, arguments.rows)
    if arguments.list:
        for name, (spec, rows) in jobs.items():
            splits = split_candidates(rows, spec.inputs, spec.outliers, spec.producer) if spec.bits < 16 else []
            base = layout.round_up(spec.base, layout.WEIGHT_TILE)
            products = matmul_candidates(rows, base, spec.weight_bits, spec.bits)
            print(f"{name}: {len(splits)} splits, {len(products)} products")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    device = api.current_device()
    if not device.hopper:
        print(f"the tuner times kernels on a Hopper GPU and this is {device}; --list shows the candidates", file=sys.stderr)
        return 1
    command = " ".join(["python", "benchmarks/tune.py", *sys.argv[1:]])
    head = {"device": device.kind, "versions": {"jax": jax.__version__}, "command": command}
    table = Table(arguments.out / f"{tuned.slug(device.kind)}.json", head)
    isolated.run(
        [sys.executable, __file__, "--child"],
        list(jobs),
        {"models": arguments.models, "rows": arguments.rows, "repetitions": arguments.repetitions},
        table.take,
        patience=arguments.patience,
        deadline=deadline,
        environment=gpu_timing.without_graphs(os.environ.get("XLA_FLAGS", "")),
    )
    print(f"{len(table.best)} kernels tuned, in {table.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
