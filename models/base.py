"""The parts that every family shares: the KV cache, the structure of a model, and the small layers.

A model (`Transformer`) is three steps, so that the pipeline can hold one block at a time: `embed`, then each of `blocks`, then
`head`. A `CausalLM` predicts the next token and keeps a cache; an encoder (`models.encoder`) sees the whole text. Parameter names
are the published ones, so loading is little more than a lookup by path. Weights are read with `get_value()`: each may be a dense
`[N, K]` array or a packed weight, and `linear` tells them apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models.cache import BlockCache, KeyValues
from quikjax.pallas_kernels import api
from quikjax.weights.codebook_tiles import TiledCodebook
from quikjax.weights.formats import is_packed
from quikjax.weights.linear import Produced, dense_product, linears
from quikjax.weights.panels import DensePanels
from quikjax.weights.tiled import TiledMember, TiledWeight

# Called by a block with the name of a group of layers and the tensor they all read; the block goes on with what it returns.
# This is how calibration sees a block's inside, and spares what led to a tensor that it has kept from an earlier pass. Attention
# also calls it with "query" and "key", which no layer reads: of them scores are made, which distillation compares.
Observe = Callable[[str, Array], Array]

# What layers read: a tensor, or what one is made of, for the layers to make it themselves.
Tensor = Array | Produced

PADDING = -1  # the position of a token that is not there


_C = TypeVar("_C", bound="Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A published configuration under one set of names. Families add their own fields.

    `hidden_size` is the width of the blocks (of the embedding too, but for OPT-350m). `context_length` is the longest text the
    model is meant for: the trained length, stretched where the checkpoint publishes a scaling of its positions.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    context_length: int

    @property
    def cached_layers(self) -> int:
        """How many blocks keep the keys and values of the tokens before; none of an encoder's do."""
        return self.layers

    @property
    def state_size(self) -> int:
        """How many numbers go from one block to the next for each token."""
        return self.hidden_size

    @property
    def last_position(self) -> int | None:
        """How many positions the model can tell apart at all; `None` where they are computed, so that there is no end."""
        return None

    def with_context(self: _C, length: Any) -> _C:
        """The same configuration with another `context_length`. The mathematics (stretched positions) stays as published.

        Raises:
            QuikError: it is no positive number, or the model has learned fewer positions.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise QuikError(f"the context is a number of tokens, at least 1, not {described(length)}")
        if self.last_position is not None and length > self.last_position:
            raise QuikError(
                f"a context of {length} tokens is more than the {self.last_position} positions that this model has learned"
            )
        return dataclasses.replace(self, context_length=length)


class Cache(NamedTuple):
    """Keys and values of all blocks, and which token each slot holds.

    `positions` is `PADDING` where a slot is empty or holds padding, so rows of unequal length share one cache: a query at
    position `p` sees the slots whose position is in `[0, p]`. `used` counts the slots written; new tokens go behind them.
    """

    blocks: dict[str, KeyValues]
    positions: Int32[Array, "batch slots"]
    used: Int32[Array, ""]


class Positions(NamedTuple):
    """Positions of the tokens of one call, and of the keys that they may see.

    `queries` are the positions of the call's own tokens. With a cache, `keys` are the positions that its slots hold once these
    tokens are written, and `write_at` is the slot where the first of them goes, one for all rows or one for each; without one,
    both are `None`. In a `StackedCache` slots are positions, and `keys` stays `None`.
    """

    queries: Int32[Array, "batch length"]
    keys: Int32[Array, "batch slots"] | None = None
    write_at: Int32[Array, "..."] | None = None


class Block(nnx.Module):
    """One transformer block. `groups` names, in order of execution, the layers that read the same tensor."""

    groups: ClassVar[dict[str, tuple[str, ...]]]

    @classmethod
    def decodes(cls, group: str) -> bool:
        """Whether the layers of `group` run for each token that is generated."""
        return True

    def __call__(
        self,
        hidden: Float[Array, "batch length hidden"],
        positions: Positions,
        cache: BlockCache | None = None,
        observe: Observe | None = None,
    ) -> tuple[Float[Array, "batch length hidden"], BlockCache]:
        """The block's output, and its keys and values (with a cache: the cache's, these tokens written)."""
        raise NotImplementedError


def observer(observe: Observe | None) -> Callable[[str, Tensor], Tensor]:
    """Return the function that a block calls with each group's name and tensor, which is made only if somebody observes it."""
    if observe is None:
        return lambda _group, x: x
    return lambda group, x: observe(group, x.value() if isinstance(x, Produced) else x)


