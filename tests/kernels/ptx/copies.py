"""The copy engine (PTX ISA 5.5 "Tensors", 9.7.9.25 - 27): boxes of a tensor to and from shared memory, and `st.async`.

A tensor map describes an array of up to five dimensions by lengths and strides, and a box that one instruction copies. Elements
of the box outside the tensor read as zeros and are not written. In shared memory the box lies dense, last dimension fastest, with
16-byte pieces exchanged by its swizzle: bits 4 - 6 of the address are xored with bits 7 - 9 (128 bytes; 64: two bits, 32: one).
"""

import dataclasses
import re
from typing import Any

import numpy as np

from ptx.arithmetic import Operation
from ptx.barriers import find
from ptx.memory import CLUSTER_WINDOW, address_reader, local_shared
from ptx.parser import Fault, Instruction, Kernel, Unknown, members
from ptx.values import LANES, TYPES, reader, writer

_MASKS = {16: 0, 32: 1, 64: 3, 128: 7}
MAP_BYTES = 128  # of a descriptor among a kernel's parameters


def swizzled(address: np.ndarray, swizzle: int) -> np.ndarray:
    """The place of the byte at a dense address in a buffer with this swizzle (in bytes; 16 is none)."""
    return address ^ (((address >> 7) & _MASKS[swizzle]) << 4)


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tensor and the box of one copy, dimensions outermost first: lengths, strides in bytes, box; `size` bytes an element.

    int4 counts as bytes of two elements.
    """

    array: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int
    swizzle: int

    def __post_init__(self) -> None:
        if any(stride % 16 for stride in self.strides[:-1]) or self.strides[-1] != self.size:
            raise Fault(f"strides of {self} are not multiples of 16 bytes")
        if max(self.box) > 256 or self.box[-1] * self.size % 16:
            raise Fault(f"a box of {self.box} is longer than 256 or no multiple of 16 bytes wide")
        if self.swizzle > 16 and self.box[-1] * self.size > self.swizzle:
            raise Fault(f"a box of {self.box} is wider than its swizzle")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.size

    def places(self, first: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Byte offsets in the array of the box's elements, flat, and which of them are inside the tensor."""
        offset: np.ndarray = np.zeros(1, np.int64)
        inside: np.ndarray = np.ones(1, bool)
        for start, box, length, stride in zip(first, self.box, self.shape, self.strides, strict=True):
            index = start + np.arange(box)
            offset = (offset[:, None] + index * stride).reshape(-1)
            inside = (inside[:, None] & ((index >= 0) & (index < length))).reshape(-1)
        return offset, inside


def tensor_copy(instruction: Instruction, kernel: Kernel) -> Operation:
    """`cp.async.bulk.tensor`, either way. Issued by one thread."""
    loads = ".shared::cluster.global" in instruction.opcode
    source = instruction.operands[1] if loads else instruction.operands[0]
    tensor = re.fullmatch(r"\[\s*(\S+?)\s*,\s*\{(.*?)\}\s*\]", source)
    if tensor is None:
        raise Unknown(f"unknown instruction: {instruction.text}")
    descriptor = reader(tensor[1], "u64", kernel)
    coordinates = [reader(part.strip(), "s32", kernel) for part in tensor[2].split(",")]
    shared = address_reader(instruction.operands[0 if loads else 1], kernel)
    barrier = address_reader(instruction.operands[2], kernel) if loads else None

    def run(group: Any, mask: np.ndarray | None) -> None:
        if mask is None or mask.sum() != 1:
            raise Fault(f"a copy issued by {LANES if mask is None else int(mask.sum())} threads: {instruction.text}")
        lane = int(np.argmax(mask))
        tensor_map = group.tensor_map(int(descriptor(group)[lane]))
        first = tuple(int(read(group)[lane]) for read in reversed(coordinates))
        place = int(shared(group)[lane])
        local_shared(np.array([place, place + tensor_map.bytes - 1]), instruction.text)
        if place % max(128, 8 * tensor_map.swizzle if tensor_map.swizzle > 16 else 0):
            raise Fault(f"{place:#x} is no place for a copy with a swizzle of {tensor_map.swizzle} bytes: {instruction.text}")
        group.count("copies", 1)
        group.count("bytes copied", tensor_map.bytes)
        if barrier is None:
            group.stores_open.append(_Store(group, tensor_map, first, place, lane))
            if group.timing.copies == "early":
                group.stores_open[-1].read()
            return
        waited = find(group, int(barrier(group)[lane]), instruction.text)
        group.cluster.later(lambda: _load(group.block, tensor_map, first, place, waited, group.memory))

    return run


