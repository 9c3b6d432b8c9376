"""Where an artifact loses accuracy: by cause, by position in the window, by block; and how even its channels are.

Every figure is a KL divergence to the original on the same tokens, `KL(original || quantized)` in nats per token, through the
integer path. A cause is isolated by changing packed weights and nothing else:

    weights only        the artifact's codes, activations in their own dtype
    activations only    the artifact's columns, bits and level clip of activations; weights rounded to 8 bits instead
    GROUP at 8 bits     the artifact with one group of layers rounded to W8A8
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from quikjax.algorithms.numerics import reduced_rows, take_columns
from quikjax.algorithms.rtn import rtn
from quikjax.errors import QuikError
from quikjax.models.base import Block, CausalLM, Positions, Transformer, default_positions
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.models.tokens import checked_model
from quikjax.weights.quik import QuikWeight, as_matrix

# Logits are made for this many tokens at a time.
_CHUNK = 512

Params = Mapping[str, Any]
Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Mean KL of tokens with `first` to `last` tokens before them in their window, both included."""

    first: int
    last: int
    kl: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How uneven the base columns of a group's input are: the standard deviation of `log rms` over columns, over the blocks."""

    group: str
    median: float
    largest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossStudy:
    """The figures. `causes`: name to KL. `blocks`: relative error of the hidden states that leave each block."""

    tokens: int
    causes: dict[str, float]
    positions: tuple[PositionLoss, ...]
    blocks: dict[str, float]
    spreads: tuple[Spread, ...]

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return dataclasses.asdict(self)


def study_loss(
    original: Transformer, artifact: Transformer, windows: Int[np.ndarray, "count length"], progress: Progress | None = None
) -> LossStudy:
    """Measure where `artifact`, `original` quantized, loses accuracy on `windows` of tokens.

    `progress` is called with each cause and its KL as it is measured. Takes one forward pass of the original and one for each
    cause: three, and one for each group of layers.

    Raises:
        QuikError: the two are not one model, or nothing is quantized.
    """
    original, artifact = checked_model(original), checked_model(artifact)
    dense, packed = dotted(pure_params(original)), dotted(pure_params(artifact))
    if {path: tuple(leaf.shape) for path, leaf in dense.items()} != {path: tuple(leaf.shape) for path, leaf in packed.items()}:
        raise QuikError("the artifact was not made from this model: their parameters differ in name or shape")
    if not any(isinstance(leaf, QuikWeight) for leaf in packed.values()):
        raise QuikError("the artifact has no quantized layer, so nothing is lost")
    outputs: list[list[np.ndarray]] = []
    squares: dict[tuple[str, str], Any] = {}
    for row in windows:
        outputs.append(_forward(original, row[None], squares))
    causes: dict[str, float] = {}
    per_token, errors = np.zeros(0), np.zeros(0)
    for name, params in _variants(original, dense, packed):
        model = nnx.merge(nnx.split(original)[0], nested(params))
        divergences, gaps = [], []
        for row, expected in zip(windows, outputs, strict=True):
            found = _forward(model, row[None])
            divergences.append(_divergence(original, model, expected[-1], found[-1]))
            gaps.append([np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(expected, found, strict=True)])
        causes[name] = float(np.mean(divergences))
        if name == "everything":
            per_token, errors = np.asarray(divergences, np.float64), np.mean(gaps, axis=0)
        if progress is not None:
            progress(name, causes[name])
    names = [".".join((*original.block_path, key)) for key in original.blocks]
    return LossStudy(
        tokens=int(windows.size),
        causes=causes,
        positions=tuple(_by_position(per_token.mean(axis=0))),
        blocks={name: float(error) for name, error in zip(names, errors, strict=True)},
        spreads=tuple(_spreads(original, packed, squares)),
    )


def _variants(original: CausalLM, dense: Params, packed: Params) -> list[tuple[str, dict[str, Any]]]:
    def changed(change: Callable[[str, QuikWeight], Any]) -> dict[str, Any]:
        return {path: change(path, leaf) if isinstance(leaf, QuikWeight) else leaf for path, leaf in packed.items()}

    found = [
        ("everything", dict(packed)),
        ("weights only", changed(lambda _, leaf: dataclasses.replace(leaf, activation_bits=16, level_clip=None))),
        ("activations only", changed(lambda path, leaf: _rounded(dense[path], leaf))),
    ]
    groups = {
        f"{'.'.join((*original.block_path, key))}.{layer}.weight": group
        for key, block in original.blocks.items()
        for group, layers in block.groups.items()
        for layer in layers
    }

    def lifted(group: str) -> dict[str, Any]:
        def lift(path: str, leaf: QuikWeight) -> QuikWeight:
            if groups.get(path) != group:
                return leaf
            return _rounded(dense[path], dataclasses.replace(leaf, activation_bits=8, level_clip=None))

        return changed(lift)

    present = {groups[path] for path, leaf in packed.items() if isinstance(leaf, QuikWeight) and path in groups}
    return found + [(f"{group} at 8 bits", lifted(group)) for group in dict.fromkeys(groups.values()) if group in present]


