"""One linear layer for every kind of weight, dispatched on the leaf's type."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from quikjax.pallas_kernels import api
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.codebook_tiles import TiledCodebook, codebook_choice, kernel_product
from quikjax.weights.formats import PackedWeight, Weight
from quikjax.weights.groups import GroupWeight
from quikjax.weights.panels import DensePanels
from quikjax.weights.panels import products as paneled_products
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight
from quikjax.weights.tiled import TiledMember, TiledWeight, own_biases, packed


@dataclasses.dataclass(frozen=True)
class Produced:
    """A tensor that is not there yet: `producer(*inputs, *parameters)`, a norm, a gate or an activation.

    Packed layers that read it compute it in the kernel that splits it, where that kernel can; others read its `value`.
    """

    producer: api.Producer
    inputs: tuple[Float[Array, "..."], ...]
    parameters: tuple[Float[Array, " k"], ...] = ()

    def value(self) -> Float[Array, "..."]:
        """The tensor, in the dtype of the inputs."""
        return self.producer(*self.inputs, *self.parameters)


# The name (`jax.ad_checkpoint.checkpoint_name`) of what a block computes dearly, for those who differentiate it and choose what
# is kept for the way back: the products of layers in training, and what attention mixes.
KEPT = "kept"


class Trained(abc.ABC):
    """A weight in training: a pytree node in the place of a kernel that multiplies by itself, differentiably.

    `group`: a name shared by layers that read the same tensor and prepare it once, or `None`.
    """

    group: str | None

    @abc.abstractmethod
    def products(
        self, x: Float[Array, "*batch k"], weights: "Sequence[Any]", biases: Sequence[Float[Array, " _"] | None]
    ) -> list[Float[Array, "*batch _"]]:
        """`x W^T + bias` for each of `weights`, which share this one's class and group (it is the first), in the dtype of `x`."""


