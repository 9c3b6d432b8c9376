"""From an artifact back to a Hugging Face directory, every packed weight dequantized: nobody is locked in."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.checkpoint import Reader
from quikjax.checkpoint.export.directory import FLOATS, SHARD_BYTES, Exported, Form, Progress, Tensor, export_directory, in_order
from quikjax.checkpoint.writer import stored_shapes
from quikjax.errors import QuikError
from quikjax.models.base import Transformer
from quikjax.weights.formats import dequantize, is_packed


def export_safetensors(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write an artifact as the Hugging Face directory `out`, packed weights dequantized (`directory.export_directory`).

    Args:
        dtype: "float32", "float16" or "bfloat16" for every tensor; left out, what the artifact's unquantized weights are in. In
            float32 the directory computes exactly what the dequantized artifact does.

    Raises:
        QuikError: as `export_directory`; or a value is beyond the range of `dtype`.
    """

    def form(reader: Reader, family: type[Transformer]) -> Form:
        floats = checked_dtype(dtype or reader.manifest.dtype)
        tensors = {
            name: {
                family.published_names(path)[0]: Tensor(turned(family, path, shape), floats)
                for path, shape in stored_shapes(part).items()
            }
            for name, part in in_order(reader.parts).items()
        }

        def arrays(params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
            for path, leaf in params.items():
                yield family.published_names(path)[0], dense(family, path, leaf, floats)

        return Form(dtype=floats, tensors=tensors, arrays=arrays)

    return export_directory(artifact, out, form, shard_bytes=shard_bytes, progress=progress)


def checked_dtype(dtype: str) -> str:
    """The name of a dtype that floats can be exported in.

    Raises:
        QuikError: it is none.
    """
    if dtype not in FLOATS:
        raise QuikError(f'weights cannot be exported in "{dtype}"; choose one of {", ".join(FLOATS)}')
    return dtype


def turned(family: type[Transformer], path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that checkpoints of the family hold a parameter in."""
    return shape[::-1] if family.lies_transposed(path) else shape


def dense(family: type[Transformer], path: str, leaf: Any, dtype: str) -> np.ndarray:
    """A parameter as checkpoints of the family hold it, dequantized and in `dtype`.

    Raises:
        QuikError: it has values beyond the range of `dtype`.
    """
    if is_packed(leaf):
        leaf = dequantize(jax.tree.map(jnp.asarray, leaf))
    wide = np.asarray(leaf).T if family.lies_transposed(path) else np.asarray(leaf)
    with np.errstate(over="ignore"):  # reported below, by name
        array = wide.astype(jnp.dtype(dtype))
    if not np.isfinite(array).all() and np.isfinite(wide).all():
        raise QuikError(
            f"{family.published_names(path)[0]} has values beyond the range of {dtype}; export in float32 or bfloat16"
        )
    return array