def _rounded(kernel: Float[Array, "..."], like: QuikWeight) -> QuikWeight:
    """Round a dense kernel to 8 bits with the columns of a packed one."""
    W = as_matrix(jnp.asarray(kernel), like.in_axes).astype(jnp.float32)
    q, s, outliers = rtn(take_columns(W, like.columns), base=like.base, bits=8, clip=False)
    return dataclasses.replace(
        like,
        qweight=q,
        scale=s,
        reduced=reduced_rows(q, s),
        outliers=outliers.astype(like.outliers.dtype),
        weight_bits=8,
    )


def _forward(
    model: CausalLM, ids: Int[np.ndarray, "1 length"], squares: dict[tuple[str, str], Any] | None = None
) -> list[np.ndarray]:
    """Compute the hidden states that leave each block, and add up squares of what its groups read where asked for."""
    tokens = jnp.asarray(ids)
    hidden = model.embed(tokens, default_positions(tokens))
    found = []
    for key, block in model.blocks.items():
        blockdef, params = nnx.split(block)
        hidden, seen = _through_block(blockdef, nnx.to_pure_dict(params), hidden, squares is not None)
        found.append(np.asarray(hidden))
        for group, square in seen.items():
            assert squares is not None
            squares[key, group] = squares.get((key, group), 0.0) + np.asarray(square)
    return found


def _through(
    blockdef: nnx.GraphDef[Block], params: Params, hidden: Float[Array, "batch length hidden"], observed: bool
) -> tuple[Float[Array, "batch length hidden"], dict[str, Array]]:
    seen: dict[str, Array] = {}

    def see(group: str, x: Array) -> Array:
        seen[group] = jnp.sum(x.astype(jnp.float32).reshape(-1, x.shape[-1]) ** 2, axis=0)
        return x

    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
    y = nnx.merge(blockdef, params)(hidden, Positions(positions), observe=see if observed else None)[0]
    return y, seen


_through_block = jax.jit(_through, static_argnums=(0, 3))


def _divergence(original: CausalLM, model: CausalLM, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL per token of one window, in chunks."""
    parts = []
    for start in range(0, expected.shape[1], _CHUNK):
        end = start + _CHUNK
        parts.append(
            np.asarray(_kl(original.head(jnp.asarray(expected[:, start:end])), model.head(jnp.asarray(found[:, start:end]))))
        )
    return np.concatenate(parts)


@jax.jit
def _kl(expected: Float[Array, "1 chunk vocab"], found: Float[Array, "1 chunk vocab"]) -> Float32[Array, " chunk"]:
    theirs, mine = jax.nn.log_softmax(expected[0]), jax.nn.log_softmax(found[0])
    return jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=1)


def _by_position(kl: np.ndarray) -> list[PositionLoss]:
    """Mean over positions 0, 1, 2-3, 4-7, ..."""
    edges = [0, 1]
    while edges[-1] < len(kl):
        edges.append(min(2 * edges[-1], len(kl)))
    return [
        PositionLoss(first=first, last=end - 1, kl=float(kl[first:end].mean()))
        for first, end in itertools.pairwise(edges)
        if end > first
    ]


def _spreads(model: CausalLM, packed: Params, squares: Mapping[tuple[str, str], np.ndarray]) -> list[Spread]:
    found: dict[str, list[float]] = {}
    for key, block in model.blocks.items():
        for group, layers in block.groups.items():
            leaf = packed.get(f"{'.'.join((*model.block_path, key))}.{layers[0]}.weight")
            if not isinstance(leaf, QuikWeight) or leaf.base == 0:
                continue
            base = squares[key, group][np.asarray(leaf.columns)[: leaf.base]]
            logs = 0.5 * np.log(base[base > 0])
            found.setdefault(group, []).append(float(np.std(logs)) if logs.size else math.nan)
    return [Spread(group=group, median=float(np.median(stds)), largest=float(np.max(stds))) for group, stds in found.items()]
