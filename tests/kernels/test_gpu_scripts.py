"""`benchmarks/gpu.py` and `benchmarks/tune.py` on a machine without a GPU: refusals, a dry run, and the tuner's own logic."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import absent_gpu
import jax
import jax.numpy as jnp
import kernel_cases
import pytest

from quikjax.pallas_kernels import api, reference, tuned
from quikjax.pallas_kernels.arg_specs import MODELS, ROWS, LinearSpec, all_linears
from quikjax.pallas_kernels.devices import H100
from quikjax.pallas_kernels.quik_matmul.tiles import MatmulTiles
from quikjax.pallas_kernels.split_quantize.producers import Identity

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # Nothing here is run twice: code that is fast to make, not to run.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
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
    [("gpu", ["--repetitions", "0"]), ("gpu", ["--sections", "nothing"]), ("tune", ["--models", "gpt-5"])],
)
def test_bad_arguments_are_refused(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        module(script).main()
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


# `make gpu-compile` runs it: a minute and a half of processor time.
@pytest.mark.slow
def test_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    done = run("gpu.py", "--dry-run", "--out", str(tmp_path), "--threads", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["wrong"] == []
    written = Path(last["written"])
    assert "dry run: these times mean nothing" in written.read_text()
    result = json.loads(written.with_suffix(".json").read_text())
    assert result["dry_run"] is True
    rows = result["rows"]
    failed = [row for row in rows if "failed" in row]
    assert all(row["section"] == "torch" for row in failed), failed
    assert {row["section"] for row in rows} == {
        *("ceilings", "correctness", "ops", "model", "shares", "split", "stages", "outliers", "torch", "blocks")
    }
    assert {"W4A16" in row["name"] for row in rows if row["section"] == "correctness"} == {True, False}
    quik = [row for row in rows if row["section"] == "ops" and row["name"].startswith("QUIK")]
    assert len(quik) == 4
    assert all(row["milliseconds"] > 0 and row["ratio"] > 0 and row["ceiling"] > 0 and row["of_ceiling"] > 0 for row in quik)
    assert {row["name"] for row in rows if row["section"] == "stages"} >= {
        f"{stage} 16 x 128 x 128" for stage in ("unfused", "fused quantization", "fused epilogue", "one kernel")
    }
    steps = [row for row in rows if "decode" in row["name"] and row["name"].startswith("QUIK-4B")]
    assert len(steps) == 4
    assert all(row["ratio"] > 0 and row["ceiling"] > 0 for row in steps)
    assert {row["name"] for row in rows if row.get("size") and row["name"].startswith("QUIK")} == {
        *("QUIK-4B parameters", "QUIK-4B peak memory, batch 1, context 2048")
    }
    assert abs(sum(row["share"] for row in rows if row["section"] == "shares") - 1) < 1e-6


def module(name: str) -> ModuleType:
    """A script under benchmarks/, which import one another by their own names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


CHILD = """
import os, sys, time
sys.path.insert(0, {folder!r})
import isolated

def run_case(case, emit):
    if case == "raises":
        raise ValueError("no")
    if case == "dies":
        os.abort()
    if case == "busy":
        for _ in range(4):
            time.sleep(1)
            isolated.progress("a program compiled")
    if case == "environment":
        emit({{"name": os.environ["XLA_FLAGS"]}})
    emit({{"name": case, "given": 3}})
    if case == "hangs":
        time.sleep(60)

sys.exit(isolated.serve(lambda given: run_case))
"""


def test_a_case_that_fails_costs_only_itself() -> None:
    isolated = module("isolated")
    command = [sys.executable, "-c", CHILD.format(folder=str(BENCHMARKS))]
    rows: list[dict[str, Any]] = []
    soon = time.monotonic() + 60
    isolated.run(command, ["raises", "a", "dies", "b", "hangs", "c"], {}, rows.append, patience=2, deadline=soon)
    assert [row["name"] for row in rows] == ["raises", "a", "dies", "b", "hangs", "hangs", "c"]
    reasons = [row.get("failed") for row in rows]
    assert reasons[0] == "ValueError: no"
    assert reasons[2] == "the process was ended by SIGABRT"
    assert "hangs" in str(reasons[5]), "what it had measured is kept, and that it hung is said"
    assert [reasons[i] for i in (1, 3, 4, 6)] == [None] * 4


def test_a_child_that_is_busy_and_says_so_is_not_taken_to_hang(capfd: pytest.CaptureFixture[str]) -> None:
    isolated = module("isolated")
    command = [sys.executable, "-c", CHILD.format(folder=str(BENCHMARKS))]
    rows: list[dict[str, Any]] = []
    isolated.run(command, ["busy"], {}, rows.append, patience=3, deadline=time.monotonic() + 60)
    assert rows == [{"name": "busy", "given": 3}]
    assert capfd.readouterr().err.count("a program compiled") == 4


