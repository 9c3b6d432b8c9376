"""The optional imports of the Triton kernels, so that their modules import without them.

`choice.why_not_triton` refuses before any of the stand-ins could be used.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

jax_triton: Any = None
triton: Any = None
tl: Any = None
libdevice: Any = None
constexpr: Any = int


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


jit: Callable[..., Any] = _unchanged

# Apart: Triton alone is enough for its interpreter, which tests run.
with contextlib.suppress(ImportError):
    jax_triton = importlib.import_module("jax_triton")
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    libdevice = importlib.import_module("triton.language.extra.libdevice")
    jit, constexpr = triton.jit, tl.constexpr
except ImportError:
    pass