class Transformer(nnx.Module):
    """A model of any family: what calibrating, quantizing, saving and planning need to know of it."""

    config: Config
    published: str | None = None  # the `config.json` this was built from, as sorted JSON text: hashable, hence static
    stops: tuple[int, ...] = ()  # ids of the tokens that end a text, as the checkpoint says; static
    block_path: ClassVar[tuple[str, ...]]  # where the blocks' parameters are, by published name

    @classmethod
    def published_names(cls, path: str) -> tuple[str, ...]:
        """The names under which checkpoints publish the parameter at `path`, the usual one first.

        The other is that of a checkpoint saved from the model without its head, which is the module called `block_path[0]`.
        """
        base = cls.block_path[0] + "."
        return (path, path.removeprefix(base)) if path.startswith(base) else (path,)

    @classmethod
    def lies_transposed(cls, path: str) -> bool:
        """Whether checkpoints hold the matrix at `path` as `[inputs, outputs]`; it is `[outputs, inputs]` here in any case."""
        return False

    @classmethod
    def repeated(cls) -> dict[str, str]:
        """Tensors that a checkpoint may hold although they are tied to a parameter, whose values they must have, by its path."""
        return {}

    @classmethod
    def is_of_other_task(cls, name: str) -> bool:
        """Whether a tensor belongs to a head that checkpoints carry along and this model does not compute."""
        return False

    @classmethod
    def stacks(cls) -> tuple[tuple[str, ...], ...]:
        """Where blocks are, in order of execution: at `block_path`, or at several places below it (encoder, then decoder)."""
        return (cls.block_path,)

    @classmethod
    def block_of(cls, path: str) -> str | None:
        """The block that the parameter at `path` is in, such as "model.layers.3"; `None` outside of blocks."""
        for stack in cls.stacks():
            inside = ".".join(stack) + "."
            number, dot, _ = path.removeprefix(inside).partition(".")
            if path.startswith(inside) and dot:
                return inside + number
        return None

    @property
    def generates(self) -> bool:
        """Whether the model makes texts, one token after the other."""
        return False

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks by their published names below `block_path` ("0", "1", ...), in order of execution."""
        found: dict[str, Block] = {}
        for stack in self.stacks():
            node: Any = self
            for name in stack:
                node = getattr(node, name)
            # Flax sorts keys as text, and "10" comes before "2" there.
            ordered = sorted(node.items(), key=lambda item: int(item[0]))
            found |= {".".join((*stack[len(self.block_path) :], number)): block for number, block in ordered}
        return found

    def embed(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"]
    ) -> Float[Array, "batch length hidden"]:
        """The hidden state that enters the first block."""
        raise NotImplementedError


class CausalLM(Transformer):
    """A language model of any family. `model(ids)` gives float32 logits `[batch, length, vocab]`."""

    @property
    def generates(self) -> bool:
        return True

    def head(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch length vocab"]:
        """float32 logits from the hidden state that leaves the last block."""
        raise NotImplementedError

    def __call__(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length vocab"]:
        """float32 logits `[batch, length, vocab]`. `positions` defaults to 0, 1, 2, ...; padding is `PADDING`.

        Raises:
            QuikError: `ids` is no array of whole numbers in two dimensions.
        """
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", None)
        if shape is None or dtype is None or len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
            given = described(ids) if shape is None else f"{dtype} of shape {tuple(shape)}"
            hint = "; one row of tokens is ids[None]" if shape is not None and len(shape) == 1 else ""
            raise QuikError(f"a model takes an array of token ids [batch, length], not {given}{hint}")
        return self.head(self.hidden(ids, positions)[0])

    def hidden(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"] | None = None
    ) -> tuple[Float[Array, "batch length hidden"], dict[str, BlockCache]]:
        """Compute the last block's output, before the head, and every block's keys and values."""
        where = Positions(default_positions(ids) if positions is None else positions)
        hidden = self.embed(ids, where.queries)
        written: dict[str, Any] = {}
        for name, block in self.blocks.items():
            hidden, written[name] = block(hidden, where)
        return hidden, written

    def prefill(
        self, ids: Int[Array, "batch length"], capacity: int, positions: Int32[Array, "batch length"] | None = None
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Read a prompt: the logits that follow each row's last token, and a cache with room for `capacity` tokens."""
        positions = default_positions(ids) if positions is None else positions
        hidden, written = self.hidden(ids, positions)
        last = jnp.argmax(positions, axis=1)
        logits = self.head(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
        room = capacity - ids.shape[1]
        blocks = jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, room), (0, 0), (0, 0))), written)
        slots = jnp.pad(positions, ((0, 0), (0, room)), constant_values=PADDING)
        return logits, Cache(blocks, slots, jnp.int32(ids.shape[1]))

    def extend(
        self, ids: Int[Array, "batch length"], positions: Int32[Array, "batch length"], cache: Cache
    ) -> tuple[Float[Array, "batch length vocab"], Cache]:
        """Read further tokens behind a cache (which must have room for them): their logits, and the cache with them in it."""
        slots = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.used))
        where = Positions(positions, slots, cache.used)
        hidden = self.embed(ids, positions)
        written: dict[str, Any] = {}
        for name, block in self.blocks.items():
            hidden, written[name] = block(hidden, where, cache.blocks[name])
        return self.head(hidden), Cache(written, slots, cache.used + ids.shape[1])


