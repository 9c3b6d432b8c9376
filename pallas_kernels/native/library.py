"""`products.cc`, compiled for this machine's CPU and known to XLA.

A package cannot bring instructions for every CPU, but most machines have a compiler: the first process that wants these products
compiles them (about five seconds) and leaves the library in a folder, where later ones find it. Where anything is missing there
is a reason, and XLA's own products run.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax

SOURCE = Path(__file__).with_name("products.cc")
TARGETS = ("quikjax_float_products", "quikjax_quik_products")
# Enough, and half as long in compiling as more: a product waits for memory.
FLAGS: Sequence[str] = ("-O2", "-march=native", "-std=c++17", "-fPIC", "-shared", "-w")
_SECONDS = 300


class Unavailable(Exception):
    """The products cannot be compiled or loaded here; its text is the reason, for a person to read."""


_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None


@functools.cache
def why_not(folder: Path) -> str | None:
    """`None` once the products are compiled, loaded and known to XLA in this process; else the reason why they cannot be.

    `folder` is where compiled libraries are kept; it is made if need be. Asked again, this answers from memory.
    """
    global _loaded
    with _lock:
        if _loaded is not None:
            return None
        try:
            library = load(build(folder))
        except Unavailable as reason:
            return str(reason)
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
        _loaded = library
        return None


def loaded() -> ctypes.CDLL:
    """The library in this process. `why_not` has said that it is there.

    Raises:
        Unavailable: nobody has asked, or the answer was a reason.
    """
    if _loaded is None:
        raise Unavailable("the compiled products were not loaded")
    return _loaded


def build(folder: Path, compiler: str | None = None, flags: Sequence[str] | None = None) -> Path:
    """The library for this machine in `folder`, compiled unless it is there already.

    Its name has a hash of all that it depends on: the source, the flags, JAX's headers, the compiler and the CPU.

    Raises:
        Unavailable: no compiler, one that fails, or a folder that cannot be written.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name == "nt":
        raise Unavailable(
            f"they are written for x86-64 under Linux and macOS, and this is {platform.machine()} {platform.system()}"
        )
    compiler = compiler or os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("there is no C++ compiler (c++, g++ or clang++, or what CXX names)")
    flags = FLAGS if flags is None else flags
    headers = Path(jax.ffi.include_dir())
    try:
        source = SOURCE.read_text(encoding="utf-8")
    except OSError as error:
        raise Unavailable(f"{SOURCE} could not be read: {error.strerror or error}") from None
    depends = (source, *flags, jax.__version__, str(headers), compiler, _cpu())
    name = f"products-{hashlib.sha256(chr(0).join(depends).encode()).hexdigest()[:16]}.so"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("compiling-*"):  # by processes that were killed
            if time.time() - left.stat().st_mtime > 2 * _SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder) as work:
            made = Path(work) / name
            command = [compiler, *flags, "-isystem", str(headers), str(SOURCE), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
            if run.returncode != 0 or not made.exists():
                said = [line.strip() for line in run.stderr.splitlines() if "error" in line] or run.stderr.split("\n")[-2:-1]
                raise Unavailable(f"{compiler} could not compile them: {said[0] if said else 'it said nothing'}")
            # Whole or not at all, whoever else is compiling the same one.
            os.replace(made, folder / name)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{compiler} did not finish compiling them in {_SECONDS} seconds") from None
    except OSError as error:
        raise Unavailable(f"they could not be compiled in {folder} with {compiler}: {error.strerror or error}") from None
    return folder / name


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`, its functions declared.

    One that cannot be loaded stays: where the folder allows no programs, every process would compile it anew for nothing.

    Raises:
        Unavailable: it is damaged, or the folder allows no programs to run.
    """
    try:
        library = ctypes.CDLL(str(path))
        for target in TARGETS:
            getattr(library, target)
        whole = ctypes.c_int64
        library.quikjax_pack_floats.argtypes = [ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole]
        library.quikjax_pack_codes.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole, whole]
        library.quikjax_pack_floats.restype = library.quikjax_pack_codes.restype = None
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{path} could not be loaded ({error}); delete it to have it compiled anew") from None
    return library


def _cpu() -> str:
    """The machine and the instructions that Linux says it has: all that `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return " ".join([platform.machine(), platform.processor(), *[line for line in lines if line.startswith("flags")][:1]])
