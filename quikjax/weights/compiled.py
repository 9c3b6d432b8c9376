"""Products compiled for this machine's CPU, kept in the folder of compiled programs."""

import os
import threading

from quikjax.executables import cache_directory, machine
from quikjax.pallas_kernels.native import library

VARIABLE = "QUIKJAX_NATIVE"


def why_no_compiled_products() -> str | None:
    """`None` where a CPU's products are compiled by its own compiler, which this sees to; else the reason why they are XLA's.

    The first process on a machine waits some seconds for the compiler. The environment's `QUIKJAX_NATIVE=0` asks for XLA's.
    """
    if os.environ.get(VARIABLE, "").strip().lower() in ("0", "off", "no", "false"):
        return f"{VARIABLE} asks for XLA's"
    return library.why_not(cache_directory() / f"native-{machine()}")


def compile_products_meanwhile() -> None:
    """Begin what `why_no_compiled_products` waits for, on another thread, where JAX runs on a CPU: while a model is read."""
    import jax

    if jax.default_backend() == "cpu":
        threading.Thread(target=why_no_compiled_products, daemon=True).start()
