"""The packed formats: what may take the place of a kernel array inside a parameter tree. A new one is a class and a row here."""

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import jax
from jaxtyping import Array, Float32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.weights import codebook, groups, quik, sparse
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.groups import GroupWeight
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight


class PackedFormat(Protocol):
    """The interface of every packed format: a frozen dataclass registered as a pytree, with these beside its own fields."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def in_axes(self) -> tuple[int, ...]: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def group(self) -> str | None: ...
    @property
    def weight_bits(self) -> int: ...
    @property
    def activation_bits(self) -> int: ...
    @property
    def label(self) -> str: ...

    def bits(self) -> int: ...
    def validate(self, name: str = "weight") -> None: ...


# By class name, as artifacts record it.
PACKED: dict[str, type[PackedFormat]] = {
    "QuikWeight": QuikWeight,
    "CodebookWeight": CodebookWeight,
    "SparseWeight": SparseWeight,
    "GroupWeight": GroupWeight,
}

_DEQUANTIZE: dict[type[Any], Callable[[Any], Array]] = {
    QuikWeight: quik.dequantize,
    CodebookWeight: codebook.dequantize,
    SparseWeight: sparse.dequantize,
    GroupWeight: groups.dequantize,
}

PackedWeight = QuikWeight | CodebookWeight | SparseWeight | GroupWeight
Weight = Array | PackedWeight


def is_packed(leaf: Any) -> TypeGuard[PackedWeight]:
    """Whether a leaf is a packed weight of any format. Fits `is_leaf` of JAX's tree functions."""
    return type(leaf) in _DEQUANTIZE


def dequantize(weight: PackedWeight) -> Float32[Array, "..."]:
    """The float32 kernel that a packed weight stands for, in the shape of the array it replaced.

    Raises:
        QuikError: it is no packed weight.
    """
    if not is_packed(weight):
        raise QuikError(f"a packed weight is expected ({', '.join(PACKED)}), not {described(weight)}; a tree: dequantize_params")
    return _DEQUANTIZE[type(weight)](weight)


def dequantize_params(params: Any) -> Any:
    """A parameter tree with every packed weight replaced by its float32 kernel; other leaves stay as they are."""
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_packed(leaf) else leaf, params, is_leaf=is_packed)
