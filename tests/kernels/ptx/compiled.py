"""Compiles one Mosaic kernel for an absent H100 and keeps what an execution needs: PTX, tensor maps, number of blocks.

JAX writes tensor maps on the host, when a program runs, so they are in no PTX: they are recorded while JAX lowers the kernel.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import absent_gpu
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import core, launch_context

from ptx.copies import TensorMap
from ptx.machine import Machine, Timing
from ptx.parser import Fault, Kernel, Unknown, parse


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel as text and as instructions; `blocks`: of its grid."""

    ptx: str
    kernel: Kernel
    maps: tuple[TensorMap, ...]
    blocks: int

    def with_ptx(self, ptx: str) -> "CompiledKernel":
        """The same launch of another text."""
        return dataclasses.replace(self, ptx=ptx, kernel=parse(ptx))

    def run(self, arrays: Sequence[np.ndarray], pointers: Sequence[int], timing: Timing) -> tuple[list[np.ndarray], Any]:
        """Execute on `arrays` (inputs, then outputs, as the kernel takes them); returns them as they are afterwards, and counts.

        `pointers`: which arrays the kernel touches itself, in the order of its parameters; others only the copy engine touches.
        """
        machine = Machine(self.kernel, [pack(array) for array in arrays], list(pointers), list(self.maps), timing)
        after = machine.launch(self.blocks)
        return [unpack(raw, array) for raw, array in zip(after, arrays, strict=True)], machine.counts


def pack(array: np.ndarray) -> np.ndarray:
    """An array's bytes in a GPU's memory: int4 two to a byte, the first in the low half."""
    if array.dtype == jnp.int4:
        codes = array.astype(np.int8).view(np.uint8) & 15
        return (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(-1)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()


def unpack(raw: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Bytes back to an array of the shape and dtype of `like`; int4 is not written by any kernel and comes back as it was."""
    return like if like.dtype == jnp.int4 else raw.view(like.dtype).reshape(like.shape)


def compile_kernel(function: Callable[..., Any], *arguments: Any) -> CompiledKernel:
    """Lower and compile `function`, which is one Mosaic kernel, for an H100.

    Raises:
        Fault: it is none, or several; or the same kernel was compiled before in this process, and nothing was printed.
    """
    with _recording() as record:
        compiled = absent_gpu.compile_for("h100", function, *arguments)
    if compiled.log.count(".entry ") != 1:
        raise Fault(f"{compiled.log.count('.entry ')} kernels were compiled, not one")
    start = compiled.log.index(".version")
    text = compiled.log[start : compiled.log.index("\n}\n", start) + 3]
    (blocks,) = record.blocks
    return CompiledKernel(text, parse(text), tuple(record.maps), blocks)


class _Record:
    def __init__(self) -> None:
        self.maps: list[TensorMap] = []
        self.blocks: list[int] = []


@contextlib.contextmanager
def _recording() -> Iterator[_Record]:
    record = _Record()
    describe, launch = launch_context.LaunchContext._get_tma_desc, core._launch

    def described(context: Any, ref: Any, transforms: Any, peer: Any, box: Any, swizzle: Any, reduction: Any, *rest: Any) -> Any:
        before = len(context.tma_descriptors)
        result = describe(context, ref, transforms, peer, box, swizzle, reduction, *rest)
        if len(context.tma_descriptors) > before:
            record.maps.append(_tensor_map(context, ref, transforms, box, swizzle))
        return result

    def launched(token: Any, grid: Any, cluster: Any, *rest: Any, **keywords: Any) -> Any:
        record.blocks.append(int(np.prod(grid)))
        return launch(token, grid, cluster, *rest, **keywords)

    with (
        mock.patch.object(launch_context.LaunchContext, "_get_tma_desc", described),
        mock.patch.object(core, "_launch", launched),
    ):
        yield record


def _tensor_map(context: Any, ref: Any, transforms: Any, box: Any, swizzle: Any) -> TensorMap:
    """The map that the host will make: the argument's shape and strides after the transforms."""
    argument = launch_context._find_kernel_argument_for_gmem_ref(ref)
    kind = launch_context.ir.MemRefType(argument.type)
    shape, strides = list(kind.shape), list(kind.get_strides_and_offset()[0])
    for transform in transforms:
        name = type(transform).__name__
        if name == "TileTransform":
            strides = list(transform.transform_strides(strides))
            shape = list(transform.transform_gmem_shape(shape))
        elif name == "TransposeTransform":
            shape, strides = [shape[i] for i in transform.permutation], [strides[i] for i in transform.permutation]
        elif name == "DropUnitDimsTransform":
            dropped = next(getattr(transform, field) for field in ("unit_dims", "dims") if hasattr(transform, field))
            kept = [i for i in range(len(shape)) if i not in dropped]
            shape, strides = [shape[i] for i in kept], [strides[i] for i in kept]
        else:
            raise Unknown(f"a transform this does not know: {name}")
    bits = {"i4": 4, "i8": 8, "bf16": 16, "f16": 16, "f32": 32, "i32": 32}[str(kind.element_type)]
    lengths = list(box)
    if bits == 4:
        shape[-1], lengths[-1] = shape[-1] // 2, lengths[-1] // 2
        strides = [stride // 2 for stride in strides[:-1]] + [1]
    else:
        strides = [stride * bits // 8 for stride in strides]
    return TensorMap(
        array=context._find_kernel_argument_index(argument),
        shape=tuple(shape),
        strides=tuple(strides),
        box=tuple(lengths),
        size=max(8, bits) // 8,
        swizzle=16 if swizzle is None else int(swizzle),
    )


def shapes(arrays: Sequence[np.ndarray]) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of arrays."""
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
