"""The two halves of a quantized layer apart: rounded weights with exact activations, exact weights with rounded activations.

With `W_q` the dequantized weights of a layer and `x_q` what it reads, as it rounds it, the layer gives

    both          x_q W_q^T
    weights       x W_q^T
    activations   x_q W^T

so that what each of them breaks can be seen by itself (arXiv 2301.12017; the failure of decoders at 4 bits).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.formats import PackedWeight, is_packed
from quikjax.weights.groups import GroupWeight
from quikjax.weights.linear import Trained, linear
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight

Part = Literal["both", "weights", "activations"]
PARTS: tuple[Part, ...] = ("both", "weights", "activations")


def rounded_activations(x: Float[Array, "*batch k"], weight: PackedWeight) -> Float32[Array, "*batch k"]:
    """The activations that a packed layer multiplies by: base columns rounded to its bits, outliers as they are.

    Read off the layer itself, with the identity in place of its codes, so that no second account of its rounding is kept here.
    """
    if isinstance(weight, SparseWeight):
        weight = weight.expanded()
    base, x = weight.base, x.astype(jnp.float32)
    if isinstance(weight, GroupWeight):
        return weight.rounded(x)
    if isinstance(weight, CodebookWeight) or base == 0:
        return x
    # In a device's form a weight does not say this; taking its activations for exact would be a wrong number.
    assert isinstance(weight, QuikWeight), type(weight)
    if weight.activation_bits == 16:
        return x
    identity = dataclasses.replace(
        weight,
        qweight=jnp.eye(base, dtype=jnp.int8),
        scale=jnp.ones(base, jnp.float32),
        reduced=jnp.ones(base, jnp.float32),
        outliers=jnp.zeros((base, weight.inputs - base), weight.outliers.dtype),
        weight_bits=8,
        shape=(base, weight.inputs),
        in_axes=(1,),
    )
    return x.at[..., weight.columns[:base]].set(linear(x, identity))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedInput(Trained):
    """A dense `kernel` `[N, K]` that multiplies activations as the packed weight `reader`, of the same shape, rounds them.

    In float32: what is rounded stands for codes times their scale, exactly.
    """

    kernel: Any
    reader: Any
    group: str | None = dataclasses.field(default=None, metadata={"static": True})

    def products(
        self, x: Float[Array, "*batch k"], weights: Sequence[Any], biases: Sequence[Float[Array, " _"] | None]
    ) -> list[Float[Array, "*batch _"]]:
        """See `Trained`; without a `group`, each layer is alone."""
        (weight,), (bias,) = weights, biases
        y = linear(rounded_activations(x, weight.reader), weight.kernel.astype(jnp.float32))
        return [(y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)]


def rounds_activations(weight: PackedWeight) -> bool:
    """Whether a packed layer reads its input in fewer than 16 bits."""
    return weight.activation_bits < 16


def only(part: Part, packed: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path in which, of every packed layer, one part is quantized: its weights, its activations, or both.

    Args:
        packed: the quantized model's parameters.
        dense: the original's.
    """

    def changed(path: str, leaf: Any) -> Any:
        if part == "both" or not is_packed(leaf):
            return leaf
        if part == "activations":
            return RoundedInput(kernel=dense[path], reader=leaf) if rounds_activations(leaf) else dense[path]
        if isinstance(leaf, QuikWeight | SparseWeight | GroupWeight):
            return dataclasses.replace(leaf, activation_bits=16, level_clip=None)
        return leaf  # a codebook's activations are exact

    return {path: changed(path, leaf) for path, leaf in packed.items()}
