"""The packed weight: what takes the place of a kernel array inside a parameter tree."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped

from quikjax.errors import QuikError
from quikjax.pallas_kernels.reference import MAX_BASE, checked_level_clip
from quikjax.weights.kernel import Kernel

VERSION = 1

# Data fields hold arrays, but also whatever a tree map puts there (shapes, shardings, checksums), so they stay unchecked.
Leaf = Any


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuikWeight(Kernel):
    """A kernel in QUIK format. With `W` its matrix view `[N, K]` (outputs, inputs), `B` base and `O = K - B` outlier columns:

        W[:, columns[:B]] ~ qweight * scale[:, None]          (integers times one scale per output)
        W[:, columns[B:]] = outliers                          (16-bit floats, exact once rounded)
        reduced           = scale * sum over the columns of qweight

    Data: `qweight` int4 or int8 `[N, B]`; `scale` and `reduced` float32 `[N]`; `outliers` float16 or bfloat16 `[N, O]`;
    `columns` int32 `[K]`, a permutation, base columns first.

    Static: `weight_bits` (4, 8); `activation_bits` (4, 8, or 16 for weight-only); `shape` and `in_axes` of the array this
    replaces (`in_axes` are its input axes; the others, in order, are the outputs); `base`, the true `B`; `group`, a name
    shared by layers that read the same tensor and therefore have equal `columns` and one quantized activation, or `None`;
    `shards`, in how many pieces along `K` outliers were chosen; `version` of this format; `level_clip`, the level clip `(levels,
    lowest)` of the activations (`pallas_kernels.reference`; `(16, -8)` is symmetric), or `None`: all codes over a token's range.
    """

    qweight: Leaf
    scale: Leaf
    reduced: Leaf
    outliers: Leaf
    columns: Leaf
    weight_bits: int = _static()
    activation_bits: int = _static()
    shape: tuple[int, ...] = _static()
    in_axes: tuple[int, ...] = _static()
    base: int = _static()
    group: str | None = _static()
    shards: int = dataclasses.field(default=1, metadata={"static": True})
    version: int = dataclasses.field(default=VERSION, metadata={"static": True})
    level_clip: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def levels(self) -> int:
        """`L`: in how many steps a token's range is divided. 15, or 255 for 8-bit activations, without a level clip."""
        return checked_level_clip(self.activation_bits, self.level_clip).levels

    @property
    def lowest(self) -> int:
        """`l`: the step that the lowest code stands for; 0 without a level clip, negative where activations are symmetric."""
        return checked_level_clip(self.activation_bits, self.level_clip).lowest

    @property
    def label(self) -> str:
        """The format in a word: bits of weights and of activations."""
        return f"W{self.weight_bits}A{self.activation_bits}"

    def bits(self) -> int:
        """Size of everything stored, in bits: codes, outliers, scale, reduced, columns."""
        n, k, o = self.outputs, self.inputs, self.inputs - self.base
        return n * self.base * self.weight_bits + n * o * 16 + 2 * n * 32 + k * 32

    def validate(self, name: str = "weight") -> None:
        """Check the invariant above on concrete arrays.

        Raises:
            QuikError: naming `name` and the first thing that does not hold.
        """
        if self.version != VERSION:
            raise QuikError(f"{name} is in weight format {self.version}; this version of quikjax reads format {VERSION}")
        n, k, b = self.outputs, self.inputs, self.base
        dtypes = {4: jnp.int4, 8: jnp.int8}
        if self.weight_bits not in dtypes or self.activation_bits not in (4, 8, 16):
            raise QuikError(f"{name} has W{self.weight_bits}A{self.activation_bits}, which is no QUIK format")
        check_level_clip(name, self.activation_bits, self.level_clip)
        expected = {
            "qweight": ((n, b), (dtypes[self.weight_bits],)),
            "scale": ((n,), (jnp.float32,)),
            "reduced": ((n,), (jnp.float32,)),
            "outliers": ((n, k - b), (jnp.float16, jnp.bfloat16)),
            "columns": ((k,), (jnp.int32,)),
        }
        for field, (shape, allowed) in expected.items():
            array = getattr(self, field)
            if tuple(array.shape) != shape:
                raise QuikError(f"{name}.{field} has shape {tuple(array.shape)}, expected {shape}")
            if jnp.dtype(array.dtype) not in [jnp.dtype(dtype) for dtype in allowed]:
                raise QuikError(f"{name}.{field} has dtype {array.dtype}, expected {jnp.dtype(allowed[0])}")
        if b > MAX_BASE:
            raise QuikError(f"{name} has {b} base columns; int32 accumulators are exact up to {MAX_BASE}")
        if not np.array_equal(np.sort(np.asarray(self.columns)), np.arange(k)):
            raise QuikError(f"{name}.columns is not a permutation of the {k} input columns")
        for field in ("scale", "reduced", "outliers"):
            if not np.isfinite(np.asarray(getattr(self, field), np.float32)).all():
                raise QuikError(f"{name}.{field} has values that are not finite")
        scale = np.asarray(self.scale, np.float64)
        if (scale <= 0).any():
            raise QuikError(f"{name}.scale has values that are not positive")
        total = np.asarray(self.qweight, np.int64).sum(axis=1)
        if not np.allclose(np.asarray(self.reduced), scale * total, rtol=1e-6, atol=0):
            raise QuikError(f"{name}.reduced is not scale times the sum of the codes")


def check_level_clip(name: str, bits: int, clip: tuple[int, int] | None) -> None:
    """Check that activations of `bits` can have the level clip of the weight `name`.

    Raises:
        QuikError: they cannot.
    """
    if clip is not None:
        try:
            checked_level_clip(bits, clip)
        except ValueError as error:
            raise QuikError(f"{name}: {error}") from None


def as_matrix(kernel: Float[Array, "..."], in_axes: tuple[int, ...]) -> Float[Array, "n k"]:
    """The `[N, K]` view of a kernel with any number of axes: output axes first, then the input axes, each side flattened."""
    out_axes = [axis for axis in range(kernel.ndim) if axis not in in_axes]
    inputs = math.prod(kernel.shape[axis] for axis in in_axes)
    return jnp.transpose(kernel, (*out_axes, *in_axes)).reshape(-1, inputs)


def from_matrix(matrix: Float[Array, "n k"], shape: tuple[int, ...], in_axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The inverse of `as_matrix`."""
    out_axes = [axis for axis in range(len(shape)) if axis not in in_axes]
    order = [*out_axes, *in_axes]
    return jnp.transpose(matrix.reshape([shape[axis] for axis in order]), np.argsort(order).tolist())


def dequantize(weight: QuikWeight) -> Float32[Array, "..."]:
    """The float32 kernel that a packed weight stands for, in the shape of the array it replaced.

    Exact: every product of a code and its scale is rounded once, to float32.
    """
    matrix = _dequantized(weight.qweight, weight.scale, weight.outliers, weight.columns)
    return from_matrix(matrix, weight.shape, weight.in_axes)


@partial(jax.jit, inline=True)
def _dequantized(
    qweight: Shaped[Array, "n base"],
    scale: Float32[Array, " n"],
    outliers: Float[Array, "n outliers"],
    columns: Int32[Array, " k"],
) -> Float32[Array, "n k"]:
    base = qweight.astype(jnp.float32) * scale[:, None]
    permuted = jnp.concatenate([base, outliers.astype(jnp.float32)], axis=1)
    return jnp.zeros_like(permuted).at[:, columns].set(permuted, unique_indices=True)
