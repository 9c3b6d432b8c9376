"""Layer-by-layer knowledge distillation (ZeroQuant, Yao et al., arXiv 2206.01861): a quantized block learns to give what the
original block gives, before the next one is quantized.

With `h` the hidden states that enter the block, `B` the block as published and `B_hat` the quantized one,

    minimize  mean (B(h) - B_hat(h))^2        over every weight, step size, bias and norm of the block, by Adam

`B_hat` computes as it will run: weights and activations are rounded, straight-through backwards (`weights.latent`). Codes, scales
and what is beside them change; formats, sizes and kernels do not. Memory holds one block, its gradient and the two moments.

The paper's `h` leave the original blocks before this one. Here they are those that calibration carries along, which leave the
quantized ones: no second set is kept, and the block learns on what it will read. Step sizes are learned, where the paper finds
them anew from the weights.

All follows from the settings and the hidden states, in a fixed order: a run that is killed within a block begins the block again
and ends in the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32
from pydantic import BaseModel, ConfigDict, Field

from quikjax.errors import QuikError
from quikjax.models.base import Block, Positions
from quikjax.models.registry import nested
from quikjax.quantizing.activation_store import Batch, read
from quikjax.weights import latent
from quikjax.weights.latent import Moving

# Of so many calibration sequences one is not learned from but judged on.
_ONE_IN = 8


class Distillation(BaseModel):
    """Settings of the distillation of each block. Unknown fields are refused.

    The authors' example for BERT takes 100 steps of 32 short texts at a rate of 5e-6, which suits 8 bits; weights of 4 bits have
    further to go (benchmarks/notes-accuracy.md).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1, strict=True)
    """Of the optimizer, for each block."""
    batch: int = Field(1, ge=1, strict=True)
    """Calibration batches a step, which are sequences where a checkpoint is quantized. More cost time, and no memory."""
    rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    """The largest change of a weight, bias or norm in a step."""
    step_size_rate: float = Field(1e-3, ge=0, allow_inf_nan=False)
    """The same of the logarithms of step sizes."""
    seed: int = Field(0, ge=0, strict=True)
    """Of the order in which sequences are seen."""


class DistillationStep(NamedTuple):
    """A distillation so far: `loss` on the sequences that are judged on after `step` of `steps`, over that before the first, and
    the least there was, `best`."""

    block: str
    step: int
    steps: int
    loss: float
    best: float


OnStep = Callable[[DistillationStep], None]


class Distilled(NamedTuple):
    """A distilled block's parameters, packed as before, and its loss after training over that before: 1 where nothing helped."""

    params: dict[str, Any]
    loss: float


def distil_block(
    blockdef: nnx.GraphDef[Block],
    original: Mapping[str, Any],
    packed: Mapping[str, Any],
    hidden: Sequence[Batch],
    settings: Distillation,
    *,
    name: str = "the block",
    on_step: OnStep | None = None,
) -> Distilled:
    """Train a quantized block towards the original one, and return the best that was found, the beginning included.

    Args:
        blockdef: the block's structure.
        original, packed: its parameters as published and with packed weights, flat by dotted path within the block.
        hidden: what enters the block, `[batch, length, hidden]` each. One in eight of them, at least one where there are two, is
            judged on and not learned from.
        name: the block's, for messages.
        on_step: called with every judgement, after 0 steps, after each round over the others and at the end.

    Raises:
        QuikError: a layer is packed in a format that cannot be trained, a loss is not finite, or a number has left the range of
            what it is stored in.
    """
    # What rounding chose is where training begins, also where GPTQ has moved weights further than to the next code.
    start = {
        path: latent.within_its_code(leaf, np.asarray(original[path], np.float32)) if latent.is_quantized(path, leaf) else leaf
        for path, leaf in packed.items()
    }
    device = partial(jax.tree.map, jnp.asarray)
    still, moving = device(latent.start(packed, start))
    teacher = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in original.items()}
    lessons, exam = _divided(hidden)
    losses = partial(_mean_loss, blockdef, still, teacher=teacher, batches=exam)
    first = losses(moving)
    if not np.isfinite(first):
        raise QuikError(f"{name}, or its original, gives values that are not finite, so that it cannot learn from it")
    if first == 0:  # nothing to learn
        return Distilled(dict(packed), 1.0)
    state, best, least = optimizer(settings).init(moving), moving, first
    a_round = -(-len(lessons) // settings.batch)

    def judged(step: int, loss: float) -> None:
        if on_step is not None:
            on_step(DistillationStep(name, step, settings.steps, loss / first, least / first))

    judged(0, first)
    for step, chosen in enumerate(_order(len(lessons), settings), 1):
        gradient = jax.tree.map(jnp.zeros_like, moving)
        for index in chosen:
            gradient = add_gradient(blockdef, still, moving, teacher, read(lessons[index]), gradient, jnp.float32(first))
        moving, state, finite = update(settings, moving, state, gradient)
        judging = step % a_round == 0 or step == settings.steps
        if judging:
            loss = losses(moving)
        if not bool(finite) or (judging and not np.isfinite(loss)):
            raise QuikError(
                f"the distillation of {name} has left the finite numbers at step {step} of {settings.steps}; "
                f"lower its rate ({settings.rate:g}) or step_size_rate ({settings.step_size_rate:g}) in the recipe"
            )
        if judging:
            if loss < least:
                best, least = moving, loss
            judged(step, loss)
    if least == first:
        return Distilled(dict(packed), 1.0)
    try:
        return Distilled(latent.finish(packed, still, best), least / first)
    except QuikError as problem:
        raise QuikError(f"in the distillation of {name} {problem}") from None


def optimizer(settings: Distillation) -> optax.GradientTransformation:
    """Adam (0.9, 0.999); weights and logarithms of step sizes have their own rates, which fall straight to 0 behind the last."""
    rates = {"value": settings.rate, "sigma": settings.step_size_rate}

    def by_rate(updates: optax.Updates, _params: optax.Params | None = None) -> optax.Updates:
        assert isinstance(updates, dict)
        return {path: {kind: array * -rates[kind] for kind, array in own.items()} for path, own in updates.items()}

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999),
        optax.stateless(by_rate),
        optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, settings.steps)),
    )


