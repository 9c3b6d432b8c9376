"""The lessons of a recovery by kind of model: a language model learns the original's predictions, an encoder its hidden states.

A lesson is a value without arrays, hashable, so that programs are compiled by it.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from quikjax.evaluation import Reference, evaluate
from quikjax.models.base import Positions, default_positions
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.texts import framed
from quikjax.training import blocks, distill
from quikjax.training.blocks import REST, Skeleton, Tree
from quikjax.training.moving import Moving
from quikjax.training.settings import RecoverySettings, cut

# Held-out windows of an encoder that are embedded at once.
_ROWS = 32

Windows = Int32[np.ndarray, "windows length"]
HeldOut = Int32[np.ndarray, "validation length"]


@runtime_checkable
class Lesson(Protocol):
    """The lesson of one kind of model.

    `measure`: the figure that decides which step is the best. `repeats`: the teacher's side of a window that is seen again is
    kept, and not made again.
    """

    measure: ClassVar[str]
    repeats: ClassVar[bool]

    def __hash__(self) -> int: ...

    def cut(self, tokenizer: Any, tokens: Int32[np.ndarray, " tokens"], settings: RecoverySettings) -> tuple[Windows, HeldOut]:
        """Windows to train on and to choose on, as the model reads them.

        Raises:
            QuikError: the text is too short.
        """
        ...

    def taught(self, skeleton: Skeleton, still: Tree, ids: Int[Array, "batch length"]) -> Float32[Array, "batch ..."]:
        """The teacher's side of windows. Traceable."""
        ...

    def loss_and_gradients(
        self,
        skeletons: tuple[Skeleton, Skeleton],
        still: Tree,
        moved: Mapping[str, Moving],
        teacher_still: Tree,
        ids: Int[Array, "batch length"],
        taught: Float32[Array, "batch ..."],
    ) -> tuple[Float32[Array, ""], dict[str, Moving]]:
        """The loss over all tokens, and its gradient by everything that moves. Traceable."""
        ...

    def figures(
        self, model: Any, original_rest: Mapping[str, Any], windows: Windows, taught: list[np.ndarray]
    ) -> dict[str, float]:
        """Figures of a model as it will be stored, through the integer path; the lower, the better, `measure` first.

        Args:
            model: the student.
            original_rest: the original's parameters outside the blocks, flat, and nothing else.
            windows: what it is measured on; `taught`, the teacher's side of each.
        """
        ...


def _nothing(skeleton: Skeleton) -> dict[str, Any]:
    """Of a teacher nothing moves."""
    return {REST: {}, **{str(number): {} for number in range(len(skeleton.runs))}}


