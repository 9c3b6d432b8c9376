"""A packed weight in the form that a device reads fastest, made once when a model is put there.

`QuikWeight` is the format of files and of quantizing. A `TiledWeight` stands for the same numbers, is made from one by
`put_on_device` (padded to the tiles of Hopper's kernels, or with codes two to a byte for Triton's) or `widened` (codes in whole
bytes, for a CPU), and multiplies like one (`linear.py`); nothing saves, validates or shards it. Layers that are always multiplied
together are joined (`join_groups`): the first one's weight has the tiles of all, each of the others is a `TiledMember`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.layout import pad_to
from quikjax.weights.codebook_tiles import put_codebooks_on_device
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """The place of a layer in a model. Static: `activation_bits`, `shape`, `in_axes` and `group` as in `QuikWeight`."""

    activation_bits: int = _static()
    shape: tuple[int, ...] = _static()
    in_axes: tuple[int, ...] = _static()
    group: str | None = _static()

    @property
    def inputs(self) -> int:
        """`K`, the true number of input columns."""
        return math.prod(self.in_shape)

    @property
    def outputs(self) -> int:
        """`N`, the true number of output rows."""
        return math.prod(self.out_shape)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The input axes' lengths: the trailing dimensions of an activation."""
        return tuple(self.shape[axis] for axis in self.in_axes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output axes' lengths: the trailing dimensions of a result."""
        return tuple(length for axis, length in enumerate(self.shape) if axis not in self.in_axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledWeight(_Place):
    """A `QuikWeight` whose arrays are in a device's form: the same layer, bit for bit.

    Data: `tiles`, arrays padded to the kernels' tiles (`pallas_kernels/layout.py`), or unpadded ones with int8 codes or codes two
    to a byte; or those of all layers of its group, of which it is the first.
    """

    tiles: api.Form

    @property
    def base(self) -> int:
        """The true number of base columns."""
        return self.tiles.base

    @property
    def level_clip(self) -> tuple[int, int] | None:
        """The level clip of the activations."""
        return self.tiles.level_clip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledMember(_Place):
    """A layer whose arrays are among the tiles of the first layer of its group, in the place `number`. No data.

    Static: `base` and `level_clip` as in `TiledWeight`.
    """

    number: int = _static()
    base: int = _static()
    level_clip: tuple[int, int] | None = _static()


@overload
def packed(weight: QuikWeight) -> api.Packed: ...


@overload
def packed(weight: QuikWeight | TiledWeight) -> api.Form: ...


def packed(weight: QuikWeight | TiledWeight) -> api.Form:
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


def _in_form(weight: QuikWeight, arrays: api.Form) -> TiledWeight:
    assert math.prod(weight.out_shape) == weight.outputs
    return TiledWeight(tiles=arrays, **place_of(weight))


def place_of(weight: Any) -> dict[str, Any]:
    """The fields of a layer's place in a model, of a weight in any form."""
    return {field.name: getattr(weight, field.name) for field in dataclasses.fields(_Place)}


def put_on_device(params: Any, device: api.Device | None = None) -> Any:
    """A parameter tree in the form that the kernels of `device` (by default this one) read; itself where they read no tiles.

    A `SparseWeight`, which no kernel reads, becomes the `QuikWeight` that it stands for. On a Hopper GPU every `QuikWeight`
    that lies on one device becomes a `TiledWeight`, and where Triton's kernels run (`choice.py`) every one of 4 bits. Call it
    once, where a model begins to run, and let go of the tree it was given: both together take the memory of two models. A tree
    that went through it already, or that is sharded over several devices, comes back as it is. Save it before.

    Biases beside a `TiledWeight` become float32, as Hopper's kernels read them: converting one would be a kernel for each token.
    """
    device = device or api.current_device()
    params = _expanded(params)
    if device.hopper:
        params = put_codebooks_on_device(params, device)
        return _with_wide_biases(_mapped(params, lambda weight: tile(weight) if _on_one_device(weight) else weight))
    if not any(isinstance(leaf, QuikWeight) and _by_triton(leaf, device) for leaf in jax.tree.leaves(params, is_leaf=_is_kernel)):
        return params
    return _mapped(params, lambda weight: _halved(weight) if _by_triton(weight, device) else weight)


def _by_triton(weight: QuikWeight, device: api.Device) -> bool:
    """Whether Triton multiplies by a weight of 4 bits, given activations in the dtype of its outliers."""
    if weight.weight_bits != 4 or not _on_one_device(weight):
        return False
    # Shapes decide: of one row, like of any number.
    choice = api.explain(1, packed(weight), weight.activation_bits, weight.outliers.dtype, device=device)
    return choice.backend == "triton"


def _halved(weight: QuikWeight) -> TiledWeight:
    return _in_form(weight, _HALVE(packed(weight)))


def join_groups(params: dict[str, Any], groups: Iterable[tuple[str, ...]]) -> dict[str, Any]:
    """A tree whose layers of a group, all in tile form and of one format, are multiplied by one kernel.

    `groups` name layers that read one tensor and are given to `linears` together, by their path in `params` (`mlp.gate_proj`).
    Their biases, if all have one, lie one after the other in the first layer's, as the rows of their tiles do (`own_biases`).
    Groups whose layers differ in format, or that no kernel runs, stay as they are.
    """
    for layers in groups:
        weights = [node_at(params, layer)["weight"] for layer in layers]
        if len(weights) > 1 and all(isinstance(w, TiledWeight) and isinstance(w.tiles, api.Tiled) for w in weights):
            formats = {
                (w.group, w.activation_bits, w.in_shape, w.base, w.level_clip, w.tiles.qweight.dtype, w.tiles.outliers.dtype)
                for w in weights
            }
            if len(formats) == 1 and weights[0].group is not None and all(w.outputs % 8 == 0 for w in weights):
                biases: list[Any] = [node_at(params, layer).get("bias") for layer in layers]
                for number, layer in enumerate(layers):
                    params = _with(params, layer.split("."), weight=_joined(weights, number))
                if all(bias is not None for bias in biases):
                    padded = [pad_to(b.astype("float32"), w.tiles.scale.shape) for b, w in zip(biases, weights, strict=True)]
                    params = _with(params, layers[0].split("."), bias=_CONCATENATE(padded))
    return params


def _joined(weights: list[TiledWeight], number: int) -> TiledWeight | TiledMember:
    weight = weights[number]
    if number == 0:
        return dataclasses.replace(weight, tiles=_JOIN([w.tiles for w in weights]))
    return TiledMember(**place_of(weight), number=number, base=weight.base, level_clip=weight.level_clip)


# One program for all groups, or weights, of a shape.
_JOIN = jax.jit(api.join)
_HALVE = jax.jit(api.halve)
_CONCATENATE = jax.jit(jnp.concatenate)


def own_biases(weights: Sequence[Any], biases: Sequence[Any]) -> list[Any]:
    """Each layer's bias, `[N]`: those of a joined group's layers, which follow each other, out of the first one's."""
    found = [None if bias is None else bias.reshape(-1) for bias in biases]
    for number, weight in enumerate(weights):
        bias = found[number]
        joined = weight.tiles if isinstance(weight, TiledWeight) and isinstance(weight.tiles, api.Joined) else None
        if joined is not None and bias is not None and bias.size != weight.outputs:
            own = [bias[first : first + count] for first, count, _ in joined.places]
            found[number : number + len(own)] = own
    return found


def node_at(params: dict[str, Any], layer: str) -> dict[str, Any]:
    """The parameters of the layer at a path such as `mlp.gate_proj`."""
    return functools.reduce(lambda node, name: node[name], layer.split("."), params)


def _with(params: dict[str, Any], path: list[str], **leaves: Any) -> dict[str, Any]:
    if not path:
        return {**params, **leaves}
    return {**params, path[0]: _with(params[path[0]], path[1:], **leaves)}


def _with_wide_biases(params: Any) -> Any:
    if not isinstance(params, dict):
        return params
    found = {name: _with_wide_biases(node) for name, node in params.items()}
    if isinstance(found.get("weight"), TiledWeight) and found.get("bias") is not None:
        found["bias"] = found["bias"].astype("float32")
    return found


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
        is_leaf=_is_kernel,
    )


def _is_kernel(leaf: Any) -> bool:
    return isinstance(leaf, QuikWeight | TiledWeight | TiledMember)


def _on_one_device(weight: QuikWeight) -> bool:
    sharding = getattr(weight.qweight, "sharding", None)
    return sharding is None or len(sharding.device_set) == 1
