"""A codebook weight in the form that Hopper's kernel reads, and the product with it on the backend that can."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from quikjax.algorithms import codebooks
from quikjax.pallas_kernels import choice, devices
from quikjax.pallas_kernels.choice import Choice, CodebookProblem
from quikjax.pallas_kernels.codebook_matmul import api
from quikjax.pallas_kernels.codebook_matmul import layout as tile_form
from quikjax.pallas_kernels.codebook_matmul.layout import CodebookTiles
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.kernel import Kernel
from quikjax.weights.quik import from_matrix

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledCodebook(Kernel):
    """A `CodebookWeight` whose arrays are in tile form (`pallas_kernels/codebook_matmul/layout.py`): the same layer.

    Nothing saves, validates or shards it. `shape`, `in_axes` and `group` as in `CodebookWeight`; `label`: its format in a word.
    """

    tiles: CodebookTiles
    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    in_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    group: str | None = dataclasses.field(metadata=_STATIC)
    label: str = dataclasses.field(metadata=_STATIC)

    def matrix(self) -> Float32[Array, "n k"]:
        """`W`, dequantized: the bits of `CodebookWeight.matrix`."""
        return tile_form.matrix(self.tiles)


def problem_of(weight: CodebookWeight | TiledCodebook, rows: int, dtype: Any) -> CodebookProblem:
    """The facts that a choice of backend may look at. Needs shapes only."""
    if isinstance(weight, TiledCodebook):
        return CodebookProblem(rows, weight.inputs, weight.outputs, weight.inputs, 4, tile_form.BLOCK, False, jnp.dtype(dtype))
    # A block that holds whole rows, or all of the tensor, is one absmax for each row.
    block = weight.block
    if weight.base and block % weight.base == 0:
        block = tile_form.BLOCK * math.ceil(weight.base / tile_form.BLOCK)
    return CodebookProblem(
        rows, weight.inputs, weight.outputs, weight.base, weight.bits_per_code, block, weight.centered, jnp.dtype(dtype)
    )


def tile_codebook(weight: CodebookWeight) -> TiledCodebook:
    """The weight in tile form; `why_not_codebook_tiles` of its problem is `None`."""
    n, k = weight.outputs, weight.inputs
    codes = codebooks.unpack(jnp.asarray(weight.codes), weight.coded).reshape(n, k)
    absmax = jnp.asarray(weight.absmax) if weight.absmax_format != "double" else weight.full_absmax()
    block = problem_of(weight, 1, jnp.bfloat16).block
    if weight.block % k == 0:  # whole rows to a block: each row has its own copy
        absmax = jnp.repeat(absmax, weight.block // k)[:n]
    tiles = tile_form.to_tiles(codes, absmax.reshape(n, -1), weight.table(), block)
    return TiledCodebook(tiles=tiles, shape=weight.shape, in_axes=weight.in_axes, group=weight.group, label=weight.label)


# One program for all layers of a shape.
_TILE = jax.jit(tile_codebook)


def put_codebooks_on_device(params: Any, device: devices.Device) -> Any:
    """A parameter tree whose codebook weights that a kernel of `device` reads are in tile form, if they lie on one device."""

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, CodebookWeight):
            return leaf
        refused = choice.why_not_mosaic_codebook(problem_of(leaf, 1, jnp.bfloat16), device)
        sharding = getattr(leaf.codes, "sharding", None)
        alone = sharding is None or len(sharding.device_set) == 1
        return _TILE(leaf) if refused is None and alone else leaf

    return jax.tree.map(placed, params, is_leaf=dataclasses.is_dataclass)


def codebook_choice(
    weight: CodebookWeight | TiledCodebook, rows: int, dtype: Any, backend: str | None = None, device: Any = None
) -> Choice:
    """Name the backend that multiplies `rows` tokens of `dtype` by a codebook weight, and say why. Needs shapes only.

    Raises:
        BackendError: the named backend cannot run this layer.
    """
    return choice.choose_codebook(problem_of(weight, rows, dtype), device or devices.current_device(), backend)


def kernel_product(
    x: Float[Array, "*batch k"], weight: CodebookWeight | TiledCodebook, bias: Float[Array, " n"] | None = None
) -> Float[Array, "*batch n"]:
    """`x W^T + bias` by the kernel, in the dtype of `x`."""
    tiled = _TILE(weight) if isinstance(weight, CodebookWeight) else weight
    return api.product(x, tiled.tiles, bias)


def dequantize_tiled(weight: TiledCodebook) -> Float32[Array, "..."]:
    """The float32 kernel that a weight in tile form stands for."""
    return from_matrix(weight.matrix(), weight.shape, weight.in_axes)
