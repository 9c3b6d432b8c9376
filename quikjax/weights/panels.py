"""Weights in the panels that a CPU's compiled products read, made once when a model begins to run there.

A dense matrix becomes `DensePanels`, a `QuikWeight` whose activations are quantized a `TiledWeight` of `Paneled` arrays. Both
hold the panels of all blocks that are alike, and say which of them is meant: a scan over blocks gives each its layer
(`of_layer`), and the product reads its panels where they lie.
"""

import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.native import panels
from quikjax.weights import host
from quikjax.weights.quik import QuikWeight
from quikjax.weights.tiled import TiledWeight, packed, place_of

Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePanels:
    """A dense matrix `[N, K]`: `panels` `[L, ceil(N / 16), K, 16]` of L matrices that are alike, number `layer` (int32 `[]`).

    Static: `outputs`, `N`, and `dtype`, the matrix's. Products are computed in float32 whatever the dtype of the panels, which
    widen exactly: those of float32 matrices are bfloat16 where no value needs more, as in most published checkpoints.
    """

    panels: Leaf
    layer: Leaf
    outputs: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def inputs(self) -> int:
        """`K`."""
        return self.panels.shape[-2]

    def rows(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch k"]:
        """Rows of the matrix, in its dtype; the nearest one where there is no such row."""
        ids = jnp.clip(ids, 0, self.outputs - 1)
        return self.panels[self.layer, ids // panels.PANEL, :, ids % panels.PANEL].astype(self.dtype)


def products(x: Float[Array, "*batch k"], weights: Sequence[DensePanels]) -> list[Float32[Array, "*batch _"]]:
    """`x W^T`, float32, for each weight."""
    return panels.float_products(x, [panels.FloatPanels(weight.panels, weight.layer, weight.outputs) for weight in weights])


def is_paneled(leaf: Any) -> TypeGuard[DensePanels | TiledWeight]:
    """Whether a weight is in panels. Fits `is_leaf` of JAX's tree functions."""
    return isinstance(leaf, DensePanels) or (isinstance(leaf, TiledWeight) and isinstance(leaf.tiles, api.Paneled))


def of_layer(tree: Any, layer: Int32[Array, ""]) -> Any:
    """The parameters of one of a run of stacked blocks: weights in panels name it, anything else is cut out."""

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, DensePanels):
            return dataclasses.replace(leaf, layer=layer)
        if isinstance(leaf, TiledWeight) and isinstance(leaf.tiles, api.Paneled):
            tiles = dataclasses.replace(leaf.tiles, columns=leaf.tiles.columns[layer], layer=layer)
            return dataclasses.replace(leaf, tiles=tiles)
        return leaf[layer]

    return jax.tree.map(pick, tree, is_leaf=is_paneled)


def fits_panels(leaf: Any) -> TypeGuard[jax.Array | QuikWeight]:
    """Whether a block's parameter, in a CPU's memory, can be put into panels: a matrix, or codes that meet quantized ones."""
    if isinstance(leaf, QuikWeight):
        return leaf.activation_bits < 16 and host.is_here(leaf.qweight)
    return isinstance(leaf, jax.Array) and leaf.ndim == 2 and leaf.dtype in _DENSE and host.is_here(leaf)


_DENSE = (jnp.float32, jnp.bfloat16, jnp.float16)


def in_panels(members: Sequence[Any], *, stacked: bool, release: bool = False) -> DensePanels | TiledWeight:
    """Weights that are alike, which `fits_panels`, in panels: those of a run of blocks `stacked`, or of one block alone.

    Stacked, `of_layer` says which of them is meant, and chooses its columns. `release`: free each weight's own arrays when they
    are written.
    """
    first, layer = members[0], jnp.int32(0)
    if isinstance(first, QuikWeight):
        n, bits, count = first.outputs, first.weight_bits, panels.panel_count(first.outputs)

        def codes(weight: QuikWeight, memory: np.ndarray) -> None:
            panels.pack_codes(np.asarray(weight.qweight), np.asarray(weight.columns), memory, bits)
            if release:
                weight.qweight.delete()

        def outliers(weight: QuikWeight, memory: np.ndarray) -> None:
            panels.pack_floats(np.asarray(weight.outliers), memory)
            if release:
                weight.outliers.delete()

        arrays = packed(first)
        fields = {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays)}
        columns = [weight.columns for weight in members]
        fields |= {
            "qweight": _written(members, (count, panels.code_steps(first.inputs, bits), 64), np.uint8, codes),
            "outliers": _written(members, (count, first.inputs - first.base, panels.PANEL), first.outliers.dtype, outliers),
            "scale": jnp.stack([weight.scale for weight in members]),
            "reduced": jnp.stack([weight.reduced for weight in members]),
            "columns": jnp.stack(columns) if stacked else columns[0],
        }
        return TiledWeight(tiles=api.Paneled(**fields, layer=layer, bits=bits), **place_of(first))
    n, k = first.shape
    narrow = first.dtype == jnp.float32 and all(_fits_bfloat16(np.asarray(weight)) for weight in members)

    def floats(weight: jax.Array, memory: np.ndarray) -> None:
        panels.pack_floats(_upper_half(np.asarray(weight)) if narrow else np.asarray(weight), memory)
        if release:
            weight.delete()

    dtype = jnp.dtype(jnp.bfloat16) if narrow else first.dtype
    written = _written(members, (panels.panel_count(n), k, panels.PANEL), dtype, floats)
    return DensePanels(panels=written, layer=layer, outputs=n, dtype=first.dtype)


def _fits_bfloat16(matrix: np.ndarray) -> bool:
    """Whether every float32 value is one of bfloat16: its lower 16 bits are zero. The first row mostly tells."""
    lower = matrix.view(np.uint16)[..., (0 if sys.byteorder == "little" else 1) :: 2]
    return not lower[:1].any() and not lower.any()


def _upper_half(matrix: np.ndarray) -> np.ndarray:
    upper = matrix.view(np.uint16)[..., (1 if sys.byteorder == "little" else 0) :: 2]
    return np.ascontiguousarray(upper).view(jnp.bfloat16)


def _written(members: Sequence[Any], shape: tuple[int, ...], dtype: Any, write: Any) -> jax.Array:
    memory = host.empty((len(members), *shape), dtype)
    # The library lets go of Python's lock while it writes.
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, members, memory))
    return host.adopt(memory)