def test_what_reads_the_device_clock_launches_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's sources call the two together memory corruption. The host's clock keeps graphs, as a model would run."""
    timing, sections, isolated = module("gpu_timing"), module("gpu_sections"), module("isolated")
    assert set(sections.WITH_GRAPHS) == {"model", "torch"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    flags = timing.without_graphs(os.environ["XLA_FLAGS"])
    rows: list[dict[str, Any]] = []
    command = [sys.executable, "-c", CHILD.format(folder=str(BENCHMARKS))]
    soon = time.monotonic() + 60
    isolated.run(command, ["environment"], {}, rows.append, patience=30, deadline=soon, environment=flags)
    assert rows[0]["name"] == "--xla_dump_to=x --xla_gpu_enable_command_buffer="
    # A flag that XLA does not know ends the process.
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env={**os.environ, **timing.without_graphs("")})
    assert done.returncode == 0


def test_every_compiled_program_is_told() -> None:
    told: list[str] = []
    jobs = [(lambda x: x + 1, (jnp.ones(3),), ()), (lambda x: x.nothing, (jnp.ones(3),), ())]
    good, bad = module("gpu_timing").compile_all(jobs, 1, told.append)
    assert isinstance(bad, AttributeError)
    assert not isinstance(good, Exception)
    assert [text.split(",")[0] for text in told] == [
        *("lowering of a program done", "lowering of a program failed: AttributeError"),
        *("compilation of a program done", "compilation of a program failed: AttributeError"),
    ]


def test_no_time_left_is_said_for_every_case() -> None:
    isolated = module("isolated")
    rows: list[dict[str, Any]] = []
    isolated.run(["false"], ["a", "b"], {}, rows.append, patience=2, deadline=time.monotonic() - 1)
    assert [row["failed"] for row in rows] == ["not run: out of time"] * 2
    rows.clear()
    isolated.run(["false"], ["a", "b"], {}, rows.append, patience=2, deadline=time.monotonic() + 60)
    assert [row["failed"] for row in rows] == ["the process ended with 1"] * 2


def test_report_reckons_ratios_and_judges_targets(tmp_path: Path) -> None:
    report = module("gpu_report")
    size, head = (
        "64 x 8192 x 8192",
        {"device": "GPU", "dry_run": False, "command": "c", "versions": {"jax": "1"}, "bandwidth": 2e12},
    )
    rows = [
        {"section": "ops", "name": f"bf16 {size}", "samples": [3.0, 2.0, 9.0]},
        {"section": "ops", "name": f"QUIK W4A4 {size}", "samples": [2.0], "of": f"bf16 {size}", "ideal_milliseconds": 1.0},
        {"section": "ops", "name": "of nothing", "samples": [2.0], "of": "missing"},
        {"section": "split", "name": "Identity 2048 x 4096", "samples": [1.0], "moved_bytes": 10**9},
        {"section": "model", "name": "bf16 parameters", "bytes": 100},
        {"section": "model", "name": "QUIK-4B parameters", "bytes": 37, "of": "bf16 parameters"},
        {"section": "correctness", "name": "a layer", "failed": "wrong"},
    ]
    done = report.finish(rows, head["bandwidth"])
    assert (done[1]["ratio"], done[1]["ceiling"], done[1]["of_ceiling"]) == (1.5, 3.0, 0.5)
    assert "ratio" not in done[2]
    assert done[3]["share_of_copy_bandwidth"] == pytest.approx(0.5)
    text = report.write(head, rows, tmp_path, "stem").read_text()
    assert f"| {size} | 1.4x | 1.6x | 1.50x | 3.00 | 50% | 1.4x |  | reached |" in text
    assert "| Identity 2048 x 4096 | 0.7 |  | 0.50 |" in text
    assert "| QUIK-4B parameters | 0.38x |  | 0.37x |" in text
    assert "0 of 1 cases right" in text
    assert "Not to be quoted while these are wrong:** a layer" in text
    assert not list(tmp_path.glob("*.partial"))


def test_blocks_have_the_layers_that_kernels_are_compiled_for() -> None:
    models = module("gpu_model")
    for name, fields in {**models.BLOCKS, "llama-2-7b": models.LLAMA_2_7B | {"num_hidden_layers": 1}}.items():
        built: list[Any] = []
        jax.eval_shape(lambda fields=fields, built=built: built.append(models.build(fields, True, jnp.bfloat16)))
        want = {(s.outputs, s.inputs, s.outliers, s.weight_bits, s.bits) for s in MODELS[name]}
        assert {(s.outputs, s.inputs, s.outliers, s.weight_bits, s.bits) for s in built[0].linears} == want, name


def test_correctness_covers_every_number_of_rows_and_every_layer_on_request() -> None:
    checks = module("gpu_checks")
    few, every = checks.cases(False), checks.cases(True)
    assert {rows for _, rows in few.values()} == set(ROWS)
    assert {(spec.weight_bits, spec.bits) for spec, _ in few.values()} == {(4, 4), (8, 8), (4, 8), (8, 4), (4, 16)}
    assert {spec for spec, _ in every.values()} >= set(all_linears())


@pytest.mark.long
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = module("gpu_checks")
    spec, right = LinearSpec("test", "layer", 40, 192, 12), reference.float_matmul
    assert checks.check(spec, 5, jnp.bfloat16, "xla")["error"] <= 1
    monkeypatch.setattr(reference, "float_matmul", lambda x, w: right(x, w) * 1.02)
    with pytest.raises(ValueError, match="times the bound away from float64"):
        checks.check(dataclasses.replace(spec, inputs=200), 5, jnp.bfloat16, "xla")


@pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))
@pytest.mark.parametrize(("weight_bits", "bits"), [(4, 4), (8, 8)])
def test_accumulators_of_a_large_product_fit_shared_memory(weight_bits: int, bits: int) -> None:
    """The check reads them through float32 results, wider than what tiles are found for."""
    spec = LinearSpec("test", "sums", 1024, 1024, 0, weight_bits, bits)
    _, (_, packed, _, _) = kernel_cases.layer_shapes(spec, 256)
    ones = jnp.ones(256, jnp.float32)
    split = reference.Split(jnp.zeros((256, 1024), jnp.int8), jnp.zeros((256, 0), jnp.bfloat16), ones, ones)

    def sums(split: Any, packed: Any) -> Any:
        return api.quik_matmul(split, packed, None, bits, jnp.float32, backend="mosaic", device=H100)

    assert absent_gpu.compile_for("h100", sums, split, packed).complaints() == []


@pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))
def test_layers_of_one_shape_are_lowered_once() -> None:
    """Lowering a kernel takes a second: a model of 32 blocks must not do it 32 times."""
    layer, shapes = kernel_cases.layer_shapes(LinearSpec("test", "square", 640, 640, 64), 8)

    def kernels(count: int) -> int:
        def blocks(inputs: Any, packed: Any, bias: Any, parameters: Any) -> Any:
            for _ in range(count):
                inputs = (layer(inputs, packed, bias, parameters),)
            return inputs

        return absent_gpu.lower("h100", blocks, *shapes).as_text().count("custom_call @mosaic_gpu")

    # The first layer reads an argument, which carries a sharding here, and so counts apart.
    assert kernels(6) == kernels(2)


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    return module("tune")


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
    from quikjax.pallas_kernels.quik_matmul import tiles as matmul

    for specs in MODELS.values():
        for spec in specs:
            base = layout.round_up(spec.base, layout.WEIGHT_TILE)
            for rows in ROWS:
                splits = tune.split_candidates(rows, spec.inputs, spec.outliers, spec.producer)
                assert bool(splits) == kernel_cases.has_split_kernel(spec, rows), (spec, rows)
                assert tune.matmul_candidates(rows, base, spec.weight_bits, spec.bits), (spec, rows)
                tiles, measured = tuned.matmul_tiles(
                    rows, layout.round_up(spec.outputs, 128), base, spec.weight_bits, spec.bits, H100
                )
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


def test_tuner_keeps_the_fastest_and_names_what_failed(
    tune: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"split_quantize": {"old": {"rows": 1}}, "quik_matmul": {"k": {"n": 64}}}))
    table = tune.Table(path, {"device": "GPU"})
    for ms, stages in ((2.0, 3), (1.0, 4), (3.0, 5)):
        table.take({"operation": "quik_matmul", "key": "k", "tiles": {"stages": stages}, "milliseconds": ms})
    table.take({"name": "a layer", "failed": "no answer in 90 s: it hangs"})
    assert json.loads(path.read_text()) == {
        "device": "GPU",
        "split_quantize": {"old": {"rows": 1}},
        "quik_matmul": {"k": {"stages": 4}},
    }
    assert "a layer: no answer" in capsys.readouterr().err


def test_targets_are_tuned_first_and_nothing_twice(tune: ModuleType) -> None:
    jobs = tune._jobs(["targets", *MODELS], ROWS)
    names = [tune.keys(spec, rows) for spec, rows in jobs.values()]
    assert len(set(names)) == len(names)
    assert next(iter(jobs)).startswith("targets.8192x8192 W4A4 1 rows")