def block_loss(
    blockdef: nnx.GraphDef[Block],
    still: Mapping[str, Any],
    moving: Moving,
    teacher: Mapping[str, Any],
    hidden: Float[Array, "batch length hidden"],
) -> Float32[Array, ""]:
    """Mean squared error of the student block's output against the original's on `hidden`, in float32. Traceable."""
    hidden = hidden.astype(jnp.float32)
    where = Positions(jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2]))

    def run(params: Mapping[str, Any]) -> Float32[Array, "batch length hidden"]:
        return nnx.merge(blockdef, nested(dict(params)))(hidden, where)[0]

    wanted = jax.lax.stop_gradient(run(teacher))
    return jnp.mean((run(latent.student(still, moving)) - wanted) ** 2)


@partial(jax.jit, static_argnames=("blockdef",), donate_argnames=("so_far",))
def add_gradient(
    blockdef: nnx.GraphDef[Block],
    still: Mapping[str, Any],
    moving: Moving,
    teacher: Mapping[str, Any],
    hidden: Float[Array, "batch length hidden"],
    so_far: Moving,
    unit: Float32[Array, ""],
) -> Moving:
    """`so_far` and the gradient of `block_loss / unit` by what moves. The unit keeps squares of gradients in float32's range."""

    def loss(moving: Moving) -> Float32[Array, ""]:
        return block_loss(blockdef, still, moving, teacher, hidden) / unit

    return jax.tree.map(jnp.add, so_far, jax.grad(loss)(moving))


@partial(jax.jit, static_argnames=("settings",), donate_argnames=("state", "gradient"))
def update(settings: Distillation, moving: Moving, state: Any, gradient: Moving) -> tuple[Moving, Any, Bool[Array, ""]]:
    """One step of the optimizer on the sum of the gradients of a step's batches; whether all of that sum was finite."""
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)]))
    updates, state = optimizer(settings).update(jax.tree.map(lambda leaf: leaf / settings.batch, gradient), state)
    moved: Moving = optax.apply_updates(moving, updates)
    return moved, state, finite


_loss = jax.jit(block_loss, static_argnames=("blockdef",))


def _mean_loss(
    blockdef: nnx.GraphDef[Block],
    still: Mapping[str, Any],
    moving: Moving,
    *,
    teacher: Mapping[str, Any],
    batches: Sequence[Batch],
) -> float:
    return sum(float(_loss(blockdef, still, moving, teacher, read(batch))) for batch in batches) / len(batches)


def _divided(hidden: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from, and to judge on: every eighth, or the last. A single one is both."""
    if len(hidden) == 1:
        return list(hidden), list(hidden)
    held = set(range(_ONE_IN - 1, len(hidden), _ONE_IN)) or {len(hidden) - 1}
    return [batch for i, batch in enumerate(hidden) if i not in held], [hidden[i] for i in sorted(held)]


def _order(batches: int, settings: Distillation) -> np.ndarray:
    """Which batches each step sees, `[steps, batch]`: all of them in an order of the seed's, then all again in another."""
    rng, needed = np.random.default_rng(settings.seed), settings.steps * settings.batch
    rounds = [rng.permutation(batches) for _ in range(-(-needed // batches))]
    return np.concatenate(rounds)[:needed].reshape(settings.steps, settings.batch)