def default_positions(ids: Int[Array, "batch length"]) -> Int32[Array, "batch length"]:
    """0, 1, 2, ... in every row."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)


class Linear(nnx.Module):
    """`weight` as published, `[outputs, inputs]`, and an optional `bias`."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.zeros((outputs, inputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*batch k"] | Produced, onto: Float[Array, "*batch n"] | None = None
    ) -> Float[Array, "*batch n"]:
        """The product; `onto + product` where something is given to add it to."""
        return project(x, self, onto=onto)[0]


def project(
    x: Float[Array, "*batch k"] | Produced, *layers: Linear, onto: Float[Array, "*batch n"] | None = None
) -> list[Float[Array, "*batch n_i"]]:
    """Several layers on one input: packed ones of a group make, split and quantize it once.

    The layers of one of a block's `groups` go through here together: on a GPU they may be one product. `onto`, for one layer, is
    what its result is added to.
    """
    weights = [layer.weight.get_value() for layer in layers]
    biases = [None if layer.bias is None else layer.bias.get_value() for layer in layers]
    return linears(x, weights, biases, residual=onto)


class Embedding(nnx.Module):
    """`weight` `[entries, width]`, looked up by row."""

    def __init__(self, entries: int, width: int, *, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.zeros((entries, width), dtype))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
        table = self.weight.get_value()
        return table.rows(ids) if isinstance(table, DensePanels) else jnp.take(table, ids, axis=0, mode="clip")


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, computed in float32; without `affine`, weight 1 and bias 0."""

    def __init__(self, width: int, eps: float, *, affine: bool = True, dtype: Any) -> None:
        self.weight = nnx.Param(jnp.ones((width,), dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if affine else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return self.of(x).value()

    def of(self, x: Float[Array, "*batch width"]) -> Produced:
        """The normalized tensor, not yet computed."""
        width, affine = x.shape[-1:], (self.weight, self.bias)
        weight, bias = (
            jnp.full(width, empty, x.dtype) if parameter is None else parameter.get_value()
            for parameter, empty in zip(affine, (1, 0), strict=True)
        )
        return Produced(api.LayerNorm(self.eps), (x,), (weight, bias))


def unembed(
    hidden: Float[Array, "*batch width"], weight: Float[Array, "vocab width"] | DensePanels
) -> Float[Array, "*batch vocab"]:
    """float32 logits: `hidden @ weight^T`, accumulated in float32."""
    return dense_product(hidden, weight)


def count_parameters(params: Any) -> int:
    """Count the parameters of a tree, packed weights by the kernels that they replaced."""

    def is_kernel(leaf: Any) -> bool:
        return isinstance(leaf, TiledWeight | TiledMember | TiledCodebook) or is_packed(leaf)

    leaves = jax.tree.leaves(params, is_leaf=is_kernel)
    return sum(leaf.outputs * leaf.inputs if is_kernel(leaf) else leaf.size for leaf in leaves)
