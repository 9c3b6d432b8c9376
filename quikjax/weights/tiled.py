"""A packed weight in the form that a device reads fastest, made once when a model is put there.

`QuikWeight` is the format of files and of quantizing. A `TiledWeight` stands for the same numbers, is made from one by
`put_on_device` (padded to the tiles of GPU kernels) or `widened` (codes in whole bytes, for a CPU), and multiplies like one
(`linear.py`); nothing saves, validates or shards it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from quikjax.pallas_kernels import api
from quikjax.weights.codebook_tiles import put_codebooks_on_device
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledWeight:
    """A `QuikWeight` whose arrays are in a device's form: the same layer, bit for bit.

    Data: `tiles`, arrays padded to the kernels' tiles (`pallas_kernels/layout.py`), or unpadded ones with int8 codes. Static:
    `activation_bits`, `shape`, `in_axes` and `group` as in `QuikWeight`.
    """

    tiles: api.Packed | api.Tiled
    activation_bits: int = _static()
    shape: tuple[int, ...] = _static()
    in_axes: tuple[int, ...] = _static()
    group: str | None = _static()

    @property
    def base(self) -> int:
        """The true number of base columns."""
        return self.tiles.base

    @property
    def level_clip(self) -> tuple[int, int] | None:
        """The level clip of the activations."""
        return self.tiles.level_clip

    @property
    def inputs(self) -> int:
        """`K`, the true number of input columns."""
        return self.tiles.inputs

    @property
    def outputs(self) -> int:
        """`N`, the true number of output rows."""
        return self.tiles.outputs

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The input axes' lengths: the trailing dimensions of an activation."""
        return tuple(self.shape[axis] for axis in self.in_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output axes' lengths: the trailing dimensions of a result."""
        return tuple(length for axis, length in enumerate(self.shape) if axis not in self.in_axes)


def packed(weight: QuikWeight | TiledWeight) -> api.Packed | api.Tiled:
    """The arrays of a weight as the kernels' interface takes them, in the form that they have."""
    if isinstance(weight, TiledWeight):
        return weight.tiles
    return api.Packed(
        qweight=weight.qweight,
        scale=weight.scale,
        reduced=weight.reduced,
        outliers=weight.outliers,
        columns=weight.columns,
        base=weight.base,
        inputs=weight.inputs,
        outputs=weight.outputs,
        level_clip=weight.level_clip,
    )


def tile(weight: QuikWeight) -> TiledWeight:
    """The weight in tile form."""
    return _in_form(weight, api.to_tiles(packed(weight)))


def widened(weight: QuikWeight) -> TiledWeight:
    """The weight with codes carried by int8, for decoding on a CPU: unpacking int4 there costs more than the product.

    With 4-bit codes it takes twice their memory, half of what 16-bit weights take.
    """
    arrays = packed(weight)
    return _in_form(weight, dataclasses.replace(arrays, qweight=arrays.qweight.astype("int8")))


def _in_form(weight: QuikWeight, arrays: api.Packed | api.Tiled) -> TiledWeight:
    assert math.prod(weight.out_shape) == weight.outputs
    return TiledWeight(
        tiles=arrays,
        activation_bits=weight.activation_bits,
        shape=weight.shape,
        in_axes=weight.in_axes,
        group=weight.group,
    )


def put_on_device(params: Any, device: api.Device | None = None) -> Any:
    """A parameter tree in the form that the kernels of `device` (by default this one) read; itself where they read no tiles.

    A `SparseWeight`, which no kernel reads, becomes the `QuikWeight` that it stands for. On a Hopper GPU every `QuikWeight`
    that lies on one device becomes a `TiledWeight`. Call it once, where a model begins to run, and let go of the tree it was
    given: both together take the memory of two models. A tree that went through it already, or that is sharded over several
    devices, comes back as it is. Save and validate the tree before, not after.
    """
    device = device or api.current_device()
    params = _expanded(params)
    if not device.hopper:
        return params
    params = put_codebooks_on_device(params, device)
    return _mapped(params, lambda weight: tile(weight) if _on_one_device(weight) else weight)


def _expanded(params: Any) -> Any:
    def is_sparse(leaf: Any) -> bool:
        return isinstance(leaf, SparseWeight)

    if not any(map(is_sparse, jax.tree.leaves(params, is_leaf=is_sparse))):
        return params
    return jax.tree.map(lambda leaf: _EXPAND(leaf) if is_sparse(leaf) else leaf, params, is_leaf=is_sparse)


# One program for all layers of a shape.
_EXPAND = jax.jit(SparseWeight.expanded)


def _mapped(params: Any, change: Callable[[QuikWeight], Any]) -> Any:
    return jax.tree.map(
        lambda leaf: change(leaf) if isinstance(leaf, QuikWeight) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, QuikWeight | TiledWeight),
    )


def _on_one_device(weight: QuikWeight) -> bool:
    sharding = getattr(weight.qweight, "sharding", None)
    return sharding is None or len(sharding.device_set) == 1
