"""Counted times and `benchmarks/counted.py`: bytes by hand, the inner loop of a listing, the table without a compiler."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from test_gpu_scripts import BENCHMARKS, module

from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.quik_matmul.tiles import MatmulTiles
from quikjax.planning import counts

LISTING = """
.L_x_1:
        /*0000*/                   LDS.U16 R1, [R2] ;
.L_x_2:
        /*0010*/                   LDS.U16 R3, [R2] ;
        /*0020*/                   PRMT R4, R3, 0x1, R3 ;
        /*0030*/                   IGMMA.64x8x32.S8.S8 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/              @!P0 BRA `(.L_x_3) ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   BRA `(.L_x_9) ;
"""


def test_the_inner_loop_is_the_shortest_around_a_product() -> None:
    counted = module("counted")
    assert counted.inner_loop(LISTING, "IGMMA") == counted.Loop(5, 1, 1)
    assert counted.inner_loop(LISTING, "HGMMA") == counted.Loop(2, 1, 0)
    assert counted.inner_loop(LISTING, "QGMMA") is None


def test_bytes_of_a_layer() -> None:
    """LLaMA-2-7B's q_proj at one row: 4096 x 3840 codes of half a byte, 256 outliers, scale and reduced."""
    result = counts.count(LinearSpec("m", "q", 4096, 4096, 256), 1)
    weight = 4096 * (3840 // 2 + 2 * 256 + 8)
    assert result.product_bytes == weight + 8 * (3840 + 2 * 256 + 8) + 8 * 4096 * 2
    assert result.split_bytes == 4096 * 2 + 4 * (3840 + 256) + 3840 + 2 * 256 + 8
    assert result.dense_bytes == 2 * (4096 + 4096 * 4096 + 4096)
    device = counts.Assumed("", 1e12, 1e15, 2.0)
    assert counts.microseconds(device, 3_000_000, 1.0) == pytest.approx(5.0)
    assert counts.microseconds(device, 3_000_000, 8e9) == pytest.approx(10.0)


def test_a_split_in_a_product_takes_what_the_ring_does_not_hide() -> None:
    spec = LinearSpec("m", "q", 4096, 4096, 256)
    found, device = counts.count(spec, 1), counts.Assumed("", 1e12, 1e15, 2.5, 12.0)
    read = 4096 * 2 + 4096 * 4
    # 32 tiles of 128 rows in 4 parts, rings of 8 slots of 128 x 64 bytes: 8.4 us of copying while the row is split.
    slow = counts.microseconds_of_row(device, found, spec, 4096, MatmulTiles(64, 8, 8, 1, 4))
    assert slow == pytest.approx(2.5 + (found.product_bytes + read) / 1e6 + 12.0 - 128 * 8 * 8192 / 1e6)
    hidden = counts.microseconds_of_row(dataclasses.replace(device, split=8.0), found, spec, 4096, MatmulTiles(64, 8, 8, 1, 4))
    assert hidden == pytest.approx(2.5 + (found.product_bytes + read) / 1e6)


def test_the_table_without_a_compiler() -> None:
    command = [sys.executable, str(Path(BENCHMARKS) / "counted.py"), "--no-code", "--rows", "1", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    totals = [line for line in lines if "linears of a block" in line]
    # Four products (q, k and v are one, gate and up are one) and four splits; of one row only the split of LLaMA-2-70B's down.
    assert [line.split("|")[3].strip() for line in totals] == ["4", "8", "5", "8"]
    assert len({line.count("|") for line in lines}) == 1
