"""Find the kernels' tiles on this GPU and write them as package data: `pallas_kernels/tiles/<device>.json`.

    python benchmarks/tune.py                              # every layer of arg_specs at every number of rows
    python benchmarks/tune.py --models llama-2-7b --rows 1 2048
    python benchmarks/tune.py --list --rows 2048           # anywhere: the candidates, nothing is run

Each candidate is first checked against the reference, bit for bit for the split and within a bound for the product; what fails
is named, never timed and never written. The rest is ranked by the median of device time.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_peers
import gpu_timing
import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels import api, layout, mosaic_layer, reference, tuned
from quikjax.pallas_kernels.arg_specs import MODELS, ROWS, LinearSpec
from quikjax.pallas_kernels.quik_matmul import mosaic as matmul_kernel
from quikjax.pallas_kernels.quik_matmul.mosaic import MatmulTiles
from quikjax.pallas_kernels.split_quantize import mosaic as split_kernel
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles
from quikjax.pallas_kernels.split_quantize.producers import Producer

TILES = Path(__file__).resolve().parent.parent / "pallas_kernels" / "tiles"
Tiles = TypeVar("Tiles", SplitTiles, MatmulTiles)


def split_candidates(rows: int, inputs: int, outliers: int, producer: Producer) -> list[SplitTiles]:
    """Every tiling that the kernel takes: one to four rows a block, one to eight warpgroups."""
    base, padded = layout.up(inputs - outliers, layout.COLUMN_TILE), layout.up(outliers, layout.COLUMN_TILE)
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
    return [t for t in tilings if matmul_kernel.why_not(t, base, weight_bits, bits) is None]


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


def tune_split(spec: LinearSpec, rows: int, clock: gpu_timing.Clock) -> SplitTiles | None:
    """The best tiles of `split_quantize` for a layer's input on the current device."""
    columns = jax.random.permutation(jax.random.key(0), spec.inputs).astype(jnp.int32)
    tiled = layout.tile_columns(columns, spec.base, spec.inputs)
    parameters = tuple(jnp.ones(spec.inputs, jnp.bfloat16) for _ in range(spec.producer.parameters))

    def make(key: jax.Array) -> tuple[Any, ...]:
        shape = (rows, spec.inputs)
        keys = jax.random.split(key, spec.producer.inputs)
        return tuple(jax.random.normal(k, shape, jnp.float32).astype(jnp.bfloat16) for k in keys)

    def run(tiles: SplitTiles) -> Callable[..., Any]:
        padded = layout.up(spec.base, layout.COLUMN_TILE)
        return lambda *inputs: split_kernel.split_quantize(
            inputs, tiled, spec.base, padded, spec.bits, spec.producer, parameters, tiles, 256
        )

    inputs = make(jax.random.key(1))
    want = api.split_quantize(inputs, columns, spec.base, spec.bits, producer=spec.producer, parameters=parameters, backend="xla")

    def correct(tiles: SplitTiles) -> bool:
        codes = np.asarray(jax.jit(run(tiles))(*inputs)[0])[:rows, : spec.base].astype(np.int32)
        off = np.abs(codes - np.asarray(want.codes, np.int32))
        fused = type(spec.producer) is not api.Identity
        return bool(off.max(initial=0) <= fused and (off > 0).mean() <= (1e-3 if fused else 0))

    sets = gpu_timing.make_sets(make, 2, False)
    candidates = split_candidates(rows, spec.inputs, spec.outliers, spec.producer)
    best, _, refused = rank(candidates, correct, lambda tiles: clock.time(run(tiles), sets).median)
    _complain("split_quantize", spec, rows, refused)
    return best


