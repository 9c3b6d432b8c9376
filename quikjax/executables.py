"""Compiled programs kept across runs, in a folder of their own.

JAX keys an entry by the program, the compiler's version and options, and the device. The instructions that a CPU's code needs
are not in that key, so each kind of machine has its own folder below the one that is named.
"""

import hashlib
import os
import platform
from pathlib import Path

from quikjax.errors import QuikError
from quikjax.files import user_path

VARIABLE = "QUIKJAX_CACHE"

# What `keep_executables` was told last: like JAX's own setting, one for the process.
_named: str | Path | None = None


def cache_directory(named: str | Path | None = None) -> Path:
    """The folder: the one named, here or to `keep_executables`; that of the environment's `QUIKJAX_CACHE`; or `~/.cache/quikjax`
    (`XDG_CACHE_HOME`'s).
    """
    named = named or _named
    if named:
        return user_path(named)
    if os.environ.get(VARIABLE):
        return user_path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quikjax"


def keep_executables(named: str | Path | None = None) -> Path:
    """Have JAX keep what it compiles in the folder for this machine, and take from there what it compiled before.

    Returns the folder. Call it before anything is compiled.

    Raises:
        QuikError: the folder cannot be made or written.
    """
    global _named
    import jax

    before, _named = _named, named
    directory = cache_directory(named) / f"jax-{jax.__version__}-{machine()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _named = before
        raise QuikError(
            f"compiled programs cannot be kept in {directory} ({error.strerror}); "
            f"name another folder with --cache-dir or {VARIABLE}"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Even a small program is worth a file: a start has dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def machine() -> str:
    """A name for the instructions that this machine's CPU has: its architecture and a hash of the flags that Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
