"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout that Hugging Face publishes.

One small class per published `rope_type`. What each does beyond the context it was trained on:

- `Rope`, `LinearRope`, `Llama3Rope`, `YarnRope`: frequencies do not depend on the length, so longer text just turns further.
- `DynamicRope` (dynamic NTK): the base grows with the row's highest position of the call. Keys already in a cache keep the
  angle they were written with, as in transformers; so a prompt read at once and the same prompt read in pieces differ
  beyond the trained context, there and here. Unlike there, the base does not depend on earlier calls or on other rows.
- `longrope` is not published with the families here and is refused by name.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from quikjax.errors import QuikError, did_you_mean
from quikjax.models.published import Fields


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `theta^(-2i/size)` for pair `i` of a head of `size`."""

    theta: float = 10000.0

    @property
    def amplitude(self) -> float:
        """The factor on rotated pairs."""
        return 1.0

    def frequencies(self, size: int) -> np.ndarray:
        """Radians per position, float32 `[size / 2]`."""
        return (np.float32(1.0) / np.float32(self.theta) ** _exponents(size)).astype(np.float32)

    def angles(self, positions: Int32[Array, "batch length"], size: int) -> Float32[Array, "batch length half"]:
        """Radians by which each pair turns at each position."""
        return positions[..., None].astype(jnp.float32) * self.frequencies(size)


@dataclasses.dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float = 1.0

    def frequencies(self, size: int) -> np.ndarray:
        return super().frequencies(size) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicRope(Rope):
    """Dynamic NTK: with `L` the row's length, or `context` if that is more, the base is
    `theta * (factor * L / context - (factor - 1))^(size / (size - 2))`.
    """

    factor: float = 1.0
    context: int = 2048

    def angles(self, positions: Int32[Array, "batch length"], size: int) -> Float32[Array, "batch length half"]:
        length = jnp.maximum(jnp.max(positions, axis=1) + 1, self.context).astype(jnp.float32)
        stretch = self.factor * length / self.context - (self.factor - 1)
        base = self.theta * stretch ** (size / (size - 2))
        frequencies = 1.0 / base[:, None] ** _exponents(size)
        return positions[..., None].astype(jnp.float32) * frequencies[:, None, :]


@dataclasses.dataclass(frozen=True)
class Llama3Rope(Rope):
    """LLaMA 3.1: frequencies that turn less than `low` times within the `original` context are divided by `factor`, those that
    turn more than `high` times stay, and those between go over linearly in their number of turns.
    """

    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def frequencies(self, size: int) -> np.ndarray:
        plain = super().frequencies(size)
        turns = np.float32(self.original) * plain / np.float32(2 * math.pi)
        kept = np.clip((turns - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)
        return ((1 - kept) * plain / np.float32(self.factor) + kept * plain).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (arXiv 2309.00071): pairs that turn more than `fast` times within the `original` context stay, those that turn less
    than `slow` times are divided by `factor`, those between go over linearly in the pair's index; and `amplitude`.
    """

    factor: float = 1.0
    original: int = 2048
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0

    @property
    def amplitude(self) -> float:
        return self.scale

    def frequencies(self, size: int) -> np.ndarray:
        plain = super().frequencies(size)
        first, last = self._pair(self.fast, size), self._pair(self.slow, size)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        # The added thousandth is the definition's own guard against an empty range.
        width = (last - first) or 0.001
        interpolated = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
        return (plain / np.float32(self.factor) * interpolated + plain * (1 - interpolated)).astype(np.float32)

    def _pair(self, turns: float, size: int) -> float:
        """The (fractional) index of the pair that turns so often within the original context."""
        return size * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


# From this many positions on, a CPU computes their cosines apart.
_MANY = 64


def _apart(*tables: Float32[Array, "batch length half"]) -> tuple[Float32[Array, "batch length half"], ...]:
    """The same numbers, computed once: fused with what reads them, XLA on a CPU would compute every cosine again for every head.

    It drops optimization barriers before it fuses, but fuses no product.
    """
    one = jnp.eye(tables[0].shape[-1], dtype=jnp.float32)
    return tuple(jnp.matmul(table, one, precision=jax.lax.Precision.HIGHEST) for table in tables)


