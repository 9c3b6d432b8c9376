"""Tile form: the padding that lets kernels assume whole tiles, and the way back.

A weight on disk holds exactly `B` base and `O` outlier columns and `N` rows. Kernels take more of each:

    qweight   [N up to 128, B up to 128]     zero codes; of 4 bits int32 [B / 128, N, 16], as below
    outliers  [N up to 128, O up to 64]      zeros
    scale, reduced (and a bias) [N up to 128]  ones, zeros (zeros)
    columns   [B up to 256 | O up to 256]    the first base column again

A padded base column repeats a real one, so it cannot move a token's minimum or maximum, and meets zero codes, so it cannot move
an accumulator; a padded outlier column meets zeros. The true `B`, `K` and `N` stay beside the arrays. `Packed` is a weight
without padding, `Tiled` one in tile form, `Joined` several that one kernel multiplies: made once, when a model is put on a GPU,
they cost nothing per call.

Codes of 4 bits in tile form are what Hopper's tensor cores are fed with (`quik_matmul/feed.py`): 128 columns of all rows after
each other, a row's 128 codes 64 bytes, of which a thread reads its own 16 at once. With column `32 w + 16 h + 4 t + j` of the
128, `t`, `w`, `j` in 0..3 and `h` in 0..1: word `4 t + w` has the code in its half-bytes `2 j + h`.

Triton's kernels read columns as they are, but codes of 4 bits as bytes (`Halved`): byte `j` of the 64 that stand for 128 columns
has the code of column `j` in its low half and that of column `64 + j` in its high one, so that each half of a tile is a product
of 64 columns that lie next to each other in the activations. Codes past the last column are zero.

A CPU's compiled products read panels of 16 rows (`Paneled`), in which codes are in the order of the inputs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Int32, Shaped

from quikjax.pallas_kernels.native import panels

WEIGHT_TILE = 128
OUTLIER_TILE = 64
HALF = 64  # columns whose codes share bytes with those of as many others
COLUMN_TILE = 256

Leaf = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weight:
    """The fields of both forms. Data: `qweight` int4 or int8, `scale` and `reduced` float32, `outliers` 16-bit, `columns` int32.

    Static: the true numbers of base columns, `inputs` (`K`) and `outputs` (`N`); `level_clip`, the level clip of the activations
    it is multiplied by.
    """

    qweight: Leaf
    scale: Leaf
    reduced: Leaf
    outliers: Leaf
    columns: Leaf
    base: int = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})
    outputs: int = dataclasses.field(metadata={"static": True})
    level_clip: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def code_dtype(self) -> Any:
        """The kind of a code, however many share a byte or word of `qweight`."""
        return jnp.dtype(self.qweight.dtype)

    @property
    def weight_bits(self) -> int:
        return int(jnp.iinfo(self.code_dtype).bits)

    @property
    def outlier_count(self) -> int:
        return self.inputs - self.base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(_Weight):
    """A weight's arrays without padding (`quikjax.weights.quik.QuikWeight` without its place in a model)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InTiles(_Weight):
    """The tile form of one weight or of several: codes of 4 bits are int32 words, and all arrays are padded."""

    @property
    def code_dtype(self) -> Any:
        return jnp.dtype(jnp.int4) if self.qweight.dtype == jnp.int32 else jnp.dtype(self.qweight.dtype)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and base columns with padding."""
        return self.scale.shape[0], round_up(self.base, WEIGHT_TILE)

    @property
    def rows_axis(self) -> int:
        """The axis of `qweight` along which its rows lie."""
        return self.qweight.ndim - 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiled(_InTiles):
    """A weight's arrays in tile form: padded as the table above says."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Halved(_Weight):
    """A weight's arrays without padding, its codes of 4 bits two to a byte: `qweight` uint8 `[N, ceil(B / 128) * 64]`."""

    @property
    def code_dtype(self) -> Any:
        return jnp.dtype(jnp.int4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Paneled(_Weight):
    """A weight for a CPU's compiled products: the arrays of L layers that are alike, of which it is number `layer`, int32 `[]`.

    `qweight` uint8 `[L, panels, steps, 64]` and `outliers` `[L, panels, O, 16]` are in panels (`native/panels.py`), codes in the
    order of the inputs; `scale` and `reduced` `[L, N]`. `columns` `[K]` are the layer's own. Static: `bits` of the codes.
    """

    layer: Leaf
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def code_dtype(self) -> Any:
        return jnp.dtype(jnp.int4 if self.bits == 4 else jnp.int8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(_InTiles):
    """Weights that share their columns, in tile form, one after the other along `N`: each begins at a multiple of 128 rows.

    `outputs` counts all rows, padding included; `members` (static) are the true numbers of outputs of each weight.
    """

    members: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def places(self) -> tuple[tuple[int, int, int], ...]:
        """Of each member its first row, its true number of rows, and that with padding."""
        found, first = [], 0
        for count in self.members:
            found.append((first, count, round_up(count, WEIGHT_TILE)))
            first += round_up(count, WEIGHT_TILE)
        return tuple(found)


class TileSplit(NamedTuple):
    """Split activations in tile form: rows up to 8 (scale and zero: up to 256), base and outlier columns up to 256.

    `tokens`: int8 codes `[M, B]` with float32 `scale` and `zero` `[M]`, or 16-bit base columns without; `outliers` 16-bit
    `[M, O]`, or None where there are none. Padding holds anything: it is never looked at, or meets zeros in the weight.
    """

    tokens: jax.Array
    scale: jax.Array | None
    zero: jax.Array | None
    outliers: jax.Array | None


def pack(
    qweight: Shaped[Array, "n base"],
    scale: Shaped[Array, " n"],
    reduced: Shaped[Array, " n"],
    outliers: Shaped[Array, "n outliers"],
    columns: Shaped[Array, " k"],
) -> Packed:
    """`Packed` from the arrays of a weight that is not padded."""
    base = qweight.shape[1]
    return Packed(
        qweight=qweight,
        scale=scale,
        reduced=reduced,
        outliers=outliers,
        columns=columns,
        base=base,
        inputs=columns.shape[0],
        outputs=qweight.shape[0],
    )


def round_up(count: int, tile: int) -> int:
    """`count` rounded up to a multiple of `tile`."""
    return -(-count // tile) * tile


def pad_to(array: Shaped[Array, "..."], shape: tuple[int, ...], value: int = 0) -> Shaped[Array, "..."]:
    """`array` padded at the end of every axis to `shape` with `value`; itself where nothing is missing."""
    if array.shape == shape:
        return array
    # int4 has no pad on some backends of JAX: widen, pad, narrow. XLA fuses the three.
    wide = array.astype(jnp.int8) if array.dtype == jnp.int4 else array
    missing = [(0, wanted - have) for wanted, have in zip(shape, array.shape, strict=True)]
    return jnp.pad(wide, missing, constant_values=value).astype(array.dtype)


def tile_columns(columns: Shaped[Array, " _"], base: int, inputs: int) -> Shaped[Array, " _"]:
    """Columns in tile form, from either form."""
    padded_base, padded_outliers = round_up(base, COLUMN_TILE), round_up(inputs - base, COLUMN_TILE)
    if columns.shape[0] == padded_base + padded_outliers:
        return columns
    first = columns[:1]
    return jnp.concatenate(
        [
            columns[:base],
            jnp.broadcast_to(first, (padded_base - base,)),
            columns[base:],
            jnp.broadcast_to(first, (padded_outliers - (inputs - base),)),
        ]
    )


def exact_columns(columns: Shaped[Array, " _"], base: int, inputs: int) -> Shaped[Array, " k"]:
    """Columns without padding, from either form."""
    if columns.shape[0] == inputs:
        return columns
    padded = round_up(base, COLUMN_TILE)
    return jnp.concatenate([columns[:base], columns[padded : padded + inputs - base]])


def to_tiles(packed: Packed | Tiled) -> Tiled:
    """The weight in tile form; itself if it is."""
    if isinstance(packed, Tiled):
        return packed
    rows = round_up(packed.outputs, WEIGHT_TILE)
    outliers = round_up(packed.outlier_count, OUTLIER_TILE)
    codes = pad_to(packed.qweight, (rows, round_up(packed.base, WEIGHT_TILE)))
    return Tiled(
        qweight=feed(codes) if packed.weight_bits == 4 else codes,
        scale=pad_to(packed.scale, (rows,), 1),
        reduced=pad_to(packed.reduced, (rows,)),
        outliers=pad_to(packed.outliers, (rows, outliers)),
        columns=tile_columns(packed.columns, packed.base, packed.inputs),
        base=packed.base,
        inputs=packed.inputs,
        outputs=packed.outputs,
        level_clip=packed.level_clip,
    )


def join(weights: Sequence[Tiled]) -> Joined:
    """Weights with the same `columns`, `base` and formats as one. Columns are the first one's."""
    first = weights[0]
    return Joined(
        qweight=jnp.concatenate([w.qweight for w in weights], axis=first.rows_axis),
        **{name: jnp.concatenate([getattr(w, name) for w in weights]) for name in ("scale", "reduced", "outliers")},
        columns=first.columns,
        base=first.base,
        inputs=first.inputs,
        outputs=sum(w.qweight.shape[0] for w in weights),
        level_clip=first.level_clip,
        members=tuple(w.outputs for w in weights),
    )


def part(joined: Joined) -> list[Tiled]:
    """The weights that `join` joined."""
    return [
        Tiled(
            qweight=jax.lax.slice_in_dim(joined.qweight, first, first + rows, axis=joined.rows_axis),
            **{name: getattr(joined, name)[first : first + rows] for name in ("scale", "reduced", "outliers")},
            columns=joined.columns,
            base=joined.base,
            inputs=joined.inputs,
            outputs=outputs,
            level_clip=joined.level_clip,
        )
        for first, outputs, rows in joined.places
    ]


@jax.jit
def feed(codes: Int[Array, "n base"]) -> Int32[Array, "steps n 16"]:
    """Codes of 4 bits in tile form, `base` a multiple of 128."""
    n = codes.shape[0]
    halves = codes.astype(jnp.uint8).reshape(n, -1, 4, 2, 4, 4) & 15  # [n, steps, w, h, t, j]
    pairs = (halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)).transpose(1, 0, 3, 2, 4)  # [steps, n, t, w, j]
    words = jax.lax.bitcast_convert_type(pairs, jnp.int32)  # the first byte is the lowest
    return words.reshape(-1, n, 16)


@jax.jit
def fed_codes(words: Int32[Array, "steps n 16"]) -> Int[Array, "n base"]:
    """The codes, int4, that `feed` laid in words."""
    n = words.shape[1]
    pairs = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1, n, 4, 4, 4)  # [steps, n, t, w, j]
    halves = jnp.stack([pairs << 4, pairs], axis=-1)
    signed = jax.lax.bitcast_convert_type(halves, jnp.int8) >> 4  # [steps, n, t, w, j, h]
    return signed.transpose(1, 0, 3, 5, 2, 4).reshape(n, -1).astype(jnp.int4)


def halve(packed: Packed) -> Halved:
    """A weight of 4 bits with its codes two to a byte."""
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    n = packed.outputs
    codes = pad_to(packed.qweight, (n, round_up(packed.base, 2 * HALF))).astype(jnp.uint8).reshape(n, -1, 2, HALF)
    return Halved(**{**fields, "qweight": ((codes[:, :, 0] & 15) | (codes[:, :, 1] << 4)).reshape(n, -1)})


def _whole(halved: Halved) -> Packed:
    fields = {field.name: getattr(halved, field.name) for field in dataclasses.fields(halved)}
    pairs = halved.qweight.reshape(halved.outputs, -1, 1, HALF)
    signed = jax.lax.bitcast_convert_type(jnp.concatenate([pairs << 4, pairs], axis=2), jnp.int8) >> 4
    codes = signed.reshape(halved.outputs, -1)[:, : halved.base].astype(jnp.int4)
    return Packed(**{**fields, "qweight": codes})


def _out_of_panels(paneled: Paneled) -> Packed:
    own = {field.name: getattr(paneled, field.name) for field in dataclasses.fields(_Weight)}
    codes = panels.code_matrix(paneled.qweight[paneled.layer], paneled.outputs, paneled.inputs, paneled.bits)
    own["qweight"] = jnp.take(codes, paneled.columns[: paneled.base], axis=1, mode="clip").astype(paneled.code_dtype)
    own["outliers"] = panels.float_matrix(paneled.outliers[paneled.layer], paneled.outputs)
    own |= {name: own[name][paneled.layer] for name in ("scale", "reduced")}
    return Packed(**own)


def from_tiles(packed: Packed | Tiled | Halved | Paneled) -> Packed:
    """The weight without padding; itself if it has none."""
    if isinstance(packed, Packed):
        return packed
    if isinstance(packed, Paneled):
        return _out_of_panels(packed)
    if isinstance(packed, Halved):
        return _whole(packed)
    n, base, outliers = packed.outputs, packed.base, packed.outlier_count
    codes = fed_codes(packed.qweight) if packed.weight_bits == 4 else packed.qweight
    return Packed(
        qweight=_cut(codes, (n, base)),
        scale=_cut(packed.scale, (n,)),
        reduced=_cut(packed.reduced, (n,)),
        outliers=_cut(packed.outliers, (n, outliers)),
        columns=exact_columns(packed.columns, base, packed.inputs),
        base=base,
        inputs=packed.inputs,
        outputs=n,
        level_clip=packed.level_clip,
    )


def _cut(array: Shaped[Array, "..."], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
    return array if array.shape == shape else array[tuple(slice(length) for length in shape)]
