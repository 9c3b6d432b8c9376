"""Relative errors layer by layer: a quantized model beside its original on the same tokens.

*Teacher-forced*, every layer and block reads what it reads in the original: the errors are its own. *Free-running*, it reads what
the quantized model has made so far: errors of all layers before it come in. All errors are
`||original - quantized|| / ||original||` over the tokens of all windows; errors *by token* are those of each token by itself,
which a few tokens of large norm do not decide.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64

from quikjax.errors import QuikError
from quikjax.evaluation.forward import checked_windows
from quikjax.evaluation.rounding import RoundedInput, rounded_activations
from quikjax.models.base import Block, Positions, Transformer, default_positions
from quikjax.models.registry import dotted
from quikjax.weights.formats import dequantize, is_packed
from quikjax.weights.linear import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """One quantized layer.

    - `weights`: of its weights.
    - `rounding`: of the activations it reads in the original, by rounding them to its own bits; 0 for 16-bit activations.
    - `rounding_by_token`: the same of each token, the mean of them.
    - `inputs`: of the activations it reads, free-running, before it rounds them.
    - `output_forced`, `output_free`: of what it gives.
    """

    path: str
    weights: float
    rounding: float
    rounding_by_token: float
    inputs: float
    output_forced: float
    output_free: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockErrors:
    """The hidden states that leave one transformer block."""

    path: str
    hidden_forced: float
    hidden_free: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColumnRanges:
    """The tensor that some layers read in the original: the largest `|x|` of each of its columns, over all tokens."""

    layers: tuple[str, ...]
    absmax: tuple[float, ...]


class TokenErrors(NamedTuple):
    """The hidden states that leave one transformer block, token by token."""

    path: str
    forced: Float64[np.ndarray, "windows length"]
    free: Float64[np.ndarray, "windows length"]


class Ends(NamedTuple):
    """The hidden states that leave the last block, window by window, for the head: the original's, and the free-running ones."""

    original: list[Float[np.ndarray, "1 length hidden"]]
    quantized: list[Float[np.ndarray, "1 length hidden"]]


class ErrorsByDepth(NamedTuple):
    """All quantized layers, all blocks, and all tensors that quantized layers read, in order of execution."""

    layers: list[LayerErrors]
    blocks: list[BlockErrors]
    ranges: list[ColumnRanges]
    tokens: list[TokenErrors]
    ends: Ends

    def as_json(self) -> dict[str, Any]:
        """A JSON object, without what there is of every token."""
        return {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            # Four digits: it is a picture, not a calibration.
            "ranges": [
                {"layers": list(read.layers), "absmax": [float(f"{value:.4g}") for value in read.absmax]} for read in self.ranges
            ],
        }


# Sums of squares: of the difference, and of the original.
Sums = tuple[Array, Array]


def errors_by_depth(quantized: Transformer, original: Transformer, ids: Any) -> ErrorsByDepth:
    """Run both models over windows, block after block, and compare every quantized layer.

    Hidden states of all windows are held in host memory, for both models. Of the quantized one only a part may be
    (`rounding.only`).

    Raises:
        QuikError: the models do not have the same blocks, or cannot read the windows.
    """
    ids = checked_windows(original, checked_windows(quantized, ids))
    if list(quantized.blocks) != list(original.blocks):
        raise QuikError(
            f"the models have {len(quantized.blocks)} and {len(original.blocks)} blocks; only a model and its original can be "
            "compared layer by layer"
        )
    rows = [jnp.asarray(row[None]) for row in ids]
    teacher = [np.asarray(original.embed(row, default_positions(row))) for row in rows]
    free = [np.asarray(quantized.embed(row, default_positions(row))) for row in rows]
    layers, blocks, ranges, tokens = [], [], [], []
    for key, block in original.blocks.items():
        prefix = ".".join((*original.block_path, key))
        blockdef, dense = _parts(block)
        packdef, packed = _parts(quantized.blocks[key])
        groups = tuple((group, tuple(members)) for group, members in block.groups.items())
        sums: dict[str, list[Sums]] = defaultdict(list)
        by_token: dict[str, list[np.ndarray]] = defaultdict(list)
        absmax: dict[str, np.ndarray] = {}
        for index in range(len(rows)):
            try:
                found = _both(blockdef, dense, packdef, packed, teacher[index], free[index], groups)
            except TypeError as error:
                raise QuikError(f"{prefix} differs in shape between the two models; are they the same model? ({error})") from None
            teacher[index], free[index] = np.asarray(found.right), np.asarray(found.own)
            for name, pair in found.sums.items():
                sums[name].append(pair)
            for name, ratios in found.by_token.items():
                by_token[name].append(np.asarray(ratios, np.float64))
            for group, largest in found.ranges.items():
                absmax[group] = np.maximum(absmax.get(group, 0.0), np.asarray(largest))
        errors = {name: _relative(pairs) for name, pairs in sums.items()}
        errors |= {name: float(np.mean(np.concatenate(ratios))) for name, ratios in by_token.items() if "|" in name}
        for name in sorted({name.split("|")[0] for name in errors if "|" in name}, key=_order(groups)):
            fields = {field: errors[f"{name}|{field}"] for field in _FIELDS}
            layers.append(LayerErrors(path=f"{prefix}.{name}.weight", **fields))
        for group, members in groups:
            quantized_ones = tuple(f"{prefix}.{layer}.weight" for layer in members if f"{layer}|weights" in errors)
            if quantized_ones:
                ranges.append(ColumnRanges(layers=quantized_ones, absmax=tuple(absmax[group].tolist())))
        blocks.append(BlockErrors(path=prefix, hidden_forced=errors["forced"], hidden_free=errors["free"]))
        tokens.append(TokenErrors(prefix, *(np.concatenate(by_token[name]) for name in ("forced", "free"))))
    return ErrorsByDepth(layers, blocks, ranges, tokens, Ends(teacher, free))


