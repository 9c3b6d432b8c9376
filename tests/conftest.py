"""What all tests share: the CPU, quiet libraries, one tiny checkpoint per session."""

import atexit
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

# Before JAX starts: tests run on the CPU also where a GPU, or only its compiler, is installed.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "False"  # see `compilation`

from quikjax.executables import keep_executables

# What XLA compiles is shared by all test processes and the commands that they start, and gone with the last of them. The first
# process to come here makes the folder; the others inherit its name. It is the one in which commands keep their programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["QUIKJAX_CACHE"] = tempfile.mkdtemp(prefix="quikjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(keep_executables())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["QUIKJAX_CACHE"], ignore_errors=True)
os.environ.setdefault("QUIKJAX_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])

# A shell that starts the tests in the background leaves Ctrl-C ignored, in every process below them too; some send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jax
import pytest

from quikjax.cli import main
from quikjax.testing import write_tiny_checkpoint

# The examples of property tests are the same in every run, so that what passed on one machine passes on the next. To look for
# others: `pytest --hypothesis-profile=search --hypothesis-seed=N`.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("fixed")

# A script for a process of its own, with Triton installed (test_triton.py).
collect_ignore = ["kernels/triton_interpreted.py"]

# Folders whose programs are compiled without most optimizations, which would take most of the time for programs that run once:
# how pieces work together. Algorithms, weights, kernels, and files that set `OPTIMIZED` (the models' golden logits) are compiled
# as users do; `pytest --optimized` compiles everything so.
QUICKLY_COMPILED = frozenset(
    (
        "checkpoint",
        "cli",
        "encoding",
        "evaluation",
        "generation",
        "loading",
        "models",
        "quantizing",
        "reports",
        "study",
        "training",
    )
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimized", action="store_true", help="Compile everything as users do; otherwise some tests' programs.")


@pytest.fixture(scope="module", autouse=True)
def compilation(request: pytest.FixtureRequest) -> None:
    """How this file's programs are compiled, those of processes that it starts too."""
    optimized = request.config.getoption("optimized") or getattr(request.module, "OPTIMIZED", False)
    quick = request.path.parent.name in QUICKLY_COMPILED and not optimized
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != str(quick):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick)
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published directory with a tiny random LLaMA and a byte tokenizer."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture(scope="session")
def quikjax_process() -> Run:
    """Run the command line in a process of its own, as a person does: for what only a whole process shows."""

    def run(
        *arguments: str | Path, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "quikjax.cli", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def quikjax_command() -> Run:
    """Run the command line in this process: same entry point, arguments, streams and exit status, but JAX is there already."""

    def run(*arguments: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        typed = ["quikjax", *map(str, arguments)]
        out, said = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        read = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        with contextlib.ExitStack() as stack:
            # A command keeps its compiled programs where the user's are; here they stay among the tests' own.
            for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
                stack.callback(jax.config.update, name, getattr(jax.config, name))
            for name, value in (("argv", typed), ("stdin", read), ("stdout", out), ("stderr", said)):
                stack.enter_context(mock.patch.object(sys, name, value))
            stack.enter_context(mock.patch.object(warnings, "formatwarning", warnings.formatwarning))
            try:
                main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Exception:
                traceback.print_exc()  # as the interpreter does
                status = 1
        for stream in (out, said):
            stream.seek(0)
        return subprocess.CompletedProcess(typed, status, out.read(), said.read())

    return run