def _dense(tensor_map: TensorMap, place: int) -> np.ndarray:
    """Addresses in shared memory of the box's bytes, `[elements, size]`."""
    dense = place + np.arange(tensor_map.bytes)
    return swizzled(dense, tensor_map.swizzle).reshape(-1, tensor_map.size)


def _load(block: Any, tensor_map: TensorMap, first: tuple[int, ...], place: int, barrier: Any, memory: Any) -> None:
    offset, inside = tensor_map.places(first)
    bytes_ = np.where(inside, offset, 0)[:, None] + np.arange(tensor_map.size)
    data = np.where(inside[:, None], memory.arrays[tensor_map.array][bytes_], np.uint8(0))
    target = _dense(tensor_map, place)
    block.shared.data[target] = data
    clock = block.copy_clock()
    block.shared.wrote(target, block.copies, clock)
    barrier.copied(tensor_map.bytes, block.copies, clock)


class _Store:
    """A box on its way to global memory: read from shared memory at once or, at the latest, when its group is waited for."""

    def __init__(self, group: Any, tensor_map: TensorMap, first: tuple[int, ...], place: int, lane: int):
        self.group, self.map, self.first, self.place = group, tensor_map, first, place
        # What the issuing thread may hand to the copy engine.
        self.known = group.known(1)[lane // 32].copy()
        self.done = False

    def read(self) -> None:
        if self.done:
            return
        self.done = True
        shared = self.group.block.shared
        source = _dense(self.map, self.place)
        shared.check(source, self.known, "a tensor store")
        offset, inside = self.map.places(self.first)
        target = offset[:, None] + np.arange(self.map.size)
        self.group.memory.arrays[self.map.array][target[inside]] = shared.data[source[inside]]


def bulk_group(instruction: Instruction, kernel: Kernel) -> Operation:
    """`commit_group`, `wait_group`: a thread's stores in groups; a wait leaves the last few under way."""
    if instruction.parts[3] == "commit_group":

        def commit(group: Any, mask: np.ndarray | None) -> None:
            group.stores.append(group.stores_open)
            group.stores_open = []

        return commit
    left = int(instruction.operands[0])

    def wait(group: Any, mask: np.ndarray | None) -> None:
        while len(group.stores) > left:
            for item in group.stores.pop(0):
                item.read()

    return wait


def bulk(instruction: Instruction, kernel: Kernel) -> Operation:
    """`cp.async.bulk...`"""
    if instruction.parts[3] == "tensor":
        return tensor_copy(instruction, kernel)
    if instruction.parts[3] in ("commit_group", "wait_group"):
        return bulk_group(instruction, kernel)
    raise Unknown(f"unknown instruction: {instruction.text}")


def store_async(instruction: Instruction, kernel: Kernel) -> Operation:
    """`st.async`: registers into the shared memory of any block of the cluster, its bytes counted off a barrier there."""
    kind = instruction.parts[-1]
    dtype = TYPES[kind]
    where, barrier = address_reader(instruction.operands[0], kernel), address_reader(instruction.operands[2], kernel)
    reads = [reader(name, kind, kernel) for name in members(instruction.operands[1])]
    size = dtype.itemsize * len(reads)

    def run(group: Any, mask: np.ndarray | None) -> None:
        places, barriers = where(group), barrier(group)
        if mask is not None or not (places & CLUSTER_WINDOW).all() or (barriers != barriers[0]).any():
            raise Fault(f"not of whole warpgroups to one barrier: {instruction.text}")
        data = np.stack([read(group) for read in reads], 1).view(np.uint8)
        target = group.block.cluster[int(places[0]) >> 24 & 0x7F]
        waited = find(group, int(barriers[0]), instruction.text)
        bytes_ = (places & 0xFFFFFF)[:, None] + np.arange(size)

        def land() -> None:
            target.shared.data[bytes_] = data
            clock = target.copy_clock()
            target.shared.wrote(bytes_, target.copies, clock)
            waited.copied(data.size, target.copies, clock)

        group.cluster.later(land)

    return run


def map_address(instruction: Instruction, kernel: Kernel) -> Operation:
    """`mapa`: the address of the same place in another block of the cluster."""
    kind = instruction.parts[-1]
    store, dtype = writer(instruction.operands[0], kernel), TYPES[kind]
    read, rank = reader(instruction.operands[1], kind, kernel), reader(instruction.operands[2], "u32", kernel)

    def run(group: Any, mask: np.ndarray | None) -> None:
        window = CLUSTER_WINDOW | rank(group).astype(np.int64) << 24
        store(group, (window | read(group).astype(np.int64)).astype(dtype), mask)

    return run


BUILDERS = {"cp": bulk, "mapa": map_address}
