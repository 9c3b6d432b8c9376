"""Transformer blocks one after the other in one compiled loop, differentiable with little memory, for any model of ours.

Equal blocks that follow each other are stacked and scanned, so that one is compiled whatever the depth. Backwards each block is
computed again from what entered it (`jax.checkpoint`); the layers' products are kept from the first time while all of them
together take at most `KEPT_BYTES`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from quikjax.models.base import Block, CausalLM, Positions, default_positions
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.training import moving as parameters
from quikjax.training.moving import Moving
from quikjax.weights.linear import KEPT

# Which program is compiled, and so the bits of a gradient, must not depend on how much room there is.
KEPT_BYTES = 1 << 31


@dataclasses.dataclass(frozen=True)
class Run:
    """Blocks of equal structure that follow each other: their keys, and one block without parameters."""

    keys: tuple[str, ...]
    blockdef: nnx.GraphDef[Block]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without parameters, its blocks in runs: hashable, so that JAX compiles by it.

    Its arrays are beside it, `Tree`s of what stays and of what moves: under `rest` what is in no block, under the number of a run
    its blocks' arrays, stacked.
    """

    graphdef: nnx.GraphDef[CausalLM]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of every parameter
    prefix: str
    runs: tuple[Run, ...]


Tree = dict[str, dict[str, Any]]
REST = "rest"


def take_apart(
    model: CausalLM, parts: Mapping[str, Mapping[str, Any]], rest: Mapping[str, Any], originals: Mapping[str, Any] | None = None
) -> tuple[Skeleton, Tree, dict[str, Moving]]:
    """A model's skeleton, what stays of its parameters and what moves.

    Args:
        model: its parameters may be abstract.
        parts: each block's parameters by its key, flat and relative to the block.
        rest: the parameters outside the blocks, flat.
        originals: see `moving.start`; keys are those of `parts`.
    """
    still: Tree = {}
    moving: dict[str, Moving] = {}
    still[REST], moving[REST] = parameters.start(rest)
    runs: list[Run] = []
    blocks: list[list[tuple[Any, Any]]] = []
    previous = None
    clips = parameters.level_clips(parts.values())
    for key, block in model.blocks.items():
        halves = parameters.start(parts[key], None if originals is None else originals[key], clips)
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
    )
    return skeleton, still, moving


def blocks_of(skeleton: Skeleton, moving: Mapping[str, Moving]) -> Iterator[tuple[str, Moving]]:
    """The moving parameters of each block, by its key, in order."""
    for number, run in enumerate(skeleton.runs):
        for index, key in enumerate(run.keys):
            yield key, jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), moving[str(number)])


def outside(skeleton: Skeleton, still: Tree, moving: Mapping[str, Moving]) -> CausalLM:
    """The model with its embeddings, last norm and head; its blocks have shapes only."""
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in skeleton.shapes}
    return nnx.merge(skeleton.graphdef, nested({**params, **parameters.student(still[REST], moving[REST])}))


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
    for number, run in enumerate(skeleton.runs):
        step = _block_step(run.blockdef, where, policy)
        hidden, _ = jax.lax.scan(step, hidden, (still[str(number)], moving[str(number)]))
    return hidden


def _block_step(blockdef: nnx.GraphDef[Block], where: Positions, policy: Callable[..., bool]) -> Callable[..., Any]:
    # In a loop nothing can be merged with the first computation anyway: no need for the barriers against that.
    def step(hidden: Array, halves: tuple[Any, Any]) -> tuple[Array, None]:
        block = nnx.merge(blockdef, nested(parameters.student(*halves)))
        return block(hidden, where)[0], None

    return jax.checkpoint(step, policy=policy, prevent_cse=False)


def kept_bytes(skeleton: Skeleton, tokens: int) -> int:
    """Seconds that the products of all layers in all blocks take for so many tokens, in float32."""
    outputs = sum(shape[0] for path, shape in skeleton.shapes if path.startswith(skeleton.prefix + ".") and len(shape) == 2)
    return 4 * tokens * outputs
