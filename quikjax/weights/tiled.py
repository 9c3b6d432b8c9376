"""A packed weight in the form that GPU kernels read: padded to whole tiles, once, when a model is put on a device.

`QuikWeight` is the format of files, of quantizing and of every other device. A `TiledWeight` stands for the same numbers, is made
from one by `put_on_device`, and multiplies like one (`linear.py`); nothing saves, validates or shards it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from quikjax.pallas_kernels import api
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledWeight:
    """A `QuikWeight` whose arrays are padded to the kernels' tiles (`pallas_kernels/layout.py`): the same layer, bit for bit.

    Data: `tiles`. Static: `activation_bits`, `shape`, `in_axes` and `group` as in `QuikWeight`.
    """

    tiles: api.Tiled
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
    assert math.prod(weight.out_shape) == weight.outputs
    return TiledWeight(
        tiles=api.to_tiles(packed(weight)),
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
