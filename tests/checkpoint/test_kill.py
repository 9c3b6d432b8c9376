"""A writer killed at any moment leaves the old artifact or the new one, whole, and a resumed one ends with the same bytes."""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from killed_writer import PARTS, save_two_by_turns, write_resumably
from tiny_artifacts import SMALL, build, random_params, read_directory

from quikjax import checkpoint

Work = Callable[[Path, Callable[[], None]], None]

# Started once with everything imported; each process to kill is then a fork of it, in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["killed_writer"])


@pytest.fixture(autouse=True)
def path_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.12.4 the server does not get our `sys.path`, and would silently preload nothing."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def _child(work: Work, path: Path, ready: Event) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    work(path, ready.set)


def run_and_kill(work: Work, path: Path, seconds: float) -> float | None:
    """Run `work` in a process and kill it `seconds` after it started writing. How long it ran, if it ended by itself."""
    ready = SERVER.Event()
    process = SERVER.Process(target=_child, args=(work, path, ready))
    process.start()
    assert ready.wait(120)
    began = time.monotonic()
    process.join(seconds)
    took = time.monotonic() - began
    process.kill()
    process.join()
    # It may have ended by itself between the wait and the kill: only its exit code knows.
    assert process.exitcode in (0, -9)
    ended = process.exitcode == 0
    process.close()
    return took if ended else None


def check_kills(place: Path, kills: int, seed: int) -> None:
    fingerprints = {
        checkpoint.save(place / "expected", build(random_params(seed, config=SMALL), SMALL), force=True) for seed in (0, 1)
    }
    dice, seen = random.Random(seed), set()
    for kill in range(kills):
        path = place / ("fresh" if kill % 3 == 0 else "replaced")
        if kill % 3 == 0 and path.exists():
            os.rename(path, place / f"moved-{kill}")
        run_and_kill(save_two_by_turns, path, dice.uniform(0, 1.0))
        if path.exists():
            checkpoint.restore(path)
            seen.add(checkpoint.read_manifest(path).fingerprint)
        assert seen <= fingerprints
    assert seen, "no process lived long enough to save anything"
    for path in (place / "fresh", place / "replaced"):  # whatever was left does not stand in the way
        checkpoint.save(path, build(random_params(0, config=SMALL), SMALL), force=True)
        assert not path.with_name(path.name + ".partial").exists()


def check_resumes(place: Path, kills: int, seed: int) -> None:
    longest = run_and_kill(write_resumably, place / "uninterrupted", 120)
    assert longest is not None
    expected = read_directory(place / "uninterrupted")
    dice, killed, runs = random.Random(seed), 0, 0
    while killed < kills:
        path = place / f"run-{runs}"
        runs += 1
        while run_and_kill(write_resumably, path, dice.uniform(0, longest)) is None:
            killed += 1
            if path.exists():  # killed after it had its name
                break
            finished = [name for name in PARTS if (place / f"run-{runs - 1}.partial/arrays/{name}.json").exists()]
            assert finished == PARTS[: len(finished)]
        assert read_directory(path) == expected
        assert not path.with_name(path.name + ".partial").exists()


@pytest.mark.long
def test_a_killed_save_leaves_a_whole_artifact_or_none(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=12, seed=0)


@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    check_resumes(tmp_path, kills=6, seed=0)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when it fails
    check_kills(tmp_path / "save", kills=50, seed=seed)
    check_resumes(tmp_path / "resume", kills=50, seed=seed)
