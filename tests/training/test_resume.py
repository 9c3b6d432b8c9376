"""A recovery killed at any moment goes on to the same bytes."""

import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from tiny_recovery import quantize, recover_resumably, write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from tiny_artifacts import read_directory

# Started once with everything imported; each process to kill is then a fork of it, in milliseconds.
SERVER = multiprocessing.get_context("forkserver")


def _child(directory: Path, ready: Event) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    recover_resumably(directory, ready.set)


def run_and_kill(directory: Path, seconds: float) -> float | None:
    """Recover in a process and kill it `seconds` after it began. How long it ran, if it ended by itself."""
    ready = SERVER.Event()
    process = SERVER.Process(target=_child, args=(directory, ready))
    process.start()
    assert ready.wait(120)
    began = time.monotonic()
    process.join(seconds)
    took = time.monotonic() - began
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    ended = process.exitcode == 0
    process.close()
    return took if ended else None


def check_kills(place: Path, kills: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    SERVER.set_forkserver_preload(["tiny_recovery"])
    quantize(write_model(place / "model"), place / "artifact")
    assert run_and_kill(place, 300) is not None
    expected = read_directory(place / "out")
    shutil.rmtree(place / "out")
    longest = run_and_kill(place, 300)  # what was compiled is there now
    assert longest is not None
    assert read_directory(place / "out") == expected
    dice, killed = random.Random(seed), 0
    while killed < kills:
        shutil.rmtree(place / "out", ignore_errors=True)
        while run_and_kill(place, dice.uniform(0, longest)) is None:
            killed += 1
            if (place / "out").exists():  # killed after it had its name
                break
        assert read_directory(place / "out") == expected


@pytest.mark.slow
def test_a_killed_recovery_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kills(tmp_path, 3, 0, monkeypatch)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when it fails
    check_kills(tmp_path, 50, seed, monkeypatch)
