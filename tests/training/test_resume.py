"""A recovery, or a training, killed at any moment goes on to the same bytes."""

import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_classifier
import tiny_recovery

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from tiny_artifacts import read_directory

# Started once with everything imported; each process to kill is then a fork of it, in milliseconds.
SERVER = multiprocessing.get_context("forkserver")


class Job(NamedTuple):
    """What is killed: it works in a directory that was prepared, and tells when it begins."""

    prepare: Callable[[Path], None]
    run: Callable[[Path, Callable[[], None]], Any]


RECOVERY = Job(tiny_recovery.prepare, tiny_recovery.recover_resumably)
TRAINING = Job(tiny_classifier.prepare, tiny_classifier.train_resumably)


def _child(job: Job, directory: Path, ready: Event) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    job.run(directory, ready.set)


def run_and_kill(job: Job, directory: Path, seconds: float) -> float | None:
    """Do the job in a process and kill it `seconds` after it began. How long it ran, if it ended by itself."""
    ready = SERVER.Event()
    process = SERVER.Process(target=_child, args=(job, directory, ready))
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


def check_kills(job: Job, place: Path, kills: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    SERVER.set_forkserver_preload(["tiny_recovery", "tiny_classifier"])
    job.prepare(place)
    assert run_and_kill(job, place, 300) is not None
    expected = read_directory(place / "out")
    shutil.rmtree(place / "out")
    longest = run_and_kill(job, place, 300)  # what was compiled is there now
    assert longest is not None
    assert read_directory(place / "out") == expected
    dice, killed = random.Random(seed), 0
    while killed < kills:
        shutil.rmtree(place / "out", ignore_errors=True)
        while run_and_kill(job, place, dice.uniform(0, longest)) is None:
            killed += 1
            if (place / "out").exists():  # killed after it had its name
                break
        assert read_directory(place / "out") == expected


JOBS = pytest.mark.parametrize("job", [RECOVERY, TRAINING], ids=["recovery", "training"])


@pytest.mark.slow
@JOBS
def test_a_killed_job_goes_on_to_the_same_bytes(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kills(job, tmp_path, 3, 0, monkeypatch)


@pytest.mark.slow
@JOBS
def test_fifty_kills(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when it fails
    check_kills(job, tmp_path, 50, seed, monkeypatch)
