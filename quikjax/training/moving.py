"""Moving and frozen parameters of a recovery: from an artifact's parameters to both, to the student's parameters, and back.

Of a packed weight `scale = scale0 e^sigma` and `outliers` (with `codes` also the latent numbers that its codes are rounded from);
of a norm `weight = weight0 e^gain` and `bias = bias0 + shift`. Everything else stays: codes, embeddings, biases of layers, dense
layers. All functions take flat dictionaries by dotted path.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.algorithms.numerics import all_finite, reduced_rows
from quikjax.errors import QuikError
from quikjax.weights.fake_quant import FakeQuantWeight, as_stored, codes_in_order, rounded_codes
from quikjax.weights.quik import QuikWeight, as_matrix

# path -> kind -> float32 array.
Moving = dict[str, dict[str, Any]]
KINDS = ("sigma", "outliers", "gain", "shift", "latent")

# A latent number starts off its code by the share of what rounding lost that is surely rounding's, and never near the next code.
_TRUST, _REACH = 0.8, 0.45


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StillWeight:
    """A packed weight's frozen part: `codes` int8 `[N, K]` in the order of `x`, `scale` at step 0, `columns`; how it is read.

    Its activation's level clip is `clips[clip]`: `clip` is a number, so that weights that differ in it alone can be stacked.
    """

    codes: Any
    scale: Any
    columns: Any
    clip: Any
    weight_bits: int = dataclasses.field(metadata={"static": True})
    activation_bits: int = dataclasses.field(metadata={"static": True})
    base: int = dataclasses.field(metadata={"static": True})
    group: str | None = dataclasses.field(metadata={"static": True})
    outlier_dtype: Any = dataclasses.field(metadata={"static": True})
    clips: tuple[tuple[int, int] | None, ...] = dataclasses.field(metadata={"static": True})


Clips = tuple[tuple[int, int] | None, ...]


def level_clips(blocks: Iterable[Mapping[str, Any]]) -> dict[str, Clips]:
    """By path, the level clips that blocks of the same structure have there."""
    found: dict[str, set[tuple[int, int] | None]] = {}
    for params in blocks:
        for path, leaf in params.items():
            if isinstance(leaf, QuikWeight):
                found.setdefault(path, set()).add(leaf.level_clip)
    return {path: tuple(sorted(clips, key=lambda clip: clip or (0, 0))) for path, clips in found.items()}


def start(
    params: Mapping[str, Any], originals: Mapping[str, Any] | None = None, clips: Mapping[str, Clips] | None = None
) -> tuple[dict[str, Any], Moving]:
    """Frozen and moving parameters at step 0, as host arrays. `clips`: see `level_clips`; left out, those of `params`.

    `originals`, the dense weights before quantization by the same paths, let the codes move too: their latent numbers start at
    `code + 0.8 clip(W / scale - code, -0.45, 0.45)`.

    Raises:
        QuikError: a packed weight has more than two axes, which no model of ours has.
    """
    still: dict[str, Any] = {}
    moving: Moving = {}
    clips = level_clips([params]) if clips is None else clips
    for path, leaf in params.items():
        if not isinstance(leaf, QuikWeight):
            kind = _norm_kind(path, params)
            still[path] = np.asarray(leaf)
            if kind is not None:
                moving[path] = {kind: np.zeros(leaf.shape, np.float32)}
            continue
        if len(leaf.shape) != 2 or leaf.in_axes != (1,):
            raise QuikError(f"{path} is not a matrix [outputs, inputs]; only such layers can be trained")
        codes = codes_in_order(leaf)
        still[path] = StillWeight(
            codes=codes,
            scale=np.asarray(leaf.scale),
            columns=np.asarray(leaf.columns),
            clip=np.int32(clips[path].index(leaf.level_clip)),
            weight_bits=leaf.weight_bits,
            activation_bits=leaf.activation_bits,
            base=leaf.base,
            group=_group(leaf, params),
            outlier_dtype=jnp.dtype(leaf.outliers.dtype),
            clips=clips[path],
        )
        moving[path] = {"sigma": np.zeros(leaf.outputs, np.float32), "outliers": np.asarray(leaf.outliers, np.float32)}
        if originals is not None:
            dense = np.asarray(as_matrix(jnp.asarray(originals[path], jnp.float32), leaf.in_axes))
            lost = dense / np.asarray(leaf.scale)[:, None] - codes
            moving[path]["latent"] = (codes + _TRUST * np.clip(lost, -_REACH, _REACH) * _base_mask(leaf)).astype(np.float32)
    return still, moving


def student(still: Mapping[str, Any], moving: Moving) -> dict[str, Any]:
    """The parameters that the student computes with, differentiable in `moving`; dense ones in float32. Traceable."""
    params: dict[str, Any] = {}
    for path, leaf in still.items():
        own = moving.get(path, {})
        if isinstance(leaf, StillWeight):
            codes = leaf.codes
            if "latent" in own:
                base = jnp.zeros(leaf.columns.shape, bool).at[leaf.columns[: leaf.base]].set(True)
                codes = jnp.where(base, rounded_codes(own["latent"], leaf.weight_bits), 0)
            params[path] = FakeQuantWeight(
                codes=codes,
                scale=leaf.scale * jnp.exp(own["sigma"]),
                outliers=as_stored(own["outliers"], leaf.outlier_dtype),
                columns=leaf.columns,
                clip=leaf.clip,
                activation_bits=leaf.activation_bits,
                base=leaf.base,
                group=leaf.group,
                clips=leaf.clips,
            )
        else:
            params[path] = as_stored(_moved(leaf.astype(jnp.float32), own), leaf.dtype)
    return params


def finish(params: Mapping[str, Any], moving: Moving) -> dict[str, Any]:
    """The artifact's parameters `params` with what has moved put in: the same formats and sizes, rounded, `reduced` recomputed.

    Raises:
        QuikError: a number is not finite, or beyond the range of its dtype.
    """
    finished = {}
    for path, leaf in params.items():
        own = {kind: jnp.asarray(array) for kind, array in moving.get(path, {}).items()}
        if not own:
            finished[path] = leaf
        elif isinstance(leaf, QuikWeight):
            codes = jnp.asarray(leaf.qweight)
            if "latent" in own:
                rounded = rounded_codes(own["latent"], leaf.weight_bits)
                codes = rounded[:, leaf.columns[: leaf.base]].astype(jnp.int8).astype(leaf.qweight.dtype)
            scale = jnp.asarray(leaf.scale) * jnp.exp(own["sigma"])
            finished[path] = dataclasses.replace(
                leaf,
                qweight=codes,
                scale=scale,
                reduced=reduced_rows(codes.astype(jnp.int8), scale),
                outliers=own["outliers"].astype(leaf.outliers.dtype),
            )
        else:
            finished[path] = _moved(jnp.asarray(leaf, jnp.float32), own).astype(leaf.dtype)
        for array in jax.tree.leaves(finished[path]):
            if jnp.issubdtype(array.dtype, jnp.floating) and not all_finite(array):
                raise QuikError(f"{path} has left the range of {array.dtype}; train at lower rates")
    return finished


def _moved(leaf: Any, own: Mapping[str, Any]) -> Any:
    if "gain" in own:
        return leaf * jnp.exp(own["gain"])
    return leaf + own["shift"] if "shift" in own else leaf


def _group(weight: QuikWeight, params: Mapping[str, Any]) -> str | None:
    """Name the layers of a block that share `weight`'s quantized activation: those of its group that are quantized alike."""
    others = [leaf for leaf in params.values() if isinstance(leaf, QuikWeight) and leaf.group == weight.group]
    alike = [leaf for leaf in others if (leaf.base, leaf.activation_bits) == (weight.base, weight.activation_bits)]
    if weight.group is None or any(leaf.level_clip != weight.level_clip for leaf in alike):
        return None
    return f"{weight.group} {weight.base} {weight.activation_bits}"


def _norm_kind(path: str, params: Mapping[str, Any]) -> str | None:
    """How a dense parameter moves: vectors called weight are a norm's, and so is a bias beside one."""
    owner, _, name = path.rpartition(".")
    weight = params.get(f"{owner}.weight")
    if weight is None or isinstance(weight, QuikWeight) or len(weight.shape) != 1:
        return None
    return {"weight": "gain", "bias": "shift"}.get(name)


def _base_mask(weight: QuikWeight) -> np.ndarray:
    mask = np.zeros(weight.inputs, np.float32)
    mask[np.asarray(weight.columns)[: weight.base]] = 1
    return mask