@dataclasses.dataclass(frozen=True)
class NextTokens:
    """The mean KL divergence from teacher to student of next-token distributions over the whole vocabulary, in nats."""

    measure: ClassVar[str] = "kl"
    repeats: ClassVar[bool] = True

    def cut(self, tokenizer: Any, tokens: Int32[np.ndarray, " tokens"], settings: RecoverySettings) -> tuple[Windows, HeldOut]:
        """See `Lesson`."""
        del tokenizer
        return cut(tokens, settings)

    def taught(self, skeleton: Skeleton, still: Tree, ids: Int[Array, "batch length"]) -> Float32[Array, "batch length hidden"]:
        """The output of the teacher's last block; its head is applied chunk by chunk."""
        nothing = _nothing(skeleton)
        return blocks.forward(skeleton, still, nothing, blocks.embed(skeleton, still, nothing, ids))

    def loss_and_gradients(
        self,
        skeletons: tuple[Skeleton, Skeleton],
        still: Tree,
        moved: Mapping[str, Moving],
        teacher_still: Tree,
        ids: Int[Array, "batch length"],
        taught: Float32[Array, "batch length hidden"],
    ) -> tuple[Float32[Array, ""], dict[str, Moving]]:
        """See `Lesson`."""
        skeleton, teacher_skeleton = skeletons
        in_blocks = {part: own for part, own in moved.items() if part != REST}
        hidden, back = jax.vjp(
            lambda in_blocks: blocks.forward(
                skeleton, still, {**in_blocks, REST: moved[REST]}, blocks.embed(skeleton, still, moved, ids)
            ),
            in_blocks,
        )

        def head(rest: Moving, rows: Array) -> Array:
            return blocks.outside(skeleton, still, {REST: rest}).head(rows[None])[0]

        def teacher_head(rows: Array) -> Array:
            return blocks.outside(teacher_skeleton, teacher_still, {REST: {}}).head(rows[None])[0]

        loss, d_rest, d_hidden = distill.kl_and_gradients(head, moved[REST], hidden, teacher_head, taught)
        return loss, {**back(d_hidden)[0], REST: d_rest}

    def figures(
        self, model: Any, original_rest: Mapping[str, Any], windows: Windows, taught: list[np.ndarray]
    ) -> dict[str, float]:
        """KL, and the student's perplexity."""
        # Only the teacher's head is needed, beside its hidden states: the blocks under it may be anybody's.
        theirs = nnx.merge(nnx.split(model)[0], nested({**dotted(pure_params(model)), **original_rest}))
        found = evaluate(model, windows, Reference(theirs, taught))
        assert found.kl is not None
        return {"kl": found.kl, "perplexity": found.perplexity}


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """The distance of what leaves each of an encoder's blocks, all tokens alike:

    L = mean_l E_l + E_last,  E_l = sum |s_l - t_l|^2 / sum |t_l|^2 over the tokens of a step

    with `s` the student's and `t` the teacher's. Everything that an encoder is used for is made of its last hidden states, which
    count twice; those below keep the student on the teacher's way. What decides is `1 - cos` of mean-pooled embeddings.
    """

    measure: ClassVar[str] = "distance"
    # Every block's are many times the last one's, and the forward pass they come from is a small part of a step.
    repeats: ClassVar[bool] = False

    def cut(self, tokenizer: Any, tokens: Int32[np.ndarray, " tokens"], settings: RecoverySettings) -> tuple[Windows, HeldOut]:
        """Each window is a whole text, with what the tokenizer puts around one within its length."""
        frame = framed(tokenizer, "a")
        found = cut(tokens, settings.model_copy(update={"seqlen": frame.room(settings.seqlen)}))
        return frame.around(found[0]), frame.around(found[1])

    def taught(
        self, skeleton: Skeleton, still: Tree, ids: Int[Array, "batch length"]
    ) -> Float32[Array, "batch blocks length hidden"]:
        """The outputs of all of the teacher's blocks."""
        return jnp.moveaxis(_hidden_states(skeleton, still, _nothing(skeleton), ids), 0, 1)

    def loss_and_gradients(
        self,
        skeletons: tuple[Skeleton, Skeleton],
        still: Tree,
        moved: Mapping[str, Moving],
        teacher_still: Tree,
        ids: Int[Array, "batch length"],
        taught: Float32[Array, "batch blocks length hidden"],
    ) -> tuple[Float32[Array, ""], dict[str, Moving]]:
        """See `Lesson`."""
        del teacher_still
        theirs = jnp.moveaxis(taught, 1, 0)

        def loss(moved: Mapping[str, Moving]) -> Array:
            mine = _hidden_states(skeletons[0], still, moved, ids)
            each = jnp.sum((mine - theirs) ** 2, axis=(1, 2, 3)) / jnp.sum(theirs**2, axis=(1, 2, 3))
            return jnp.mean(each) + each[-1]

        value, gradient = jax.value_and_grad(loss)(dict(moved))
        return value, gradient

    def figures(
        self, model: Any, original_rest: Mapping[str, Any], windows: Windows, taught: list[np.ndarray]
    ) -> dict[str, float]:
        """The mean of `1 - cos`, and `E_last`."""
        del original_rest
        graphdef, params = nnx.split(model)
        distance = error = squares = 0.0
        for at in range(0, len(windows), _ROWS):
            # The last rows repeat one another, so that one program is compiled.
            rows = np.resize(windows[at : at + _ROWS], (min(_ROWS, len(windows)), windows.shape[1]))
            mine = np.asarray(_encode(graphdef, params, jnp.asarray(rows)), np.float64)
            for hidden, blocks_of_one in zip(mine, taught[at : at + _ROWS], strict=False):
                target = blocks_of_one[-1].astype(np.float64)
                a, b = hidden.mean(axis=0), target.mean(axis=0)
                distance += 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
                error, squares = error + np.sum((hidden - target) ** 2), squares + np.sum(target**2)
        return {"distance": float(distance / len(windows)), "error": float(error / squares)}


def _hidden_states(
    skeleton: Skeleton, still: Tree, moved: Mapping[str, Moving], ids: Int[Array, "batch length"]
) -> Float[Array, "blocks batch length hidden"]:
    where = Positions(default_positions(ids))
    return blocks.forward_traced(skeleton, still, moved, blocks.embed(skeleton, still, moved, ids), where).hidden


@partial(jax.jit, static_argnums=0)
def _encode(graphdef: Any, params: Any, ids: Int[Array, "batch length"]) -> Float32[Array, "batch length hidden"]:
    return nnx.merge(graphdef, params).encode(ids).astype(jnp.float32)
