"""Activations on disk: what is kept is whole, and where it is changes no byte of an artifact."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.quantizing.activation_store import ActivationStore, OnDisk, read
from quikjax.quantizing.checkpoint import NoProgress, quantize_checkpoint
from quikjax.quantizing.params import LayerResult

# Of 4 sequences of 32 tokens: 221 kB of activations in all, 55 of one sequence.
MUCH, LITTLE = 1_000_000, 100_000


def windows(_tokenizer: Any) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (4, 32)).astype(np.int32)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the log, in which times are."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file != directory / "log.jsonl"]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


class Stop(Exception):
    """A run ends here."""


class Watch(NoProgress):
    """See which files of activations there are when a layer is done, and stop after some layers."""

    def __init__(self, work: Path, layers: int = 1000) -> None:
        self.activations, self.layers, self.seen = work / "activations", layers, set[str]()

    def start(self, blocks: int, finished: int) -> None:
        self.finished = finished

    def layer(self, report: LayerResult, seconds: float) -> None:
        self.seen |= {str(file.relative_to(self.activations)) for file in self.activations.rglob("*.npy")}
        self.layers -= 1
        if not self.layers:
            raise Stop

    def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
        assert [entry.name for entry in self.activations.iterdir()] == [name]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact made in memory."""
    out = tmp_path_factory.mktemp("undisturbed") / "a"
    watch = Watch(out.with_name("a.work"))
    quantize_checkpoint(tiny_checkpoint, out, "quik-4b", windows, activation_bytes=MUCH, progress=watch)
    assert not any(path.startswith("inputs/") for path in watch.seen)
    return out


@pytest.mark.long
def test_an_artifact_made_from_disk_has_the_same_bytes(tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    watch = Watch(tmp_path / "a.work")
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, activation_bytes=LITTLE, progress=watch)
    assert {"embedded/3.npy", "model.layers.1/0.npy", "inputs/mlp_output.3.npy"} <= watch.seen
    assert contents(tmp_path / "a") == contents(undisturbed)
    assert not (tmp_path / "a.work").exists()


@pytest.mark.parametrize(
    ("before", "after", "layers"), [(MUCH, LITTLE, 4), (LITTLE, LITTLE, 4), (LITTLE, MUCH, 10), (LITTLE, LITTLE, 10)]
)
def test_a_run_goes_on_with_another_budget(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, before: int, after: int, layers: int
) -> None:
    """Stopped in the middle of the first block and of the second, of 7 layers each."""
    watch = Watch(tmp_path / "a.work", layers)
    with pytest.raises(Stop):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, activation_bytes=before, progress=watch)
    watch = Watch(tmp_path / "a.work")
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, activation_bytes=after, progress=watch)
    assert watch.finished == layers // 7
    assert contents(tmp_path / "a") == contents(undisturbed)


@pytest.mark.long
def test_a_run_killed_while_its_activations_are_on_disk_goes_on(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before the second block's activations are whole; then an end when they are, but the block is not written."""
    script = f"""
import os, signal
import numpy as np
from quikjax.quantizing import activation_store as activations
from quikjax.quantizing.checkpoint import quantize_checkpoint
def kill(*_arguments): os.kill(os.getpid(), signal.SIGKILL)
class Progress:
    def start(self, blocks, finished): pass
    def layer(self, report, seconds): pass
    def block(self, name, done, total, seconds_left): activations.json.dump = kill
windows = lambda _tokenizer: np.random.default_rng(3).integers(0, 256, (4, 32)).astype(np.int32)
out = {str(tmp_path / "a")!r}
quantize_checkpoint({str(tiny_checkpoint)!r}, out, "quik-4b", windows, activation_bytes={LITTLE}, progress=Progress())
"""
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ}, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = tmp_path / "a.work" / "activations"
    assert sorted(entry.name for entry in kept.iterdir()) == ["inputs", "model.layers.0", "model.layers.1"]
    assert not (kept / "model.layers.1" / "sums.json").read_text()

    def stop(*_arguments: Any) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("quikjax.quantizing.checkpoint._write_rows", stop)
        with pytest.raises(Stop):
            quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, activation_bytes=LITTLE)
    assert (kept / "model.layers.0" / "sums.json").read_text()
    assert (kept / "model.layers.1" / "sums.json").read_text()
    watch = Watch(tmp_path / "a.work")
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, activation_bytes=LITTLE, progress=watch)
    assert watch.finished == 1
    assert contents(tmp_path / "a") == contents(undisturbed)


@pytest.mark.long
def test_a_bfloat16_run_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """NumPy's files do not know bfloat16."""
    quantize_checkpoint(tiny_checkpoint, tmp_path / "b", "quik-4b", windows, dtype=jnp.bfloat16, activation_bytes=MUCH)
    watch = Watch(tmp_path / "a.work", 10)
    with pytest.raises(Stop):
        quantize_checkpoint(
            tiny_checkpoint, tmp_path / "a", "quik-4b", windows, dtype=jnp.bfloat16, activation_bytes=60_000, progress=watch
        )
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, dtype=jnp.bfloat16, activation_bytes=MUCH)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_budget_below_one_sequence(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """32 tokens in float32, of which 64 numbers enter a block and 64 leave it, and groups read 64, 64, 64 and 112."""
    with pytest.raises(QuikError, match=r"take 0.0553 MB at once .* give --activation-memory 0.001 \(GB\) or more"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "quik-4b", windows, activation_bytes=55_295)
    assert not list(tmp_path.iterdir())
    # Without data there are none.
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", "rtn-w4a4", activation_bytes=1)


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_activations_are_kept_whole_or_not_at_all(tmp_path: Path, spill: bool, dtype: Any) -> None:
    store = ActivationStore(tmp_path / "x", spill=spill)
    batches = [np.arange(6).reshape(1, 2, 3).astype(dtype), np.ones((1, 2, 3), dtype)]
    given = store.put("a", iter(batches))
    store.put("b", (batch + batch for batch in batches))
    for found in (given, store.get("a")):
        assert [isinstance(batch, OnDisk) for batch in found] == [spill, spill]
        for batch, expected in zip(found, batches, strict=True):
            assert read(batch).dtype == dtype
            np.testing.assert_array_equal(read(batch), expected)
    np.testing.assert_array_equal(read(store.keep("q", 0, batches[0])), batches[0])
    store.commit("b")
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["b"]
    with pytest.raises(QuikError, match="begin again with --restart"):
        store.get("a")
    file = tmp_path / "x" / "b" / "0.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(QuikError, match="have changed"):
        store.get("b")
    file.write_bytes(damaged[:-5])
    with pytest.raises(QuikError, match="cannot be read"):
        store.get("b")


def test_a_full_disk_is_told_and_the_step_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore(tmp_path / "x", spill=True)

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError("12345 requested and 100 written")  # as NumPy tells it

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(QuikError, match="12345 requested and 100 written; make room and run the same command again"):
            store.put("a", [np.ones((1, 2, 3))])
    with pytest.raises(QuikError, match="cannot be read"):
        store.get("a")
    store.put("a", [np.ones((1, 2, 3))])
    assert len(store.get("a")) == 1