def turns(
    positions: Int32[Array, "batch length"], rope: Rope, size: int
) -> tuple[Float32[Array, "batch length half"], Float32[Array, "batch length half"]]:
    """Cosines and sines, times the amplitude, by which the pairs of a head of `size` are rotated at each position."""
    angles = rope.angles(positions, size)
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def rotate(
    x: Float[Array, "batch length heads head"], positions: Int32[Array, "batch length"], rope: Rope
) -> Float[Array, "batch length heads head"]:
    """Rotate each pair `(x[i], x[i + head/2])` by its angle, computed in float32, in the dtype of `x`."""
    half = x.shape[-1] // 2
    cos, sin = turns(positions, rope, x.shape[-1])
    if positions.shape[1] >= _MANY:
        cos, sin = jax.lax.platform_dependent(cos, sin, cpu=_apart, default=lambda *tables: tables)
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def published_rope(fields: Fields, context: int) -> tuple[Rope, int]:
    """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before it).

    `context` is the published `max_position_embeddings`. Returns the rotary embedding and the longest context it is meant for:
    `context`, stretched by `factor` for "dynamic" and, where `context` is still the original one, for "yarn". ("linear"
    checkpoints publish either length; theirs is taken.)

    Raises:
        QuikError: an unknown type, or a field that the type does not have.
    """
    # The old field wins where both are there, as in transformers.
    sections = [fields.section("rope_scaling"), fields.section("rope_parameters")]
    section = next((one for one in sections if one is not None), Fields({}, fields.family, "rope_parameters."))
    fields.only("partial_rotary_factor", 1.0)
    section.only("partial_rotary_factor", 1.0)

    old, kind = section.optional("type"), section.optional("rope_type")
    kind = kind or old or "default"
    if kind not in _READERS:
        raise QuikError(f'rotary embedding of type "{kind}" is not supported; {did_you_mean(str(kind), _READERS)}')
    theta = section.number("rope_theta", fields.number("rope_theta", 10000.0))
    inner = section.integer("original_max_position_embeddings", context)
    original = fields.integer("original_max_position_embeddings", inner)
    rope, reach = _READERS[kind](section, theta, context, original)
    section.finish()
    return rope, reach


def _exponents(size: int) -> np.ndarray:
    return np.arange(0, size, 2, dtype=np.float32) / np.float32(size)


def _default(section: Fields, theta: float, context: int, original: int) -> tuple[Rope, int]:
    section.optional("factor")  # published with some default types, and without meaning there
    return Rope(theta), context


def _linear(section: Fields, theta: float, context: int, original: int) -> tuple[Rope, int]:
    return LinearRope(theta, section.number("factor")), context


def _dynamic(section: Fields, theta: float, context: int, original: int) -> tuple[Rope, int]:
    factor = section.number("factor")
    return DynamicRope(theta, factor, context), int(context * factor)


def _llama3(section: Fields, theta: float, context: int, original: int) -> tuple[Rope, int]:
    factor, low, high = section.number("factor"), section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise QuikError(f"the model's configuration has high_freq_factor {high}, which must be above low_freq_factor {low}")
    return Llama3Rope(theta, factor, low, high, original), context


def _yarn(section: Fields, theta: float, context: int, original: int) -> tuple[Rope, int]:
    # Without a factor it is the ratio of the two contexts.
    factor = section.number("factor", context / original)
    scale, weight, total = (section.optional(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = _emphasis(factor, weight) / _emphasis(factor, total) if weight and total else _emphasis(factor, 1.0)
    section.optional("finetuned")  # says how the checkpoint was made
    rope = YarnRope(
        theta,
        factor,
        original,
        section.number("beta_fast", 32.0),
        section.number("beta_slow", 1.0),
        section.flag("truncate", True),
        float(scale),
    )
    return rope, max(context, int(original * factor))


def _emphasis(factor: float, weight: float | int) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


_READERS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
