"""Latent floats of quantization-aware training, in which everything moves, and what is to be quantized is rounded anew in every
step. From packed parameters and the floats they were made of to both halves, to the student, and back.

With `W` the latent matrix and `s = s0 e^sigma` the step size of a row (or of a row and group), the layer computes with

    q = clip(round(W / s) + z, lowest, highest),    W_hat = s (q - z)

straight-through: backwards `q` counts as `W / s` within the range and as a constant beyond it, so `s` learns as in LSQ (Esser
et al., arXiv 1902.08153). `s0`, zero points `z`, outlier columns and their choice are the packed weight's. A mask, one for a
weight that is kept and zero for one that is pruned, is laid over both `W` and the result.

All functions take flat dictionaries by dotted path.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from quikjax.algorithms import codebooks
from quikjax.algorithms.groups import spread
from quikjax.algorithms.numerics import all_finite, reduced_rows
from quikjax.errors import QuikError
from quikjax.weights.fake_groups import FakeGroupWeight
from quikjax.weights.fake_quant import FakeQuantWeight, as_stored, codes_in_order, rounded_between
from quikjax.weights.formats import is_packed
from quikjax.weights.groups import GroupWeight
from quikjax.weights.quik import QuikWeight

# What moves: path -> kind -> float32 array.
Moving = dict[str, dict[str, Any]]
KINDS = ("value", "sigma")

# How far from its code a latent number begins, at most.
_REACH = 0.499


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Latent:
    """The part of a packed weight that stays: step sizes at step 0, zero points, columns; `packed`, without arrays, is the rest.

    `scale` float32 `[N]`, or `[N, groups]` with `zero` of that shape; `columns` int32 `[K]` (empty in a weight in groups); `mask`
    int8 `[N, K]`, or `[0, 0]` where nothing is pruned. `shared`: the name of the layers whose quantized activation is this one's.
    `revives`: pruned weights go on moving, straight-through, so that a later mask may take them back.
    """

    scale: Any
    zero: Any
    columns: Any
    mask: Any
    packed: QuikWeight | GroupWeight = dataclasses.field(metadata={"static": True})
    shared: str | None = dataclasses.field(metadata={"static": True})
    outlier_dtype: str = dataclasses.field(metadata={"static": True})
    revives: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """The part of a dense parameter that stays: its mask, or `[0]`, and the dtype that it is stored in; `revives` as `Latent`."""

    mask: Any
    dtype: str = dataclasses.field(metadata={"static": True})
    revives: bool = dataclasses.field(default=False, metadata={"static": True})


def start(
    params: Mapping[str, Any],
    originals: Mapping[str, Any],
    masks: Mapping[str, Any] | None = None,
    *,
    revives: bool = False,
) -> tuple[dict[str, Any], Moving]:
    """Divide parameters into what stays and what moves, at step 0, as host arrays.

    Args:
        params: dense and packed parameters.
        originals: the floats that each packed one was made of, pruned already where there is a mask that stays.
        masks: of pruned weights, dense or packed, 0 or 1 in the shape of the matrix.
        revives: masks will be made anew. `originals` are not pruned then, and hold the dense weights that have a mask, too.

    Raises:
        QuikError: a weight is packed in a format that cannot be trained.
    """
    still: dict[str, Any] = {}
    moving: Moving = {}
    masks = masks or {}
    for path, leaf in params.items():
        if not is_packed(leaf):
            mask = np.asarray(masks.get(path, np.zeros(0)), np.int8)
            still[path] = Dense(mask, str(jnp.dtype(leaf.dtype)), revives)
            moving[path] = {"value": np.asarray(originals[path] if revives and mask.size else leaf, np.float32)}
            continue
        check_trainable(path, leaf)
        still[path] = _stays(leaf, np.asarray(masks.get(path, np.zeros((0, 0))), np.int8), revives)
        scale = still[path].scale
        moving[path] = {"value": np.asarray(originals[path], np.float32), "sigma": np.zeros(scale.shape, np.float32)}
    return still, moving


def student(still: Mapping[str, Any], moving: Moving) -> dict[str, Any]:
    """The parameters that the student computes with, differentiable in `moving`; dense ones in float32. Traceable."""
    params: dict[str, Any] = {}
    for path, leaf in still.items():
        own = moving[path]
        value = _masked(own["value"], leaf)
        if isinstance(leaf, Dense):
            params[path] = as_stored(value, leaf.dtype)
        elif isinstance(leaf.packed, GroupWeight):
            packed = leaf.packed
            scale = _group_scales(leaf, own)
            codes = _group_codes(value, leaf, scale)
            wide = spread(scale, packed.group_size, packed.inputs)
            zero = spread(leaf.zero, packed.group_size, packed.inputs)
            matrix = (codes - zero) * wide
            params[path] = FakeGroupWeight(matrix, packed.activation_bits, leaf.shared, packed.level_clip)
        else:
            packed = leaf.packed
            scale = leaf.scale * jnp.exp(own["sigma"])
            params[path] = FakeQuantWeight(
                codes=_codes(value, leaf, scale),
                scale=scale,
                outliers=as_stored(value[:, leaf.columns[packed.base :]], leaf.outlier_dtype),
                columns=leaf.columns,
                clip=jnp.int32(0),
                activation_bits=packed.activation_bits,
                base=packed.base,
                group=leaf.shared,
                clips=(packed.level_clip,),
            )
    return params


def finish(params: Mapping[str, Any], still: Mapping[str, Any], moving: Moving) -> dict[str, Any]:
    """The parameters as they are stored: those of `params`, dense or packed, with what has moved put in.

    Raises:
        QuikError: a number is not finite, or beyond the range of its dtype.
    """
    finished: dict[str, Any] = {}
    for path, leaf in params.items():
        own, kept = {kind: jnp.asarray(array) for kind, array in moving[path].items()}, jax.tree.map(jnp.asarray, still[path])
        value = _masked(own["value"], kept)
        if isinstance(leaf, GroupWeight):
            scale = _group_scales(kept, own)
            codes = _group_codes(value, kept, scale).astype(jnp.uint8)
            finished[path] = dataclasses.replace(
                leaf, codes=codebooks.pack(codes.reshape(-1), leaf.bits_per_code), scale=scale.astype(jnp.float16)
            )
        elif isinstance(leaf, QuikWeight):
            scale = kept.scale * jnp.exp(own["sigma"])
            codes = _codes(value, kept, scale)[:, kept.columns[: leaf.base]].astype(jnp.int8)
            finished[path] = dataclasses.replace(
                leaf,
                qweight=codes.astype(leaf.qweight.dtype),
                scale=scale,
                reduced=reduced_rows(codes, scale),
                outliers=value[:, kept.columns[leaf.base :]].astype(leaf.outliers.dtype),
            )
        else:
            finished[path] = value.astype(leaf.dtype)
        for array in jax.tree.leaves(finished[path]):
            if jnp.issubdtype(array.dtype, jnp.floating) and not all_finite(array):
                raise QuikError(f"{path} has left the range of {array.dtype}; train at lower rates")
    return finished


def _stays(leaf: Any, mask: np.ndarray, revives: bool) -> Latent:
    scale = np.asarray(leaf.scale, np.float32)
    zero, columns, outlier_dtype = np.zeros(0, np.float32), np.zeros(0, np.int32), "float16"
    if isinstance(leaf, QuikWeight):
        columns, outlier_dtype = np.asarray(leaf.columns), str(jnp.dtype(leaf.outliers.dtype))
    elif leaf.symmetric:
        zero = np.full(scale.shape, 2 ** (leaf.bits_per_code - 1), np.float32)
    else:
        zero = np.asarray(leaf.zero, np.float32)
    return Latent(
        scale=scale,
        zero=zero,
        columns=columns,
        mask=mask,
        packed=_bare(leaf),
        shared=_shared(leaf),
        outlier_dtype=outlier_dtype,
        revives=revives,
    )


def is_quantized(path: str, leaf: Any) -> bool:
    """Whether a leaf is packed in a format that can be trained.

    Raises:
        QuikError: it is packed in another one.
    """
    if is_packed(leaf):
        check_trainable(path, leaf)
    return is_packed(leaf)


def within_its_code(leaf: QuikWeight | GroupWeight, W: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, "n k"]:
    """The latent floats to begin with: `W`, moved where it would round to another code than the quantizer has chosen.

    What GPTQ has made up for, or a clipped range has cut off, is so not undone by the first step.
    """
    W = np.asarray(W, np.float32)
    if isinstance(leaf, GroupWeight):
        n, k = leaf.outputs, leaf.inputs
        codes = np.asarray(codebooks.unpack(jnp.asarray(leaf.codes), n * k)).reshape(n, k).astype(np.float32)
        scale = np.asarray(spread(jnp.asarray(leaf.scale, jnp.float32), leaf.group_size, k))
        half = np.float32(2 ** (leaf.bits_per_code - 1))
        zero = half if leaf.symmetric else np.asarray(spread(jnp.asarray(leaf.zero, jnp.float32), leaf.group_size, k))
        codes, base = codes - zero, np.ones(k, bool)
    else:
        codes, scale = codes_in_order(leaf).astype(np.float32), np.asarray(leaf.scale)[:, None]
        base = np.zeros(leaf.inputs, bool)
        base[np.asarray(leaf.columns)[: leaf.base]] = True
    near = np.clip(W / scale - codes, -_REACH, _REACH)
    moved = np.abs(W / scale - codes) > _REACH
    return np.where(base & moved, (codes + near) * scale, W).astype(np.float32)


def check_trainable(path: str, leaf: Any) -> None:
    """Whether a packed weight can be trained.

    Raises:
        QuikError: it cannot, and why.
    """
    if not isinstance(leaf, QuikWeight | GroupWeight):
        raise QuikError(f"{path} would be a {type(leaf).__name__}; only layers in QUIK format and in groups can be trained")
    if len(leaf.shape) != 2 or leaf.in_axes != (1,):
        raise QuikError(f"{path} is not a matrix [outputs, inputs]; only such layers can be trained")
    if isinstance(leaf, GroupWeight) and leaf.permuted:
        raise QuikError(f'{path} has groups of reordered columns; take a rule with order "stored" or static groups to train')


def _masked(value: Float32[Array, "..."], leaf: Latent | Dense) -> Float32[Array, "..."]:
    if not leaf.mask.size:
        return value
    pruned = value * leaf.mask
    return value + jax.lax.stop_gradient(pruned - value) if leaf.revives else pruned


def _codes(value: Float32[Array, "n k"], leaf: Latent, scale: Float32[Array, " n"]) -> Float32[Array, "n k"]:
    """Codes in the order of `x`, zero in the outlier columns."""
    packed = leaf.packed
    high = 2 ** (packed.weight_bits - 1) - 1
    codes = rounded_between(value / scale[:, None], -high - 1, high)
    if packed.base == packed.inputs:
        return codes
    return jnp.where(jnp.zeros(packed.inputs, bool).at[leaf.columns[: packed.base]].set(True), codes, 0)


def _group_scales(leaf: Latent, own: Mapping[str, Any]) -> Float32[Array, "n groups"]:
    return as_stored(leaf.scale * jnp.exp(own["sigma"]), jnp.float16)


def _group_codes(value: Float32[Array, "n k"], leaf: Latent, scale: Float32[Array, "n groups"]) -> Float32[Array, "n k"]:
    packed = leaf.packed
    assert isinstance(packed, GroupWeight)
    wide, zero = (spread(part, packed.group_size, packed.inputs) for part in (scale, leaf.zero))
    return rounded_between(value / wide + zero, 0, 2**packed.bits_per_code - 1)


def _bare(leaf: Any) -> Any:
    """A packed weight without its arrays: hashable."""
    arrays = {field.name: None for field in dataclasses.fields(leaf) if not field.metadata.get("static")}
    return dataclasses.replace(leaf, **arrays)


def _shared(weight: Any) -> str | None:
    """Name the layers of a block that share `weight`'s quantized activation: those of its group that are quantized alike."""
    if weight.group is None:
        return None
    return f"{weight.group} {weight.base} {weight.activation_bits} {weight.level_clip}"
