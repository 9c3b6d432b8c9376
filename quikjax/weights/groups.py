"""The packed weight in groups along the inputs, each with a scale and a zero point of its own."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from quikjax.algorithms import codebooks, groups
from quikjax.algorithms.codebooks import MAX_BITS, MIN_BITS
from quikjax.errors import QuikError
from quikjax.pallas_kernels.reference import quantize_activations
from quikjax.weights.kernel import Kernel
from quikjax.weights.quik import check_level_clip, from_matrix

VERSION = 1

# Data fields hold arrays, but also whatever a tree map puts there (shapes, shardings, checksums), so they stay unchecked.
Leaf = Any

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupWeight(Kernel):
    """A kernel in codes of `b` bits, a scale and a zero point for each row and group of inputs. With `W` its view `[N, K]`:

        W[n, columns[i]] ~ (code_(n, i) - zero[n, i // g]) scale[n, i // g],    g = group_size

    where `columns[i]` is `i` itself if `columns` is empty, and `zero` is `2^(b-1)` if the groups are symmetric.

    Data: `codes` uint8 `[b, ceil(N K / 8)]`, the unsigned codes row by row as bit planes (`codebooks.pack`); `scale` float16
    `[N, ceil(K / g)]`; `zero` uint8 of that shape, or `[N, 0]`; `columns` int32 `[K]`, a permutation, or `[0]`.

    Static: `bits_per_code` (`b`, 3 to 8); `activation_bits` (4, 8: the input is rounded token by token, as that of a QUIK layer;
    16: it is not); `group_size`, `symmetric`, `permuted`; `shape` and `in_axes` of the array this replaces; `group`, a name
    shared by layers that read the same tensor, or `None`; `version` of this format; `level_clip`, as in `QuikWeight`.

    No kernel multiplies in this form: XLA dequantizes it.
    """

    codes: Leaf
    scale: Leaf
    zero: Leaf
    columns: Leaf
    bits_per_code: int = dataclasses.field(metadata=_STATIC)
    activation_bits: int = dataclasses.field(metadata=_STATIC)
    group_size: int = dataclasses.field(metadata=_STATIC)
    symmetric: bool = dataclasses.field(metadata=_STATIC)
    permuted: bool = dataclasses.field(metadata=_STATIC)
    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    in_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    group: str | None = dataclasses.field(metadata=_STATIC)
    version: int = dataclasses.field(default=VERSION, metadata=_STATIC)
    level_clip: tuple[int, int] | None = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def base(self) -> int:
        """`K`: every column has codes."""
        return self.inputs

    @property
    def weight_bits(self) -> int:
        """`b`."""
        return self.bits_per_code

    @property
    def label(self) -> str:
        """The format in a word: bits of weights and of activations, and the group."""
        return f"W{self.bits_per_code}A{self.activation_bits}/{self.group_size}"

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Each data field's shape and dtype."""
        n, k = self.outputs, self.inputs
        count = -(-k // self.group_size)
        return {
            "codes": ((self.bits_per_code, -(-n * k // 8)), "uint8"),
            "scale": ((n, count), "float16"),
            "zero": ((n, 0 if self.symmetric else count), "uint8"),
            "columns": ((k if self.permuted else 0,), "int32"),
        }

    def bits(self) -> int:
        """Size of everything stored, in bits: codes (whole bytes to a plane), scales, zero points, columns."""
        return sum(math.prod(shape) * 8 * jnp.dtype(dtype).itemsize for shape, dtype in self.layout().values())

    def validate(self, name: str = "weight") -> None:
        """Check the invariant above on concrete arrays.

        Raises:
            QuikError: naming `name` and the first thing that does not hold.
        """
        if self.version != VERSION:
            raise QuikError(f"{name} is in group format {self.version}; this version of quikjax reads format {VERSION}")
        if not MIN_BITS <= self.bits_per_code <= MAX_BITS or self.group_size < 1 or self.activation_bits not in (4, 8, 16):
            raise QuikError(f"{name} has {self.label}, which is no group format")
        check_level_clip(name, self.activation_bits, self.level_clip)
        for field, (shape, dtype) in self.layout().items():
            array = getattr(self, field)
            if tuple(array.shape) != shape:
                raise QuikError(f"{name}.{field} has shape {tuple(array.shape)}, expected {shape}")
            if jnp.dtype(array.dtype).name != dtype:
                raise QuikError(f"{name}.{field} has dtype {array.dtype}, expected {dtype}")
        scale = np.asarray(self.scale, np.float32)
        if not np.isfinite(scale).all() or (scale <= 0).any():
            raise QuikError(f"{name}.scale has values that are not positive and finite")
        if (np.asarray(self.zero) >= 2**self.bits_per_code).any():
            raise QuikError(f"{name}.zero has values beyond {self.bits_per_code} bits")
        if self.permuted and not np.array_equal(np.sort(np.asarray(self.columns)), np.arange(self.inputs)):
            raise QuikError(f"{name}.columns is not a permutation of the {self.inputs} input columns")

    def matrix(self) -> Float32[Array, "n k"]:
        """`W`, dequantized."""
        n, k = self.outputs, self.inputs
        codes = codebooks.unpack(jnp.asarray(self.codes), n * k).reshape(n, k).astype(jnp.float32)
        scale = groups.spread(jnp.asarray(self.scale).astype(jnp.float32), self.group_size, k)
        half = jnp.float32(2 ** (self.bits_per_code - 1))
        zero = half if self.symmetric else groups.spread(jnp.asarray(self.zero).astype(jnp.float32), self.group_size, k)
        stored = (codes - zero) * scale
        return jnp.take(stored, jnp.argsort(jnp.asarray(self.columns)), axis=1, mode="clip") if self.permuted else stored

    def rounded(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch k"]:
        """The activations that this layer multiplies by: `x`, or what token by token is left of it in `activation_bits`."""
        if self.activation_bits == 16 or self.inputs == 0:
            return x
        rows = x.reshape(-1, self.inputs).astype(jnp.float32)
        codes, scale, zero = quantize_activations(rows, self.activation_bits, self.level_clip)
        half = 2 ** (self.activation_bits - 1)
        kept = (codes.astype(jnp.float32) + half) * scale[:, None] + zero[:, None]
        return kept.reshape(x.shape).astype(x.dtype)


def dequantize(weight: GroupWeight) -> Float32[Array, "..."]:
    """The float32 kernel that a weight in groups stands for, in the shape of the array it replaced."""
    return from_matrix(weight.matrix(), weight.shape, weight.in_axes)
