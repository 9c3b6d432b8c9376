"""Transformer blocks one after the other in one compiled loop, differentiable with little memory, for any model of ours.

Equal blocks that follow each other are stacked and scanned, so that one is compiled whatever the depth. Backwards each block is
computed again from what entered it (`jax.checkpoint`); the layers' products are kept from the first time while all of them
together take at most `KEPT_BYTES`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from quikjax.models.base import Block, Positions, Transformer, default_positions
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.training import moving as recovered
from quikjax.training.moving import Moving
from quikjax.weights.linear import KEPT

# Which program is compiled, and so the bits of a gradient, must not depend on how much room there is.
KEPT_BYTES = 1 << 31


# Of what stays and what moves, the parameters that a computation reads; traceable. And of a block's parameters, the two.
Student = Callable[[Mapping[str, Any], Moving], dict[str, Any]]
Start = Callable[[str | None, Mapping[str, Any]], tuple[dict[str, Any], Moving]]


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks of equal structure that follow each other: their keys, and one block without parameters."""

    keys: tuple[str, ...]
    blockdef: nnx.GraphDef[Block]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without parameters, its blocks in runs: hashable, so that JAX compiles by it.

    Its arrays are beside it, `Tree`s of what stays and of what moves: under `rest` what is in no block, under the number of a run
    its blocks' arrays, stacked. `student(still, moving)` are the parameters that they stand for.
    """

    graphdef: nnx.GraphDef[Any]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of every parameter
    prefix: str
    runs: tuple[Run, ...]
    student: Student = recovered.student
    head_size: int = 0


Tree = dict[str, dict[str, Any]]
REST = "rest"


class Dropout(NamedTuple):
    """Dropout in training: which share of the numbers becomes zero, and the key that draws them."""

    share: float
    key: Array


# What dropout is of, beside the embeddings: what enters the layers that write into the hidden states.
_DROPPED = ("attention_output", "mlp_output")


class Traces(NamedTuple):
    """The inside of a model, as distillation compares it: what leaves each block, and the queries and keys of each.

    They have no heads unless they were asked for.
    """

    hidden: Float[Array, "blocks batch length hidden"]
    query: Float[Array, "blocks batch length heads head"]
    key: Float[Array, "blocks batch length kv_heads head"]


def take_apart(
    model: Transformer,
    parts: Mapping[str, Mapping[str, Any]],
    rest: Mapping[str, Any],
    originals: Mapping[str, Any] | None = None,
) -> tuple[Skeleton, Tree, dict[str, Moving]]:
    """A model's skeleton, what stays of its parameters in a recovery and what moves.

    Args:
        model: its parameters may be abstract.
        parts: each block's parameters by its key, flat and relative to the block.
        rest: the parameters outside the blocks, flat.
        originals: see `moving.start`; keys are those of `parts`.
    """
    clips = recovered.level_clips(parts.values())

    def start(key: str | None, params: Mapping[str, Any]) -> tuple[dict[str, Any], Moving]:
        if key is None:
            return recovered.start(params)
        return recovered.start(params, None if originals is None else originals[key], clips)

    return take_apart_by(model, parts, rest, start, recovered.student)


def take_apart_by(
    model: Transformer, parts: Mapping[str, Mapping[str, Any]], rest: Mapping[str, Any], start: Start, student: Student
) -> tuple[Skeleton, Tree, dict[str, Moving]]:
    """`take_apart`, where `start` says what moves and `student` what becomes of it: `start(None, rest)` is outside the blocks."""
    still: Tree = {}
    moving: dict[str, Moving] = {}
    still[REST], moving[REST] = start(None, rest)
    runs: list[Run] = []
    blocks: list[list[tuple[Any, Any]]] = []
    previous = None
    for key, block in model.blocks.items():
        halves = start(key, parts[key])
        blockdef = nnx.split(block)[0]
        kind = (blockdef, jax.tree.structure(halves), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(halves)])
        if kind == previous:
            runs[-1] = dataclasses.replace(runs[-1], keys=(*runs[-1].keys, key))
            blocks[-1].append(halves)
        else:
            runs.append(Run((key,), blockdef))
            blocks.append([halves])
        previous = kind
    for number, members in enumerate(blocks):
        still[str(number)], moving[str(number)] = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    flat = dotted(pure_params(model))
    skeleton = Skeleton(
        nnx.split(model)[0],
        tuple((path, tuple(leaf.shape)) for path, leaf in flat.items()),
        ".".join(model.block_path),
        tuple(runs),
        student,
        model.config.head_size,
    )
    return skeleton, still, moving


def blocks_of(skeleton: Skeleton, moving: Mapping[str, Moving]) -> Iterator[tuple[str, Moving]]:
    """The moving parameters of each block, by its key, in order."""
    for number, run in enumerate(skeleton.runs):
        for index, key in enumerate(run.keys):
            yield key, jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), moving[str(number)])


def outside(skeleton: Skeleton, still: Tree, moving: Mapping[str, Moving]) -> Any:
    """The model (whose class the skeleton alone knows) with its embeddings, last norm and head; its blocks have shapes only."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in skeleton.shapes}
    return nnx.merge(skeleton.graphdef, nested({**params, **skeleton.student(still[REST], moving[REST])}))


