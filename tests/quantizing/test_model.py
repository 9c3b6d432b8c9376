"""Whole models through calibration and quantization, in memory and to disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax import checkpoint
from quikjax.errors import QuikError
from quikjax.evaluation import evaluate, reference
from quikjax.models.base import CausalLM
from quikjax.models.registry import dotted, pure_params
from quikjax.quantizing import model as pipeline
from quikjax.quantizing.checkpoint import NoProgress, quantize_checkpoint
from quikjax.quantizing.model import calibrate, quantize_model
from quikjax.quantizing.params import LayerResult, quantize_params
from quikjax.quantizing.recipe import RECIPES, Recipe
from quikjax.testing import tiny_config, tiny_model, write_tiny_checkpoint
from quikjax.texts import calibration_text, calibration_windows, tokenize
from quikjax.weights.quik import QuikWeight

BATCHES = [np.random.default_rng(i).integers(0, 256, (1, 64)).astype(np.int32) for i in range(6)]


def run(model: CausalLM, params: Any, ids: np.ndarray) -> jax.Array:
    return jax.jit(lambda params, ids: nnx.merge(nnx.split(model)[0], params)(ids))(params, ids)


@partial(jax.jit, static_argnums=0)
def run_block(blockdef: Any, params: Any, hidden: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a block gives, and what each group of its layers reads."""
    reads: dict[str, jax.Array] = {}
    positions = pipeline.Positions(jnp.arange(hidden.shape[1], dtype=jnp.int32)[None])
    return nnx.merge(blockdef, params)(hidden, positions, observe=lambda group, x: reads.setdefault(group, x))[0], reads


