"""The floating dtypes that a model may be held and computed in, and those of its KV cache. Without JAX."""

from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np

from quikjax.errors import QuikError, did_you_mean
from quikjax.files import described

CACHE_KINDS = ("float32", "bfloat16", "float16", "int8")
_DTYPES = ("float32", "bfloat16", "float16")
# What other libraries call them.
_OTHER_NAMES = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}


def floating_dtype(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype that parameters are held and computed in, from its name or from a dtype.

    Raises:
        QuikError: it is none of "float32", "bfloat16" and "float16"; the nearest name is offered.
    """
    name = dtype
    if not isinstance(dtype, str):
        try:
            if dtype is None:  # NumPy's name for float64
                raise TypeError
            name = np.dtype(dtype).name
        except TypeError:
            raise QuikError(f"a dtype to compute in is expected ({', '.join(_DTYPES)}), not {described(dtype)}") from None
    if name not in _DTYPES:
        meant = _OTHER_NAMES.get(name.lower())
        hint = f'did you mean "{meant}"? (known: {", ".join(_DTYPES)})' if meant else did_you_mean(name, _DTYPES)
        raise QuikError(f'there is no dtype "{name}" to compute in; {hint}')
    return np.dtype(name)


def check_cache_kind(kind: str) -> None:
    """Raise `QuikError` unless `kind` is one of `CACHE_KINDS`."""
    if kind not in CACHE_KINDS:
        raise QuikError(f'there is no KV cache of kind "{kind}"; {did_you_mean(kind, CACHE_KINDS)}')
