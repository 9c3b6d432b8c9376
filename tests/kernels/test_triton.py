"""The Triton layer compiled for absent GPUs. Needs jax-triton for JAX 0.11: on 0.10 it asks for a device to lower at all."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import absent_gpu
import jax
import jax.numpy as jnp
import pytest

from quikjax.pallas_kernels import choice
from quikjax.pallas_kernels.choice import Problem
from quikjax.pallas_kernels.devices import A100, CPU

PROBLEM = Problem(16, 4096, 4096, 3840, jnp.int4, 4, jnp.bfloat16, jnp.bfloat16)


def _missing() -> str | None:
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed"
    if jax.__version_info__ < (0, 11):
        return f"jax-triton lowers without a device from JAX 0.11 on, this is {jax.__version__}"
    return absent_gpu.missing()


@pytest.mark.skipif(_missing() is not None, reason=str(_missing()))
@pytest.mark.parametrize("gpu", ["a100", "l40s", "h100"])
def test_triton_layer_compiles_to_integer_tensor_cores(gpu: str) -> None:
    script = Path(__file__).parent / "triton_compiles.py"
    done = subprocess.run([sys.executable, str(script), gpu], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    instructions = result["instructions"]
    assert result["kernels"] == 7  # weight-only layers quantize nothing
    assert any("s32" in name and "s8" in name and "mma" in name for name in instructions), instructions
    assert any("bf16" in name and "mma" in name for name in instructions), instructions
    # Flushing is harmless here: the scale is at least 1e-30, and neither it nor its reciprocal is ever subnormal.
    assert any(name.startswith("rcp.rn") for name in instructions), instructions
    assert not any("approx" in name or "full" in name for name in instructions), instructions


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (make test-3.12 installs it)")
def test_the_kernels_bodies_are_right_under_tritons_interpreter() -> None:
    """Splits bit for bit, products within the stated bound."""
    script = Path(__file__).parent / "triton_interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == []


def test_triton_refuses_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 8.0" in str(choice.why_not_triton(PROBLEM, CPU))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(choice.why_not_triton(PROBLEM, A100))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choice.why_not_triton(PROBLEM, A100) is None
    assert choice.why_not_triton(dataclasses.replace(PROBLEM, bits=16), A100) is None
