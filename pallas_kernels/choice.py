"""Which backend runs a QUIK layer, decided by pure predicates that return `None` (it can) or a reason a person can read.

A whole layer asks less of Mosaic than a split alone: where the kernel that splits cannot hold a token, XLA splits it for the
kernel that multiplies.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from quikjax.pallas_kernels import layout
from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.reference import MAX_BASE
from quikjax.pallas_kernels.split_quantize.producers import Identity, Producer

BACKENDS = ("mosaic", "triton", "xla")


class BackendError(ValueError):
    """A named backend cannot run what it was asked to."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer's call, by what is static: everything a predicate may look at.

    `bits` of the activations is 4, 8 or 16 (weight-only); `dtype` is theirs, `weight_dtype` that of the weight's codes and
    `outlier_dtype` that of its outliers.
    """

    rows: int
    inputs: int
    outputs: int
    base: int
    weight_dtype: Any
    bits: int
    dtype: Any
    outlier_dtype: Any
    producer: Producer = Identity()  # noqa: RUF009 -- frozen, without state

    @property
    def outliers(self) -> int:
        return self.inputs - self.base


@dataclasses.dataclass(frozen=True)
class CodebookProblem:
    """One call of a layer with a codebook weight, by what is static. `base` of its `inputs` have codes, of `bits` each, with an
    absmax for every `block` of a row; the others are outliers. `dtype` is that of the activations.
    """

    rows: int
    inputs: int
    outputs: int
    base: int
    bits: int
    block: int
    centered: bool
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that runs, why it was taken, and for every other one why not."""

    backend: str
    reason: str
    refused: dict[str, str]

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def why_not_xla(problem: Problem, device: Device) -> str | None:
    """The reference runs everything that is exact."""
    del device
    if problem.bits < 16 and problem.base > MAX_BASE:
        return f"{problem.base} base columns could overflow an int32 accumulator; at most {MAX_BASE} are exact"
    return None


