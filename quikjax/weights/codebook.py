"""The packed weight of k bits with a codebook: block-wise data types, weights only."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from quikjax.algorithms import codebooks
from quikjax.algorithms.codebooks import DOUBLE_BLOCK, MAX_BITS, MIN_BITS, DataType
from quikjax.errors import QuikError
from quikjax.weights.kernel import Kernel
from quikjax.weights.quik import from_matrix

VERSION = 1

AbsmaxFormat = Literal["float16", "float32", "double"]

# Data fields hold arrays, but also whatever a tree map puts there (shapes, shardings, checksums), so they stay unchecked.
Leaf = Any


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookWeight(Kernel):
    """A kernel in a data type of k bits. With `W` its matrix view `[N, K]` (outputs, inputs), `columns` its outlier columns and
    `others` the `B = base` other ones in their order, these as one row of `N B` weights cut into blocks of `block` (the last may
    be short):

        W[:, others].flatten()[i] ~ F[code_i] absmax_(i // block) + mean
        W[:, columns]             = outliers                            (16-bit floats, exact once rounded)

    `F` is the codebook of `data_type` with `k` bits (`algorithms.codebooks`), which its name tells; a "quantile" one is stored.

    Data: `codes` uint8 `[k, ceil(N B / 8)]`, as bit planes (`codebooks.pack`); `absmax` float16 or float32 `[blocks]`, or, in
    `absmax_format` "double", its uint8 codes with `absmax_scale` float32 `[ceil(blocks / 256)]` and `absmax_mean` float32 `[1]`
    (`codebooks.undo_double`); `codebook` float16 `[2^k]` for "quantile", padded with its last value, else `[0]`; `mean`
    float32 `[1]` where the weights were centered, else `[0]`; `outliers` float16 or bfloat16 `[N, K - B]`; `columns` int32
    `[K - B]`, ascending.

    Static: `data_type`, `bits_per_code` (`k`, 3 to 8), `exponent_bits` (of "float", else 0), `block`, `absmax_format`,
    `centered`; `shape` and `in_axes` of the array this replaces; `base`; `group`, a name shared by layers that read the same
    tensor, or `None`; `version` of this format.
    """

    codes: Leaf
    absmax: Leaf
    absmax_scale: Leaf
    absmax_mean: Leaf
    codebook: Leaf
    mean: Leaf
    outliers: Leaf
    columns: Leaf
    data_type: DataType = dataclasses.field(metadata=_STATIC)
    bits_per_code: int = dataclasses.field(metadata=_STATIC)
    exponent_bits: int = dataclasses.field(metadata=_STATIC)
    block: int = dataclasses.field(metadata=_STATIC)
    absmax_format: AbsmaxFormat = dataclasses.field(metadata=_STATIC)
    centered: bool = dataclasses.field(metadata=_STATIC)
    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    in_axes: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    base: int = dataclasses.field(metadata=_STATIC)
    group: str | None = dataclasses.field(metadata=_STATIC)
    version: int = dataclasses.field(default=VERSION, metadata=_STATIC)

    @property
    def weight_bits(self) -> int:
        """`k`."""
        return self.bits_per_code

    @property
    def activation_bits(self) -> int:
        """16: activations keep their dtype."""
        return 16

    @property
    def label(self) -> str:
        """The format in a word: data type, bits and block."""
        name = self.data_type if self.data_type == "fp4" else f"{self.data_type}{self.bits_per_code}"
        return f"{name}/{'tensor' if self.block >= self.coded else self.block}"

    @property
    def coded(self) -> int:
        """How many weights have a code, `N B`."""
        return self.outputs * self.base

    @property
    def blocks(self) -> int:
        """How many blocks they are in."""
        return -(-self.coded // self.block)

    @property
    def last_block(self) -> int:
        """How many weights the last block has: fewer than the others where blocks do not divide the tensor."""
        return self.coded - (self.blocks - 1) * self.block if self.blocks else 0

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Each data field's shape and the dtypes it may have."""
        double, outliers = self.absmax_format == "double", self.inputs - self.base
        return {
            "codes": ((self.bits_per_code, -(-self.coded // 8)), ("uint8",)),
            "absmax": ((self.blocks,), ("uint8" if double else self.absmax_format,)),
            "absmax_scale": ((-(-self.blocks // DOUBLE_BLOCK) if double else 0,), ("float32",)),
            "absmax_mean": ((1 if double else 0,), ("float32",)),
            "codebook": ((2**self.bits_per_code if self.data_type == "quantile" else 0,), ("float16",)),
            "mean": ((1 if self.centered else 0,), ("float32",)),
            "outliers": ((self.outputs, outliers), ("float16", "bfloat16")),
            "columns": ((outliers,), ("int32",)),
        }

    def bits(self) -> int:
        """Size of everything stored, in bits: codes (whole bytes to a plane), absmax, codebook, mean, outliers, columns."""
        return sum(math.prod(shape) * 8 * jnp.dtype(dtypes[0]).itemsize for shape, dtypes in self.layout().values())

    def validate(self, name: str = "weight") -> None:
        """Check the invariant above on concrete arrays.

        Raises:
            QuikError: naming `name` and the first thing that does not hold.
        """
        if self.version != VERSION:
            raise QuikError(f"{name} is in codebook format {self.version}; this version of quikjax reads format {VERSION}")
        if not MIN_BITS <= self.bits_per_code <= MAX_BITS or self.block < 1 or not 0 <= self.base <= self.inputs:
            raise QuikError(f"{name} has {self.bits_per_code} bits, blocks of {self.block} and {self.base} base columns")
        for field, (shape, allowed) in self.layout().items():
            array = getattr(self, field)
            if tuple(array.shape) != shape:
                raise QuikError(f"{name}.{field} has shape {tuple(array.shape)}, expected {shape}")
            if jnp.dtype(array.dtype).name not in allowed:
                raise QuikError(f"{name}.{field} has dtype {array.dtype}, expected {allowed[0]}")
        for field in ("absmax", "absmax_scale", "absmax_mean", "codebook", "mean", "outliers"):
            if not np.isfinite(np.asarray(getattr(self, field), np.float32)).all():
                raise QuikError(f"{name}.{field} has values that are not finite")
        if self.absmax_format != "double" and (np.asarray(self.absmax) < 0).any():
            raise QuikError(f"{name}.absmax has negative values")
        columns = np.asarray(self.columns)
        if (np.diff(columns) <= 0).any() or (columns < 0).any() or (columns >= self.inputs).any():
            raise QuikError(f"{name}.columns are not ascending columns of {self.inputs}")
        table = np.asarray(self.table())
        if (np.diff(table) < 0).any() or np.abs(table).max(initial=0.0) > 1:
            raise QuikError(f"{name}.codebook is not ascending within [-1, 1]")
        # Some codebooks lack the last of 2^k codes, which would be read past their end: it is the one with every bit set.
        if len(table) < 2**self.bits_per_code and np.bitwise_and.reduce(np.asarray(self.codes), axis=0).any():
            raise QuikError(f"{name}.codes has code {2**self.bits_per_code - 1}; {self.label} has {len(table)} codes")

    def table(self) -> Float32[Array, " entries"]:
        """`F`."""
        if self.data_type == "quantile":
            return jnp.asarray(self.codebook).astype(jnp.float32)
        return jnp.asarray(codebooks.codebook(self.data_type, self.bits_per_code, self.exponent_bits or None))

    def full_absmax(self) -> Float32[Array, " blocks"]:
        """Absmax of every block."""
        if self.absmax_format == "double":
            return codebooks.undo_double(self.absmax, self.absmax_scale, self.absmax_mean)
        return jnp.asarray(self.absmax).astype(jnp.float32)

    def matrix(self) -> Float32[Array, "n k"]:
        """`W`, dequantized."""
        codes = codebooks.unpack(jnp.asarray(self.codes), self.coded)
        flat = codebooks.decode(codes, self.full_absmax(), self.table(), block=self.block)
        if self.centered:
            flat = flat + self.mean
        base = flat.reshape(self.outputs, self.base)
        if self.base == self.inputs:
            return base
        columns = jnp.asarray(self.columns)
        exact = jnp.zeros(self.inputs, jnp.int32).at[columns].set(1)
        # Where each column is in `base` and `outliers` side by side.
        place = jnp.arange(self.inputs) - jnp.cumsum(exact)
        place = place.at[columns].set(self.base + jnp.arange(self.inputs - self.base))
        both = jnp.concatenate([base, jnp.asarray(self.outliers).astype(jnp.float32)], axis=1)
        return jnp.take(both, place, axis=1, mode="clip")


def dequantize(weight: CodebookWeight) -> Float32[Array, "..."]:
    """The float32 kernel that a codebook weight stands for, in the shape of the array it replaced."""
    return from_matrix(weight.matrix(), weight.shape, weight.in_axes)