def inputs_of_layers(model: CausalLM, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What every layer reads, by running the blocks one after the other."""
    seen: dict[str, np.ndarray] = {}
    hidden = model.embed(jnp.asarray(ids), jnp.arange(ids.shape[1], dtype=jnp.int32)[None])
    for name, block in model.blocks.items():
        hidden, reads = run_block(*nnx.split(block), hidden)
        for group, layers in block.groups.items():
            seen |= {f"model.layers.{name}.{layer}.weight": np.asarray(reads[group]) for layer in layers}
    return seen


def test_calibrate_sees_what_the_layers_read() -> None:
    model = tiny_model()
    graphdef = nnx.split(model)[0]
    stats = calibrate(graphdef, pure_params(model), BATCHES[:2])
    wanted = [path for path in dotted(pure_params(model)) if RECIPES["quik-4b"].rule_for(path)]
    assert sorted(stats) == sorted(wanted)
    seen = [inputs_of_layers(model, ids) for ids in BATCHES[:2]]
    for path, layer in stats.items():
        x = np.concatenate([one[path][0] for one in seen]).astype(np.float64)
        np.testing.assert_allclose(layer.absmax, np.abs(x).max(axis=0), rtol=1e-4)
        scale = np.abs(x.T @ x).max()
        np.testing.assert_allclose(layer.hessian, x.T @ x, rtol=1e-3, atol=1e-5 * scale)
    first = "model.layers.1.self_attn."
    assert stats[first + "q_proj.weight"] is stats[first + "v_proj.weight"]


def test_the_first_blocks_statistics_are_the_same_one_shot_and_sequential() -> None:
    """Sequential differs from one-shot only in what quantized weights before a layer changed: q, k, v of block 0 have none."""
    model = tiny_model()
    stats = calibrate(nnx.split(model)[0], pure_params(model), BATCHES)
    one_shot = dotted(quantize_params(pure_params(model), "quik-4b", stats, hidden_size=64))
    sequential = dotted(quantize_model(model, "quik-4b", BATCHES))
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(one_shot[name].columns, sequential[name].columns)
    assert np.mean(np.asarray(one_shot[name].qweight) != np.asarray(sequential[name].qweight)) < 1e-3
    later = "model.layers.2.mlp.down_proj.weight"
    assert (np.asarray(one_shot[later].qweight) != np.asarray(sequential[later].qweight)).any()


def test_sequential_quantization_reports_and_gives_the_same_bits_twice() -> None:
    model = tiny_model()
    reports: list[LayerResult] = []
    first = quantize_model(model, "quik-4b", BATCHES, on_layer=reports.append)
    second = quantize_model(model, "quik-4b", BATCHES)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [layer.path for layer in reports[:3]] == [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    assert len(reports) == 7 * 3
    down = reports[6]
    assert (down.path.endswith("down_proj.weight"), down.weight_bits, down.outliers) == (True, 8, 7)
    for path, leaf in dotted(first).items():
        if isinstance(leaf, QuikWeight):
            leaf.validate(path)


def test_keeping_nothing_between_passes_changes_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=1)
    kept = dotted(quantize_model(model, "quik-4b", BATCHES[:2]))
    monkeypatch.setattr(pipeline, "KEPT_BYTES", 0)
    recomputed = dotted(quantize_model(model, "quik-4b", BATCHES[:2]))
    for path, leaf in kept.items():
        if isinstance(leaf, QuikWeight):
            other = recomputed[path]
            assert np.mean(np.asarray(leaf.qweight) != np.asarray(other.qweight)) < 0.01, path
            np.testing.assert_allclose(leaf.scale, other.scale, rtol=1e-5)


@pytest.mark.long
def test_what_the_paper_claims_on_a_model_with_outliers() -> None:
    """4-bit activations without outliers destroy the logits; with 1/16 of the columns they come back; 8 bits are close."""
    model = tiny_model()
    ids = np.random.default_rng(9).integers(0, 256, (4, 48)).astype(np.int32)
    other = reference(model, ids)
    graphdef = nnx.split(model)[0]
    kl = {}
    for name in ("rtn-w4a4", "quik-4b", "quik-8b"):
        packed = nnx.merge(graphdef, quantize_model(model, name, BATCHES))
        kl[name] = evaluate(packed, ids, other).kl or 0.0
    assert kl["quik-8b"] < 0.2 * kl["quik-4b"]
    assert kl["quik-4b"] < 0.2 * kl["rtn-w4a4"]


def test_blocks_run_in_numerical_order() -> None:
    """Block 10 comes after block 9, not after block 1."""
    model = tiny_model(num_hidden_layers=12)
    assert list(model.blocks) == [str(i) for i in range(12)]
    reports: list[LayerResult] = []
    quantize_model(model, "rtn-w4a4", [], on_layer=reports.append)
    assert [layer.path.split(".")[2] for layer in reports[::7]] == [str(i) for i in range(12)]


def test_mistakes_in_calibration() -> None:
    model = tiny_model()
    with pytest.raises(QuikError, match="nothing to calibrate on"):
        quantize_model(model, "quik-4b", [])
    with pytest.raises(QuikError, match="300 tokens in a row, which exceeds the model's context of 256"):
        quantize_model(model, "quik-4b", [np.zeros((1, 300), np.int32)])
    with pytest.raises(QuikError, match="did you mean"):
        quantize_model(model, "quik-4", BATCHES)


# To disk.


def windows(tokenizer: Any, samples: int = 4, length: int = 32) -> np.ndarray:
    return calibration_windows(tokenize(tokenizer, calibration_text("pydoc").content[:20_000]), samples, length)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the log, in which times are."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file != directory / "log.jsonl"]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def test_a_converted_checkpoint_restores_and_is_the_same_twice(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows)
    second = quantize_checkpoint(tiny_checkpoint, tmp_path / "b", "quik-4b", windows)
    assert first.fingerprint == second.fingerprint
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    model, tokenizer = checkpoint.restore(tmp_path / "a")
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    leaf = dotted(pure_params(model))["model.layers.2.mlp.down_proj.weight"]
    assert (leaf.weight_bits, leaf.activation_bits) == (8, 8)
    rows = [json.loads(line) for line in (tmp_path / "a" / "report.jsonl").read_text().splitlines()]
    assert len(rows) == 21
    assert rows == first.layers


def test_converting_is_quantizing_in_memory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from quikjax.checkpoint.load import load

    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows)
    model, tokenizer = load(tiny_checkpoint)
    expected = dotted(quantize_model(model, "quik-4b", [row[None] for row in windows(tokenizer)]))
    found = dotted(pure_params(checkpoint.restore(tmp_path / "a")[0]))
    assert list(found) == list(expected) or sorted(found) == sorted(expected)
    for path, leaf in expected.items():
        jax.tree.map(np.testing.assert_array_equal, found[path], leaf)


def test_mistakes_are_found_before_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    with pytest.raises(QuikError, match=r"exists and is not an artifact of quikjax .it holds mine"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "taken", "quik-4b", windows)
    strange = Recipe(name="x", rules=(RECIPES["quik-4b"].rules[0].model_copy(update={"match": "nothing"}),))
    with pytest.raises(QuikError, match="matches no layer"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", strange, windows)
    with pytest.raises(QuikError, match="needs calibration text"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b")
    with pytest.raises(QuikError, match="exceeds the model's context of 256"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", lambda t: windows(t, 2, 257))
    with pytest.raises(QuikError, match="lower --samples"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", lambda t: windows(t, 4000, 200))
    for outliers in (64, 65, 1.0):
        with pytest.raises(QuikError, match=r"wants \d+ outlier columns of .*, which has \d+, so that none is left"):
            quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPES["quik-4b"].with_outliers(outliers), windows)
    assert not (tmp_path / "a").exists()


def test_a_run_with_other_inputs_does_not_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class AfterOne(NoProgress):
        def start(self, blocks: int, finished: int) -> None:
            self.finished = finished

        def layer(self, report: LayerResult, seconds: float) -> None: ...

        def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
            if done == 1:
                raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, progress=AfterOne())
    with pytest.raises(QuikError, match="other inputs"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-8b", windows)
    done = quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows)
    assert done.fingerprint == quantize_checkpoint(tiny_checkpoint, tmp_path / "b", "quik-4b", windows, restart=True).fingerprint
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def killed_until_done(checkpoint_path: Path, out: Path, seed: int, kills: int) -> int:
    """Run the command, killing it at random moments; the last run is left alone. How many were really killed."""
    command = [
        *(sys.executable, "-m", "quikjax.cli", "quantize", str(checkpoint_path), "--out", str(out)),
        *("--samples", "4", "--seqlen", "32"),
    ]
    rng, killed = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Start-up takes a part of it; work on a tiny model the rest.
        time.sleep(rng.uniform(2, 14))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        if out.exists():
            return killed
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return killed


@pytest.mark.slow
def test_fifty_kills_fifty_correct_endings(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "model", num_hidden_layers=6)
    command = [sys.executable, "-m", "quikjax.cli", "quantize", str(source), "--out", str(tmp_path / "whole")]
    subprocess.run([*command, "--samples", "4", "--seqlen", "32"], check=True, capture_output=True)
    expected, kills, run_number = contents(tmp_path / "whole"), 0, 0
    while kills < 50:
        out = tmp_path / f"killed-{run_number}"
        kills += killed_until_done(source, out, run_number, 3)
        assert contents(out) == expected
        run_number += 1


@pytest.mark.long
def test_a_killed_run_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL once a block is on disk: the same command ends in the bytes of an undisturbed run."""
    expected = quantize_checkpoint(tiny_checkpoint, tmp_path / "whole", "quik-4b", windows)
    script = f"""
import os, signal
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.texts import calibration_text, calibration_windows, tokenize
class Kill:
    def start(self, blocks, finished): pass
    def layer(self, report, seconds): pass
    def block(self, name, done, total, seconds_left):
        if done == 2: os.kill(os.getpid(), signal.SIGKILL)
windows = lambda t: calibration_windows(tokenize(t, calibration_text("pydoc").content[:20_000]), 4, 32)
quantize_checkpoint({str(tiny_checkpoint)!r}, {str(tmp_path / "a")!r}, "quik-4b", windows, progress=Kill())
"""
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "a").exists()
    reports: list[str] = []

    class Note(NoProgress):
        def start(self, blocks: int, finished: int) -> None:
            assert (blocks, finished) == (3, 2)

        def layer(self, report: LayerResult, seconds: float) -> None:
            reports.append(report.path)

        def block(self, name: str, done: int, total: int, seconds_left: float) -> None: ...

    resumed = quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, progress=Note())
    assert {path.split(".")[2] for path in reports} == {"2"}
    assert resumed.fingerprint == expected.fingerprint
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_tiny_config_is_one_that_loads() -> None:
    assert tiny_model().config.hidden_size == tiny_config()["hidden_size"]