def linear(
    x: Float[Array, "..."] | Produced,
    weight: Weight | TiledWeight | TiledCodebook | DensePanels | Trained,
    bias: Float[Array, "..."] | None = None,
    backend: str | None = None,
    residual: Float[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """`y = x W^T + bias`, in the dtype of `x`, and added to a `residual` where one is given.

    A dense `weight` is `[N, K]` (outputs, inputs) and multiplies in its promoted dtype with float32 accumulation. A
    `QuikWeight` may stand for a kernel with several axes: `x` ends in its `in_shape`, the result in its `out_shape`. It runs on
    the first backend that can (`pallas_kernels.choice`), or on the one named. So may a `CodebookWeight` or a `GroupWeight`,
    which XLA dequantizes when its turn comes where no kernel reads it, and a `SparseWeight`, whose codes are expanded to those of
    a `QuikWeight` first.

    Raises:
        BackendError: the named backend cannot run this layer.
    """
    return linears(x, [weight], [bias], backend, residual)[0]


def linears(
    x: Float[Array, "..."] | Produced,
    weights: Sequence[Weight | TiledWeight | TiledMember | TiledCodebook | DensePanels | Trained],
    biases: Sequence[Float[Array, "..."] | None],
    backend: str | None = None,
    residual: Float[Array, "..."] | None = None,
) -> list[Float[Array, "..."]]:
    """Several layers that read the same `x`: those of one `group` share one split and one quantized activation.

    A `residual` is what the result of a single layer is added to: `residual + y`, which a kernel that has `y` can do for nothing.

    Raises:
        BackendError: the named backend cannot run one of the layers.
        ValueError: some layers of a joined group are missing.
    """
    if residual is not None:
        (weight,), (bias,) = weights, biases
        if isinstance(weight, QuikWeight | TiledWeight) and residual.dtype == _dtype(x):
            produced = x if isinstance(x, Produced) else Produced(api.Identity(), (x,))
            return _quik(produced, [weight], [bias], backend, residual)
        return [residual + linears(x, [weight], [bias], backend)[0]]
    produced = x if isinstance(x, Produced) else Produced(api.Identity(), (x,))
    made = functools.cache(produced.value)  # once, however many dense layers read it
    results: dict[int, Float[Array, "..."]] = {}
    groups: dict[Any, list[int]] = {}
    trained: dict[Any, list[int]] = {}
    readable = [weight.expanded() if isinstance(weight, SparseWeight) else weight for weight in weights]
    for i, (weight, bias) in enumerate(zip(readable, biases, strict=True)):
        if isinstance(weight, Trained):
            trained.setdefault((type(weight), weight.group if weight.group is not None else i), []).append(i)
        elif isinstance(weight, QuikWeight | TiledWeight | TiledMember):
            shared = weight.group if weight.group is not None else ("alone", i)
            groups.setdefault((shared, weight.base, weight.activation_bits, weight.level_clip, weight.in_shape), []).append(i)
        elif isinstance(weight, CodebookWeight | GroupWeight | TiledCodebook):
            results[i] = _dequantized(made(), weight, bias, backend)
        elif not isinstance(weight, DensePanels):
            results[i] = _finished(dense_product(made(), weight), bias, made().dtype)
    if paneled := [i for i, weight in enumerate(readable) if isinstance(weight, DensePanels)]:
        matrices = [weight for weight in readable if isinstance(weight, DensePanels)]
        for i, y in zip(paneled, paneled_products(made(), matrices), strict=True):
            results[i] = _finished(y, biases[i], made().dtype)
    for members in trained.values():
        first: Any = readable[members[0]]
        products = first.products(made(), [readable[i] for i in members], [biases[i] for i in members])
        results.update(zip(members, products, strict=True))
    for members in groups.values():
        quantized = [weight for i in members if isinstance(weight := readable[i], QuikWeight | TiledWeight | TiledMember)]
        for i, y in zip(members, _quik(produced, quantized, [biases[i] for i in members], backend), strict=True):
            results[i] = y
    return [results[i] for i in range(len(weights))]


def explain(
    weight: PackedWeight | TiledWeight | TiledCodebook,
    rows: int,
    dtype: Any,
    backend: str | None = None,
    device: api.Device | None = None,
) -> api.Choice:
    """Name the backend that multiplies `rows` tokens of `dtype` by a packed weight on this device (or another), and say why.

    Needs shapes only: the weight's fields may be `ShapeDtypeStruct`s.

    Raises:
        BackendError: the named backend cannot run this layer.
    """
    if isinstance(weight, CodebookWeight | TiledCodebook):
        return codebook_choice(weight, rows, dtype, backend, device)
    if isinstance(weight, GroupWeight):
        return dequantized_choice(backend)
    read = jax.eval_shape(SparseWeight.expanded, weight) if isinstance(weight, SparseWeight) else weight
    return api.explain(rows, packed(read), weight.activation_bits, dtype, backend=backend, device=device)


def dequantized_choice(backend: str | None = None) -> api.Choice:
    """The only way there is to multiply by weights in groups: XLA dequantizes them.

    Raises:
        BackendError: another backend is named.
    """
    refused = dict.fromkeys((name for name in api.BACKENDS if name != "xla"), "it has no kernel for weights in groups")
    if backend is not None and backend != "xla":
        raise api.BackendError(f"{backend} cannot run weights in groups: {refused.get(backend, 'there is no such backend')}")
    return api.Choice("xla", "weights in groups are dequantized and multiplied by XLA", refused)


def _finished(y: Float32[Array, "..."], bias: Float[Array, "..."] | None, dtype: Any) -> Float[Array, "..."]:
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


_Dequantized = CodebookWeight | GroupWeight | TiledCodebook


@functools.partial(jax.jit, static_argnames="backend", inline=True)
def _dequantized(
    x: Float[Array, "..."], weight: _Dequantized, bias: Float[Array, "..."] | None, backend: str | None
) -> Float[Array, "..."]:
    batch = _batch_shape(x.shape, weight.in_shape)
    rows = x.reshape(*batch, weight.inputs)
    flat = None if bias is None else bias.reshape(-1).astype(jnp.float32)
    if explain(weight, math.prod(batch), x.dtype, backend).backend == "mosaic":
        assert not isinstance(weight, GroupWeight)
        return kernel_product(rows, weight, flat).reshape(*batch, *weight.out_shape)
    y = jax.lax.platform_dependent(_as_multiplied(rows, weight), weight, cpu=_multiply_in_turn, default=_multiply_behind_barrier)
    return (y if flat is None else y + flat).astype(x.dtype).reshape(*batch, *weight.out_shape)


def _as_multiplied(x: Float[Array, "*batch k"], weight: _Dequantized) -> Float[Array, "*batch k"]:
    return weight.rounded(x) if isinstance(weight, GroupWeight) else x


# Dense weights must not be made before `x` is there: XLA would else move what does not depend on it out of a loop over tokens, or
# to the beginning, and hold every layer's at once. On a GPU a barrier is enough. On a CPU XLA drops barriers before it schedules,
# so there the product is a branch: a product with nothing but zeros is zeros, and whether there is anything else is known only
# when `x` is. (On a GPU a branch would wait for the host.)
def _multiply_in_turn(x: Float[Array, "*batch k"], weight: _Dequantized) -> Float[Array, "*batch n"]:
    def zeros(x: Float[Array, "*batch k"], weight: _Dequantized) -> Float[Array, "*batch n"]:
        return jnp.zeros((*x.shape[:-1], weight.outputs), jnp.float32)

    return jax.lax.cond(jnp.any(x != 0), _multiply, zeros, x, weight)


def _multiply_behind_barrier(x: Float[Array, "*batch k"], weight: _Dequantized) -> Float[Array, "*batch n"]:
    return _multiply(*jax.lax.optimization_barrier((x, weight)))


def _multiply(x: Float[Array, "*batch k"], weight: _Dequantized) -> Float[Array, "*batch n"]:
    return dense_product(x, weight.matrix().astype(x.dtype))


def _batch_shape(shape: tuple[int, ...], in_shape: tuple[int, ...]) -> tuple[int, ...]:
    batch = shape[: len(shape) - len(in_shape)]
    if shape[len(batch) :] != in_shape:
        raise ValueError(f"x ends in {shape[len(batch) :]}, the weight reads {in_shape}")
    return batch


def dense_product(x: Float[Array, "*batch k"], weight: Float[Array, "n k"] | DensePanels) -> Float32[Array, "*batch n"]:
    """`x W^T`, accumulated in float32: in the dtype of `x`, or in float32 where `x` is of 16 bits and the weight was widened."""
    if isinstance(weight, DensePanels):
        return paneled_products(x, [weight])[0]
    dtype = jnp.promote_types(x.dtype, weight.dtype) if weight.dtype == jnp.float32 else x.dtype
    x, weight = x.astype(dtype), weight.astype(dtype)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _quik(
    x: Produced,
    weights: Sequence[QuikWeight | TiledWeight | TiledMember],
    biases: Sequence[Float[Array, "..."] | None],
    backend: str | None,
    residual: Float[Array, "..."] | None = None,
) -> list[Float[Array, "..."]]:
    first = weights[0]
    batch = _batch_shape(x.inputs[0].shape, first.in_shape)
    order = _order(weights)
    results = api.linears(
        tuple(tensor.reshape(*batch, first.inputs) for tensor in x.inputs),
        [packed(weight) for i in order if not isinstance(weight := weights[i], TiledMember)],
        own_biases([weights[i] for i in order], [biases[i] for i in order]),
        first.activation_bits,
        producer=x.producer,
        parameters=tuple(parameter.reshape(-1) for parameter in x.parameters),
        residual=None if residual is None else residual.reshape(*batch, first.outputs),
        backend=backend,
    )
    found = dict(zip(order, results, strict=True))
    return [found[i].reshape(*batch, *weight.out_shape) for i, weight in enumerate(weights)]


def _order(weights: Sequence[QuikWeight | TiledWeight | TiledMember]) -> list[int]:
    """Numbers of the weights, each joined one followed by its members in their order."""
    members = {weight.number: i for i, weight in enumerate(weights) if isinstance(weight, TiledMember)}
    wanted = next((len(w.tiles.members) for w in weights if isinstance(w, TiledWeight) and isinstance(w.tiles, api.Joined)), 1)
    if sorted(members) != list(range(1, wanted)):
        raise ValueError(
            f"the layers of the group {weights[0].group!r} were joined for this device, and are multiplied together: "
            "give all of them to one call of linears or project"
        )
    order = []
    for i, weight in enumerate(weights):
        if not isinstance(weight, TiledMember):
            order.append(i)
            if isinstance(weight, TiledWeight) and isinstance(weight.tiles, api.Joined):
                order += [members[number] for number in range(1, wanted)]
    return order


def _dtype(x: Float[Array, "..."] | Produced) -> Any:
    return x.inputs[0].dtype if isinstance(x, Produced) else x.dtype