def embed(
    skeleton: Skeleton, still: Tree, moving: Mapping[str, Moving], ids: Int[Array, "batch length"]
) -> Float[Array, "batch length hidden"]:
    """The hidden states that enter the first block, float32."""
    return outside(skeleton, still, moving).embed(ids, default_positions(ids)).astype(jnp.float32)


def forward(
    skeleton: Skeleton,
    still: Tree,
    moving: Mapping[str, Moving],
    hidden: Float[Array, "batch length hidden"],
) -> Float[Array, "batch length hidden"]:
    """The hidden states behind the last block, float32."""
    where = Positions(jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2]))
    keep = kept_bytes(skeleton, hidden.shape[0] * hidden.shape[1]) <= KEPT_BYTES
    policy = jax.checkpoint_policies.save_only_these_names(*([KEPT] if keep else []))

    def again(step: BlockStep) -> BlockStep:
        # In a loop nothing can be merged with the first computation anyway: no need for the barriers against that.
        return jax.checkpoint(step, policy=policy, prevent_cse=False)

    for number, run in enumerate(skeleton.runs):
        step = again(_block_step(skeleton, run, where))
        hidden, _ = jax.lax.scan(step, hidden, (still[str(number)], moving[str(number)]))
    return hidden


def forward_traced(
    skeleton: Skeleton,
    still: Tree,
    moving: Mapping[str, Moving],
    hidden: Float[Array, "batch length hidden"],
    where: Positions,
    *,
    attention: bool = False,
    dropout: Dropout | None = None,
) -> Traces:
    """Outputs of every block, and with `attention` the queries and keys of every block.

    With `dropout`, `hidden` loses its share too.

    What is computed is kept for the way back: it is for batches of short texts, where computing it again would cost more.
    """
    found: list[tuple[Array, ...]] = []
    if dropout is not None:
        hidden = dropped(hidden, dropout.share, dropout.key)
    for number, run in enumerate(skeleton.runs):
        share = 0.0 if dropout is None else dropout.share
        step = _block_step(skeleton, run, where, trace=True, attention=attention, dropout=share)
        keys = () if dropout is None else (jax.random.split(jax.random.fold_in(dropout.key, number), len(run.keys)),)
        hidden, traced = jax.lax.scan(step, hidden, (still[str(number)], moving[str(number)], *keys))
        found.append(traced)
    joined = [jnp.concatenate(each) if len(found) > 1 else each[0] for each in zip(*found, strict=True)]
    return Traces(*joined) if attention else Traces(joined[0], *2 * [jnp.zeros((*joined[0].shape[:3], 0, 0))])


BlockStep = Callable[[Array, tuple[Any, ...]], tuple[Array, tuple[Array, ...]]]


def dropped(x: Float[Array, "*batch k"], share: float, key: Array) -> Float[Array, "*batch k"]:
    """`x` with zeros in a share of its places, drawn by `key`, and the others multiplied by `1 / (1 - share)`."""
    # 16 bits a number are enough to draw with, and half the work of 32.
    kept = jax.random.bits(key, x.shape, jnp.uint16) >= min(round(share * 65536), 65535)
    return jnp.where(kept, x / (1 - share), 0)


def _block_step(
    skeleton: Skeleton, run: Run, where: Positions, *, trace: bool = False, attention: bool = False, dropout: float = 0.0
) -> BlockStep:
    def step(hidden: Array, halves: tuple[Any, ...]) -> tuple[Array, tuple[Array, ...]]:
        still, moving, *key = halves
        block = nnx.merge(run.blockdef, nested(skeleton.student(still, moving)))
        seen: dict[str, Array] = {}

        def see(name: str, x: Array) -> Array:
            seen[name] = x
            if dropout and name in _DROPPED:
                return dropped(x, dropout, jax.random.fold_in(key[0], _DROPPED.index(name)))
            return x

        hidden = block(hidden, where, observe=see if attention or dropout else None)[0]
        kept = (hidden, *((seen["query"], seen["key"]) if attention else ())) if trace else ()
        return hidden, kept

    return step


def kept_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Seconds that the products of all layers in all blocks take for so many tokens, in float32."""
    outputs = sum(shape[0] for path, shape in skeleton.shapes if path.startswith(skeleton.prefix + ".") and len(shape) == 2)
    return 4 * tokens * outputs
