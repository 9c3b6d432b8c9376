"""The packed weight in QUIK format whose base codes are 2:4 sparse: half of them stored."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from quikjax.algorithms.pruning import KEPT
from quikjax.algorithms.sparsegpt import GROUP, PLACES, compress, decompress, read_places
from quikjax.errors import QuikError
from quikjax.weights import quik
from quikjax.weights.kernel import Kernel
from quikjax.weights.quik import QuikWeight

VERSION = 1

# Data fields hold arrays, but also whatever a tree map puts there (shapes, shardings, checksums), so they stay unchecked.
Leaf = Any

_STATIC = {"static": True}
# Said wherever a person decides on sparse weights: `plan`, `report` and its page.
EXPANDED = (
    "2:4 sparse codes take half the codes and two bits a kept one on disk; no kernel multiplies them, so they are expanded on "
    "the device and save neither memory nor time there"
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseWeight(Kernel):
    """A `QuikWeight` at least half of whose codes are zero, two of every four base columns side by side, in each row:

        qweight[n, 4 g + place(n, 2 g + i)] = kept[n, 2 g + i],   i = 0, 1;    the other two of the four are 0

    with `qweight` that of the `QuikWeight` which this stands for (`expanded`), everything else as there. "Side by side" is in the
    order of `columns`, in which the pattern was chosen.

    Data: `kept` int4 or int8 `[N, B/2]`; `places` uint8 `[N, ceil(B/8)]`, two bits for each kept code from the lowest up, the
    first of two places below the second; `scale`, `reduced`, `outliers`, `columns` as in `QuikWeight`.

    Static: as in `QuikWeight`; `base`, a multiple of 4.

    No kernel multiplies in this form: a layer's codes are expanded before it, and all of a model's when it is put on a device.
    """

    kept: Leaf
    places: Leaf
    scale: Leaf
    reduced: Leaf
    outliers: Leaf
    columns: Leaf
    weight_bits: int = dataclasses.field(metadata=_STATIC)
    activation_bits: int = dataclasses.field(metadata=_STATIC)
    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    in_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    base: int = dataclasses.field(metadata=_STATIC)
    group: str | None = dataclasses.field(metadata=_STATIC)
    version: int = dataclasses.field(default=VERSION, metadata=_STATIC)
    level_clip: tuple[int, int] | None = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def label(self) -> str:
        """The format in a word: bits of weights and of activations, and the sparsity."""
        return f"W{self.weight_bits}A{self.activation_bits} 2:4"

    def bits(self) -> int:
        """Size of everything stored, in bits: kept codes, their places, outliers, scale, reduced, columns."""
        n, k, o = self.outputs, self.inputs, self.inputs - self.base
        codes = n * (self.base // 2 * self.weight_bits + 8 * -(-self.base // 8))
        return codes + n * o * 16 + 2 * n * 32 + k * 32

    def expanded(self) -> QuikWeight:
        """The `QuikWeight` that this stands for, every zero written out. Under `jit`, or by itself."""
        kept = jnp.asarray(self.kept).astype(jnp.int8)
        return self._quik(decompress(kept, jnp.asarray(self.places)).astype(self.kept.dtype))

    def validate(self, name: str = "weight") -> None:
        """Check the invariant above on concrete arrays.

        Raises:
            QuikError: naming `name` and the first thing that does not hold.
        """
        if self.version != VERSION:
            raise QuikError(f"{name} is in sparse format {self.version}; this version of quikjax reads format {VERSION}")
        n, half = self.outputs, self.base // GROUP * KEPT
        if self.base % GROUP:
            raise QuikError(f"{name} has {self.base} base columns, which is no multiple of {GROUP}")
        expected = {
            "kept": ((n, half), "int4" if self.weight_bits == 4 else "int8"),
            "places": ((n, -(-half // PLACES)), "uint8"),
        }
        for field, (shape, dtype) in expected.items():
            array = getattr(self, field)
            if tuple(array.shape) != shape or array.dtype.name != dtype:
                raise QuikError(f"{name}.{field} is {array.dtype} {tuple(array.shape)}, expected {dtype} {shape}")
        pairs = np.asarray(read_places(jnp.asarray(self.places), half)).reshape(n, half // KEPT, KEPT)
        if (pairs[..., 0] >= pairs[..., 1]).any():
            raise QuikError(f"{name}.places are not two ascending places of every four")
        self.expanded().validate(name)

    def _quik(self, qweight: Leaf) -> QuikWeight:
        return QuikWeight(
            qweight=qweight,
            scale=self.scale,
            reduced=self.reduced,
            outliers=self.outliers,
            columns=self.columns,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            shape=self.shape,
            in_axes=self.in_axes,
            base=self.base,
            group=self.group,
            level_clip=self.level_clip,
        )


def sparse(weight: QuikWeight) -> SparseWeight:
    """A weight whose codes are 2:4 sparse in the order of its columns, stored in half.

    Raises:
        ValueError: they are not.
    """
    codes = weight.qweight.astype(jnp.int8)
    if weight.base % GROUP or bool(jnp.any(jnp.sum(codes.reshape(codes.shape[0], -1, GROUP) != 0, axis=2) > KEPT)):
        raise ValueError("the codes are not 2:4 sparse")
    kept, places = compress(codes)
    return SparseWeight(
        kept=kept.astype(weight.qweight.dtype),
        places=places,
        scale=weight.scale,
        reduced=weight.reduced,
        outliers=weight.outliers,
        columns=weight.columns,
        weight_bits=weight.weight_bits,
        activation_bits=weight.activation_bits,
        shape=weight.shape,
        in_axes=weight.in_axes,
        base=weight.base,
        group=weight.group,
        level_clip=weight.level_clip,
    )


def dequantize(weight: SparseWeight) -> Float32[Array, "..."]:
    """The float32 kernel that a sparse weight stands for, in the shape of the array it replaced."""
    return quik.dequantize(weight.expanded())