def _why_no_kernel(problem: Problem) -> str | None:
    """The reason why no kernel backend can run a problem, whatever the device, or `None`."""
    if jnp.dtype(problem.weight_dtype) not in (jnp.dtype(jnp.int4), jnp.dtype(jnp.int8)):
        return f"weight codes are {jnp.dtype(problem.weight_dtype)}; the tensor cores would read them as signed integers"
    if problem.bits < 16 and problem.base > MAX_BASE:
        return f"{problem.base} base columns could overflow an int32 accumulator; at most {MAX_BASE} are exact"
    if problem.rows == 0:
        return "there are no rows"
    if problem.base == 0:
        return "there are no base columns, so there is nothing in low precision to multiply"
    if jnp.dtype(problem.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"activations are {jnp.dtype(problem.dtype)}; tensor cores take the outliers in bfloat16 or float16"
    if problem.outliers and jnp.dtype(problem.dtype) != jnp.dtype(problem.outlier_dtype):
        return (
            f"activations are {jnp.dtype(problem.dtype)} and the weight's outliers {jnp.dtype(problem.outlier_dtype)}; "
            "a tensor core multiplies two operands of one dtype"
        )
    return None


def why_not_mosaic(problem: Problem, device: Device) -> str | None:
    """Pallas Mosaic GPU: Hopper's int8 tensor cores."""
    if not device.hopper:
        return f"Mosaic kernels need a Hopper GPU (compute capability 9), this is {device}"
    if (reason := _why_no_kernel(problem)) is not None:
        return reason
    if problem.outputs % 8:
        return f"{problem.outputs} outputs are not a multiple of 8, which the copy engine needs"
    return None


def why_not_mosaic_split(problem: Problem, device: Device) -> str | None:
    """Mosaic's `split_quantize`, the producer fused into it."""
    if (reason := why_not_mosaic(problem, device)) is not None:
        return reason
    from quikjax.pallas_kernels import tuned
    from quikjax.pallas_kernels.split_quantize import mosaic as split

    tiles, _ = tuned.split_tiles(problem.rows, problem.inputs, problem.producer, device)
    return split.why_not(
        problem.inputs,
        layout.round_up(problem.base, layout.COLUMN_TILE),
        layout.round_up(problem.outliers, layout.COLUMN_TILE),
        problem.dtype,
        problem.producer,
        tiles,
    )


def why_not_triton(problem: Problem, device: Device) -> str | None:
    """jax-triton: Ampere and Ada, Hopper for comparison."""
    if device.platform != "gpu" or device.capability is None or device.capability < (8, 0):
        return f"Triton kernels need an NVIDIA GPU of compute capability 8.0 or later, this is {device}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed; pip install 'quikjax[triton]'"
    return _why_no_kernel(problem)


Predicates = Mapping[str, Callable[[Problem, Device], str | None]]
LAYER: Predicates = {"mosaic": why_not_mosaic, "triton": why_not_triton, "xla": why_not_xla}
SPLIT: Predicates = {**LAYER, "mosaic": why_not_mosaic_split}


def choose(problem: Problem, device: Device, backend: str | None = None, predicates: Predicates = LAYER) -> Choice:
    """The backend for a problem: the one named, or the first of `BACKENDS` that can run. `predicates`: of a layer or a split.

    Raises:
        BackendError: the named backend does not exist or cannot run this, in one sentence; or none can.
    """
    if backend is not None:
        if backend not in predicates:
            raise BackendError(f"there is no backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        reason = predicates[backend](problem, device)
        if reason is not None:
            raise BackendError(f"backend {backend!r} cannot run this layer: {reason}")
        return Choice(backend, "asked for by name", {})
    refused: dict[str, str] = {}
    for name in BACKENDS:
        reason = predicates[name](problem, device)
        if reason is None:
            return Choice(name, _why_chosen(name, problem, device, refused), refused)
        refused[name] = reason
    raise BackendError(f"no backend can run this layer: {refused['xla']}")


def why_not_mosaic_codebook(problem: CodebookProblem, device: Device) -> str | None:
    """Pallas Mosaic GPU: 4-bit codes looked up in registers."""
    from quikjax.pallas_kernels.codebook_matmul import layout as tile_form
    from quikjax.pallas_kernels.codebook_matmul import mosaic as codebook_kernel

    if not device.hopper:
        return f"Mosaic kernels need a Hopper GPU (compute capability 9), this is {device}"
    if problem.bits > 4:
        return f"codes have {problem.bits} bits; the kernel looks up 16 values, of 4 bits at most"
    if problem.base < problem.inputs:
        return f"{problem.inputs - problem.base} columns are outliers; the kernel has codes for every column"
    if problem.centered:
        return "weights are centered, and the kernel adds no mean"
    if problem.block % tile_form.BLOCK or (problem.block < problem.inputs and problem.inputs % problem.block):
        return (
            f"blocks of {problem.block} do not cut rows of {problem.inputs} into whole multiples of {tile_form.BLOCK}, "
            "of which the kernel scales the sums"
        )
    if jnp.dtype(problem.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"activations are {jnp.dtype(problem.dtype)}; the tensor cores take bfloat16 or float16"
    if problem.rows == 0:
        return "there are no rows"
    return codebook_kernel.why_not(problem.rows)


def why_not_triton_codebook(problem: CodebookProblem, device: Device) -> str | None:
    """No Triton kernel reads codebooks."""
    del problem, device
    return "it has no kernel for codebook weights"


def choose_codebook(problem: CodebookProblem, device: Device, backend: str | None = None) -> Choice:
    """The backend for a codebook weight: the one named, or the kernel where it can, or XLA, which can dequantize any.

    Raises:
        BackendError: the named backend does not exist or cannot run this, in one sentence.
    """
    refused = {"mosaic": why_not_mosaic_codebook(problem, device), "triton": why_not_triton_codebook(problem, device)}
    reasons = {name: reason for name, reason in refused.items() if reason is not None}
    if backend is not None:
        if backend in reasons or backend not in BACKENDS:
            raise BackendError(f"{backend} cannot run codebook weights: {reasons.get(backend, 'there is no such backend')}")
        return Choice(backend, "asked for by name", {})
    if refused["mosaic"] is None:
        return Choice("mosaic", "codes looked up in registers on Hopper", reasons)
    return Choice("xla", f"codebook weights are dequantized and multiplied by XLA; mosaic: {refused['mosaic']}", reasons)


def _why_chosen(name: str, problem: Problem, device: Device, refused: dict[str, str]) -> str:
    if name == "mosaic":
        if problem.bits == 16:
            return "weights widened in registers on Hopper"
        # What stands before a split is fused into it where that fits too.
        alone = dataclasses.replace(problem, producer=Identity())
        reason = why_not_mosaic_split(alone, device)
        return "fused int8 tensor-core kernels on Hopper" + ("" if reason is None else f"; split by XLA: {reason}")
    if name == "triton":
        return "int8 tensor-core kernels; mosaic: " + refused["mosaic"]
    return "; ".join(f"{other}: {reason}" for other, reason in refused.items())