def tune_matmul(spec: LinearSpec, rows: int, clock: gpu_timing.Clock, device: api.Device) -> MatmulTiles | None:
    """The best tiles of `quik_matmul` for a layer on the current device."""

    def make(key: jax.Array) -> tuple[Any, ...]:
        x, packed = gpu_peers.random_layer(key, spec, rows, jnp.bfloat16)
        split = mosaic_layer.split((x,), packed.columns, spec.base, spec.bits, api.Identity(), (), device)
        return split, packed

    def run(tiles: MatmulTiles) -> Callable[..., Any]:
        return lambda split, packed: matmul_kernel.quik_matmul(
            split.tokens,
            split.scale,
            split.zero,
            split.outliers,
            packed.qweight,
            packed.scale,
            packed.reduced,
            packed.outliers if spec.outliers else None,
            None,
            spec.bits,
            spec.outputs,
            jnp.bfloat16,
            tiles,
            device.cores,
        )

    split, packed = make(jax.random.key(1))
    exact, plain = mosaic_layer.exact_split(split, rows, spec.base, spec.outliers), api.from_tiles(packed)
    want = np.asarray(
        reference.quik_matmul(exact, plain.qweight, plain.scale, plain.reduced, plain.outliers, None, spec.bits), np.float32
    )

    def correct(tiles: MatmulTiles) -> bool:
        got = np.asarray(jax.jit(run(tiles))(split, packed), np.float32)[:rows]
        return bool(np.abs(got - want).max() <= 2**-7 * np.abs(want).max())

    sets = gpu_timing.make_sets(make, 2, False)
    candidates = matmul_candidates(rows, layout.up(spec.base, layout.WEIGHT_TILE), spec.weight_bits, spec.bits)
    best, _, refused = rank(candidates, correct, lambda tiles: clock.time(run(tiles), sets).median)
    _complain("quik_matmul", spec, rows, refused)
    return best


def _complain(operation: str, spec: LinearSpec, rows: int, refused: list[tuple[Any, str]]) -> None:
    for tiles, reason in refused:
        print(f"{operation} {spec.model}.{spec.name} {rows} rows: {tiles} refused: {reason}", file=sys.stderr, flush=True)


def keys(spec: LinearSpec, rows: int) -> tuple[str, str]:
    """The names under which `tuned` looks for a layer's tiles: of its split, of its product."""
    outputs, base = layout.up(spec.outputs, layout.WEIGHT_TILE), layout.up(spec.base, layout.WEIGHT_TILE)
    return (
        tuned.split_key(rows, spec.inputs, spec.producer),
        tuned.matmul_key(rows, outputs, base, spec.weight_bits, spec.bits),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--out", type=Path, default=TILES)
    parser.add_argument("--list", action="store_true", help="print the candidates and run nothing")
    arguments = parser.parse_args()
    if arguments.repetitions < 1 or any(rows < 1 for rows in arguments.rows):
        parser.error("--repetitions and --rows must be at least 1")
    jobs = [(spec, rows) for name in arguments.models for spec in MODELS[name] for rows in arguments.rows]
    if arguments.list:
        for spec, rows in jobs:
            splits = split_candidates(rows, spec.inputs, spec.outliers, spec.producer)
            base = layout.up(spec.base, layout.WEIGHT_TILE)
            products = matmul_candidates(rows, base, spec.weight_bits, spec.bits)
            print(f"{spec.model}.{spec.name} {rows} rows: {len(splits)} splits, {len(products)} products")
        return 0
    device = api.current_device()
    if not device.hopper:
        print(f"the tuner times kernels on a Hopper GPU and this is {device}; --list shows the candidates", file=sys.stderr)
        return 1
    path = arguments.out / f"{tuned.slug(device.kind)}.json"
    table = json.loads(path.read_text()) if path.exists() else {"split_quantize": {}, "quik_matmul": {}}
    clock = gpu_timing.Clock("device", arguments.repetitions)
    done: set[str] = set()
    for spec, rows in jobs:
        split_name, matmul_name = keys(spec, rows)
        if split_name not in done and (best := tune_split(spec, rows, clock)) is not None:
            table["split_quantize"][split_name] = tuned.as_json(best)
        if matmul_name not in done and (product := tune_matmul(spec, rows, clock, device)) is not None:
            table["quik_matmul"][matmul_name] = tuned.as_json(product)
        done |= {split_name, matmul_name}
        command = " ".join(["python", "benchmarks/tune.py", *sys.argv[1:]])
        table |= {"device": device.kind, "versions": {"jax": jax.__version__}, "command": command}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written after every layer: a run that is cut short keeps what it found.
        path.with_suffix(".partial").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        path.with_suffix(".partial").replace(path)
        print(f"{spec.model}.{spec.name} {rows} rows", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