_FIELDS = ("weights", "rounding", "rounding_by_token", "inputs", "output_forced", "output_free")


def _order(groups: tuple[tuple[str, tuple[str, ...]], ...]) -> Any:
    return [layer for _, members in groups for layer in members].index


def _parts(block: Block) -> tuple[Any, dict[str, Any]]:
    blockdef, params = nnx.split(block)
    return blockdef, nnx.to_pure_dict(params)


def _relative(pairs: list[Sums]) -> float:
    gap, size = (math.fsum(float(pair[i]) for pair in pairs) for i in (0, 1))
    return math.sqrt(gap / size) if size else (0.0 if gap == 0 else math.inf)


def _run(
    blockdef: Any, params: Mapping[str, Any], hidden: Float[Array, "batch length hidden"]
) -> tuple[Float[Array, "batch length hidden"], dict[str, Array]]:
    """A block's output, and the tensor that each group of its layers reads."""
    seen: dict[str, Array] = {}

    def see(group: str, x: Array) -> Array:
        seen[group] = x
        return x

    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
    return nnx.merge(blockdef, params)(hidden, Positions(positions), observe=see)[0], seen


class _Both(NamedTuple):
    """One window through one block: what leaves it in the original and free-running, every error's sums of squares and errors by
    token by name, and the largest `|x|` per column of what each group of layers reads in the original.
    """

    right: Array
    own: Array
    sums: dict[str, Sums]
    by_token: dict[str, Array]
    ranges: dict[str, Array]


@partial(jax.jit, static_argnames=("blockdef", "packdef", "groups"))
def _both(
    blockdef: Any,
    dense: Mapping[str, Any],
    packdef: Any,
    packed: Mapping[str, Any],
    teacher: Float[Array, "batch length hidden"],
    free: Float[Array, "batch length hidden"],
    groups: tuple[tuple[str, tuple[str, ...]], ...],
) -> _Both:
    right, reads = _run(blockdef, dense, teacher)
    forced, _ = _run(packdef, packed, teacher)
    own, own_reads = _run(packdef, packed, free)
    sums = {"forced": _sums(right, forced), "free": _sums(right, own)}
    by_token = {"forced": _by_token(right, forced), "free": _by_token(right, own)}
    kernels, weights = dotted(dense), dotted(packed)
    for group, members in groups:
        for layer in members:
            weight = weights[f"{layer}.weight"]
            if isinstance(weight, RoundedInput):
                reader, stands_for = weight.reader, weight.kernel
            elif is_packed(weight):
                reader, stands_for = weight, dequantize(weight)
            else:
                continue
            W, x, own_x = kernels[f"{layer}.weight"].astype(jnp.float32), reads[group], own_reads[group]
            y, rounded = linear(x, W), rounded_activations(x, reader)
            sums |= {
                f"{layer}|weights": _sums(W, stands_for),
                f"{layer}|rounding": _sums(x, rounded),
                f"{layer}|inputs": _sums(x, own_x),
                f"{layer}|output_forced": _sums(y, linear(x, weight)),
                f"{layer}|output_free": _sums(y, linear(own_x, weight)),
            }
            by_token[f"{layer}|rounding_by_token"] = _by_token(x, rounded)
    ranges = {group: jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 1)) for group, x in reads.items()}
    return _Both(right, own, sums, by_token, ranges)


def _by_token(right: Float[Array, "batch length k"], other: Float[Array, "batch length k"]) -> Float32[Array, "batch length"]:
    """Each token's relative error; 0 where there is nothing to be wrong about."""
    right, other = right.astype(jnp.float32), other.astype(jnp.float32)
    gap, size = (jnp.linalg.norm(x, axis=-1) for x in (right - other, right))
    return jnp.where(gap == 0, 0.0, gap / size)


def _sums(right: Float[Array, "..."], other: Float[Array, "..."]) -> Sums:
    right, other = right.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.sum((right - other) ** 2), jnp.sum(right**2)
