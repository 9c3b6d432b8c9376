"""Published checkpoints of any format, opened lazily and turned into models.

Names are imported when they are first used: to find a model, or that there is none, takes no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quikjax.loading.formats import open_source
    from quikjax.loading.locate import DEMO_MODELS, Found, resolve
    from quikjax.loading.params import load_params, match, verify
    from quikjax.loading.published import load_published
    from quikjax.loading.source import Source, TensorInfo

_HOME = {
    "DEMO_MODELS": "locate",
    "Found": "locate",
    "Source": "source",
    "TensorInfo": "source",
    "load_params": "params",
    "load_published": "published",
    "match": "params",
    "open_source": "formats",
    "resolve": "locate",
    "verify": "params",
}

__all__ = [
    "DEMO_MODELS",
    "Found",
    "Source",
    "TensorInfo",
    "load_params",
    "load_published",
    "match",
    "open_source",
    "resolve",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
