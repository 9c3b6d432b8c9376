"""`benchmarks/counted_codebook.py`: bytes by hand, the code's time by hand, the table without a compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_gpu_scripts import BENCHMARKS, module

from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.codebook_matmul import api


def test_bytes_and_time_of_a_layer() -> None:
    """LLaMA-2-7B's q_proj at one row: half a byte a code, two bytes for 64 of them; 32 tiles in four parts of eight turns."""
    moved = api.bytes_moved(1, 4096, 4096)
    assert moved == 4096 * 4096 // 2 + 4096 * 64 * 2 + 8 * 4096 * 2 + 4096 * 2
    counted = module("counted_codebook")
    spec = LinearSpec("m", "q", 4096, 4096, 0)
    # Eight warps on four schedulers, 200 instructions a turn; or 150 of them at half the rate.
    assert counted.seconds_of_code(spec, 1, 400, 150) == pytest.approx(8 * 2 * 400 / counted.CLOCK)
    assert counted.seconds_of_code(spec, 1, 200, 150) == pytest.approx(8 * 2 * 300 / counted.CLOCK)


def test_the_table_without_a_compiler() -> None:
    command = [sys.executable, str(Path(BENCHMARKS) / "counted_codebook.py"), "--no-code", "--rows", "1", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    ratios = [float(line.split("|")[-2]) for line in lines[2:]]
    assert len(ratios) == 10
    # By its bytes NF4 is faster than bf16 at few rows.
    assert min(ratios) > 2
