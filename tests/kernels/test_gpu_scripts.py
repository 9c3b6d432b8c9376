"""`benchmarks/gpu.py` and `benchmarks/tune.py` on a machine without a GPU: refusals, a dry run, and the tuner's own logic."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import kernel_cases
import pytest

from quikjax.pallas_kernels import tuned
from quikjax.pallas_kernels.arg_specs import MODELS, ROWS
from quikjax.pallas_kernels.devices import H100
from quikjax.pallas_kernels.quik_matmul.mosaic import MatmulTiles
from quikjax.pallas_kernels.split_quantize.producers import Identity

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """stderr without the CUDA plugin's own remarks about a machine without CUDA."""
    lines = done.stderr.strip().splitlines()
    return "\n".join(line for line in lines if "absl::InitializeLog" not in line and "cudart_stub" not in line)


def test_without_a_gpu_they_end_with_one_sentence() -> None:
    for script, sentence in [("gpu.py", "JAX sees none here"), ("tune.py", "times kernels on a Hopper GPU and this is cpu")]:
        done = run(script)
        assert done.returncode == 1
        assert sentence in said(done)
        assert len(said(done).splitlines()) == 1
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("gpu.py", ["--repetitions", "0"]), ("gpu.py", ["--sections", "nothing"]), ("tune.py", ["--models", "gpt-5"])],
)
def test_bad_arguments_are_refused(script: str, arguments: list[str]) -> None:
    done = run(script, *arguments)
    assert done.returncode == 2
    assert "error:" in done.stderr


def test_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    done = run("gpu.py", "--dry-run", "--repetitions", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    written = Path(json.loads(done.stdout.splitlines()[-1])["written"])
    assert "dry run: these times mean nothing" in written.read_text()
    result = json.loads(written.with_suffix(".json").read_text())
    assert result["dry_run"] is True
    sections = {row["section"] for row in result["rows"]}
    assert sections == {"correctness", "ceilings", "ops", "split", "stages", "outliers", "blocks", "model", "shares"}
    quik = [row for row in result["rows"] if row["section"] == "ops" and row["name"].startswith("QUIK")]
    assert len(quik) == 4
    assert all(row["milliseconds"] > 0 and row["ceiling"] > 0 and len(row["samples"]) >= 1 for row in quik)
    assert {row["name"] for row in result["rows"] if row["section"] == "stages"} >= {
        f"{stage} 16 x 128 x 128" for stage in ("unfused", "fused quantization", "fused epilogue", "one kernel")
    }


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("tune", BENCHMARKS / "tune.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_tuner_checks_before_it_ranks(tune: ModuleType) -> None:
    tilings = [MatmulTiles(64, 8, stages) for stages in (2, 3, 4, 5)]
    timed: list[int] = []

    def correct(tiles: MatmulTiles) -> bool:
        if tiles.stages == 5:
            raise RuntimeError("out of shared memory")
        return tiles.stages != 2

    def milliseconds(tiles: MatmulTiles) -> float:
        timed.append(tiles.stages)
        return {3: 2.0, 4: 1.0}[tiles.stages]

    best, ranked, refused = tune.rank(tilings, correct, milliseconds)
    assert best == tilings[2]
    assert [tiles.stages for _, tiles in ranked] == [4, 3]
    assert timed == [3, 4], "the wrong and the failing one are never timed"
    assert [reason for _, reason in refused] == ["differs from the reference", "RuntimeError: out of shared memory"]
    assert tune.rank(tilings[:1], correct, milliseconds)[0] is None


def test_every_layer_has_candidates_and_the_default_among_what_is_legal(tune: ModuleType) -> None:
    from quikjax.pallas_kernels import layout
    from quikjax.pallas_kernels.quik_matmul import mosaic as matmul

    for specs in MODELS.values():
        for spec in specs:
            base = layout.up(spec.base, layout.WEIGHT_TILE)
            for rows in ROWS:
                splits = tune.split_candidates(rows, spec.inputs, spec.outliers, spec.producer)
                assert bool(splits) == kernel_cases.has_split_kernel(spec, rows), (spec, rows)
                assert tune.matmul_candidates(rows, base, spec.weight_bits, spec.bits), (spec, rows)
                tiles, measured = tuned.matmul_tiles(rows, layout.up(spec.outputs, 128), base, spec.weight_bits, spec.bits, H100)
                assert not measured, "nothing was measured yet: no tiles are shipped"
                assert matmul.why_not(tiles, base, spec.weight_bits, spec.bits) is None


def test_shipped_tiles_are_found_by_device_and_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = MatmulTiles(64, 256, 4, 16)
    table = {
        "quik_matmul": {"2048 4096 3840 w4a4": tuned.as_json(tiles)},
        "split_quantize": {"2048 4096 Identity": {"rows": 4, "warpgroups": 2}},
    }
    monkeypatch.setattr(tuned, "_table", lambda name: table if name == "nvidia-h100-80gb-hbm3" else {})
    assert tuned.matmul_tiles(1500, 4096, 3840, 4, 4, H100) == (tiles, True)
    assert tuned.matmul_tiles(1024, 4096, 3840, 4, 4, H100)[1] is False
    assert tuned.split_tiles(2048, 4096, Identity(), H100)[0].rows == 4
    # Tiles that the kernel no longer takes are passed over, not run.
    table["quik_matmul"]["2048 4096 3840 w4a4"]["stages"] = 64
    assert tuned.matmul_tiles(2048, 4096, 3840, 4, 4, H100)[1] is False
