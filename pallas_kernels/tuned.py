"""Tiles per GPU model: JSON package data written by `benchmarks/tune.py`, reasoned defaults where nothing was measured.

A file `tiles/<device>.json` holds device, versions and command, and under `split_quantize` and `quik_matmul` tiles by key.
Rows are bucketed to the next power of two: a tile found for 2048 rows serves 1025 to 2048.
"""

import dataclasses
import functools
import json
import re
from importlib import resources
from typing import Any

from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.quik_matmul.tiles import MatmulTiles
from quikjax.pallas_kernels.quik_matmul.tiles import default_tiles as default_matmul_tiles
from quikjax.pallas_kernels.quik_matmul.tiles import why_not as why_not_matmul
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles
from quikjax.pallas_kernels.split_quantize.mosaic import default_tiles as default_split_tiles
from quikjax.pallas_kernels.split_quantize.producers import Producer


def slug(kind: str) -> str:
    """File name of a device: `NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(0, rows - 1).bit_length()


def split_key(rows: int, inputs: int, producer: Producer) -> str:
    """Key of `split_quantize` tiles."""
    return f"{bucket(rows)} {inputs} {type(producer).__name__}"


def matmul_key(rows: int, outputs: int, base: int, weight_bits: int, bits: int) -> str:
    """Key of `quik_matmul` tiles; `base` is padded."""
    return f"{bucket(rows)} {outputs} {base} w{weight_bits}a{bits}"


@functools.cache
def _table(name: str) -> dict[str, Any]:
    file = resources.files("quikjax.pallas_kernels") / "tiles" / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def split_tiles(rows: int, inputs: int, producer: Producer, device: Device) -> tuple[SplitTiles, bool]:
    """Tiles of `split_quantize`, and whether they were measured on this device."""
    entry = _table(slug(device.kind)).get("split_quantize", {}).get(split_key(rows, inputs, producer))
    return (SplitTiles(**entry), True) if entry else (default_split_tiles(rows, inputs, producer), False)


def matmul_tiles(rows: int, outputs: int, base: int, weight_bits: int, bits: int, device: Device) -> tuple[MatmulTiles, bool]:
    """Tiles of `quik_matmul`, and whether they were measured on this device. `outputs` and `base` are padded."""
    entry = _table(slug(device.kind)).get("quik_matmul", {}).get(matmul_key(rows, outputs, base, weight_bits, bits))
    if entry:
        tiles = MatmulTiles(**entry)
        if why_not_matmul(tiles, base, weight_bits, bits) is None:
            return tiles, True
    return default_matmul_tiles(rows, outputs, base, weight_bits, bits, device.cores), False


def as_json(tiles: SplitTiles | MatmulTiles) -> dict[str, int]:
    """A tiles object as the JSON files hold it."""
    return dataclasses.asdict(tiles)
