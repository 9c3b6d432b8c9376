"""Global and shared memory, and who may see what was written there (PTX ISA 8 "Memory Consistency Model", 9.7.9).

Shared memory remembers, for each word, who wrote it last and when. Writers are *agents*: every warp of a cluster, and the copy
engine of each of its thread blocks. Each warp knows, for each agent, up to which of its writes it may see:

    seen     ordered by barriers: what this warp's own loads may read
    fenced   of these, what a proxy fence of the writer has handed to the asynchronous proxy: what a tensor store or a product
             that this warp issues may read

A read of a word whose last write its reader may not see is a race, whatever the schedule was: a fault. So is a read of a word
that nobody wrote. Barriers join what their threads know (`Knowledge.join`); a fence raises a warp's own `fenced`.
"""

from typing import Any

import numpy as np

from ptx.arithmetic import Operation
from ptx.parser import Fault, Instruction, Kernel, address, members
from ptx.values import LANES, SHARED_BASE, THREAD, TYPES, reader, writer

SHARED_BYTES = 232448  # an H100's thread block, at most
GLOBAL_BASE, GLOBAL_STEP = 0x7000_0000_0000, 0x1_0000_0000
CLUSTER_WINDOW = 0x8000_0000  # addresses of shared::cluster: this, the block's rank from bit 24 on, and the offset
WARPS = LANES // 32
_WARP = THREAD // 32


class Knowledge:
    """The writes of each agent that each warp of a cluster may see: `[seen or fenced, warp, agent]`."""

    def __init__(self, warps: int, blocks: int):
        self.warps = warps
        self.nobody = warps + blocks
        self.table = np.zeros((2, warps, warps + blocks + 1), np.int64)
        self.table[0, range(warps), range(warps)] = 1
        self.table[:, :, self.nobody] = -1

    def copies_of(self, rank: int) -> int:
        """The agent that is the copy engine of a block."""
        return self.warps + rank

    def clock(self, warp: int) -> int:
        """Of a warp's next write."""
        return int(self.table[0, warp, warp])

    def release(self, rows: slice) -> np.ndarray:
        """Return what these warps together know, to be joined by whoever waits; later writes of theirs are not in it."""
        known = self.table[:, rows].max(axis=1)
        for warp in range(rows.start, rows.stop):
            self.table[0, warp, warp] += 1
        return known

    def acquire(self, rows: slice, known: np.ndarray) -> None:
        """Let these warps see what was released."""
        np.maximum(self.table[:, rows], known[:, None], out=self.table[:, rows])

    def fence(self, rows: slice) -> None:
        """Hand each warp's own writes up to now to the asynchronous proxy."""
        for warp in range(rows.start, rows.stop):
            self.table[1, warp, warp] = self.table[0, warp, warp]
            self.table[0, warp, warp] += 1


class Shared:
    """A thread block's shared memory, random bytes at first."""

    def __init__(self, knowledge: Knowledge, seed: int):
        size = SHARED_BYTES + SHARED_BASE
        self.data = np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8).copy()
        self.knowledge = knowledge
        self.writer = np.full(size // 4, knowledge.nobody, np.int16)
        self.clock = np.zeros(size // 4, np.int64)

    def wrote(self, places: np.ndarray, agent: Any, clock: Any) -> None:
        """Note who wrote the words at byte addresses `places`."""
        self.writer[places >> 2] = agent
        self.clock[places >> 2] = clock

    def check(self, places: np.ndarray, known: np.ndarray, what: str) -> None:
        """Fault unless a reader who knows `known` (by agent, or by place and agent) may see the words at `places`."""
        words = places >> 2
        writers, clocks = self.writer[words], self.clock[words]
        limit = known[writers] if known.ndim == 1 else known[_WARP.reshape(-1, *[1] * (places.ndim - 1)), writers]
        if (clocks <= limit).all():
            return
        bad = np.argmax((clocks > limit).reshape(-1))
        place, agent = int(places.reshape(-1)[bad]), int(writers.reshape(-1)[bad])
        if agent == self.knowledge.nobody:
            raise Fault(f"{what} reads shared memory that nobody wrote, at {place:#x}")
        who = f"warp {agent}" if agent < self.knowledge.warps else "the copy engine"
        raise Fault(f"{what} reads {place:#x}, which {who} wrote, without a barrier (and a proxy fence) between")


class Global:
    """Arrays in global memory, each in an address range of its own."""

    def __init__(self, arrays: list[np.ndarray]):
        self.sizes = [array.size for array in arrays]
        # Views of wider elements want whole ones.
        self.arrays = [np.concatenate([array, np.zeros(-array.size % 16, np.uint8)]) for array in arrays]

    def base(self, number: int) -> int:
        return GLOBAL_BASE + GLOBAL_STEP * number

    def find(self, addresses: np.ndarray, size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The array that all addresses lie in and their offsets; `size`: bytes touched at each."""
        number = (addresses - GLOBAL_BASE) // GLOBAL_STEP
        if addresses.size == 0 or (number != number[0]).any() or not 0 <= number[0] < len(self.arrays):
            raise Fault(f"{what}: address {int(addresses[0]):#x} is in no array")
        offset = addresses - self.base(int(number[0]))
        if offset.min() < 0 or offset.max() + size > self.sizes[number[0]]:
            raise Fault(f"{what}: past the end of array {number[0]} of {self.sizes[number[0]]} bytes, at {int(offset.max())}")
        return self.arrays[number[0]], offset


def address_reader(operand: str, kernel: Kernel) -> Any:
    """A function from a warpgroup to 128 byte addresses (int64) of `[base+offset]`; the base may have 32 or 64 bits."""
    base, offset = address(operand)
    narrow = base in kernel.registers and kernel.widths[kernel.registers[base]] == 32
    read = reader(base, "u32" if narrow else "u64", kernel)
    return lambda group: read(group).astype(np.int64) + offset


def local_shared(addresses: np.ndarray, what: str) -> np.ndarray:
    """Offsets into the own block's shared memory.

    Raises:
        Fault: an address is another block's, or lies outside.
    """
    if addresses.min() < SHARED_BASE or addresses.max() >= SHARED_BASE + SHARED_BYTES:
        raise Fault(f"{what}: {int(addresses.max()):#x} is no address of this block's shared memory")
    return addresses


def _space(instruction: Instruction) -> str:
    return next((part for part in instruction.parts[1:] if part in ("global", "shared", "param")), "generic")


def load(instruction: Instruction, kernel: Kernel) -> Operation:
    """`ld` from parameters, global and shared memory, one to four elements a thread."""
    kind, space = instruction.parts[-1], _space(instruction)
    stores = [writer(name, kernel) for name in members(instruction.operands[0])]
    if space == "param":
        name, _ = address(instruction.operands[1])
        return lambda group, mask: stores[0](group, np.full(LANES, group.parameters[name], np.uint64), mask)
    where, dtype, count = address_reader(instruction.operands[1], kernel), TYPES[kind], len(stores)
    size = dtype.itemsize
    steps = size * np.arange(count)

    def run(group: Any, mask: np.ndarray | None) -> None:
        if mask is not None and not mask.any():
            return
        places = where(group)[:, None] + steps
        if (places[:, 0] % (size * count)).any():
            raise Fault(f"misaligned: {instruction.text}")
        if mask is not None:
            # Lanes that do not load read where the first one that does reads.
            places = np.where(mask[:, None], places, places[np.argmax(mask)])
        if space == "shared":
            local_shared(places, instruction.text)
            group.block.shared.check(places, group.known(0), instruction.text)
            data = group.block.shared.data.view(dtype)[places // size]
        else:
            array, offsets = group.memory.find(places.reshape(-1), size, instruction.text)
            data = array.view(dtype)[offsets // size].reshape(LANES, count)
        for i, store in enumerate(stores):
            store(group, np.ascontiguousarray(data[:, i]), mask)

    return run


def store(instruction: Instruction, kernel: Kernel) -> Operation:
    """`st` to global and shared memory, one to four elements a thread; threads of a warp that meet leave the last one's."""
    kind, space = instruction.parts[-1], _space(instruction)
    where, dtype = address_reader(instruction.operands[0], kernel), TYPES[kind]
    reads = [reader(name, kind, kernel) for name in members(instruction.operands[1])]
    size, count = dtype.itemsize, len(reads)
    steps = size * np.arange(count)

    def run(group: Any, mask: np.ndarray | None) -> None:
        if mask is not None and not mask.any():
            return
        lanes = slice(None) if mask is None else mask
        places = (where(group)[:, None] + steps)[lanes]
        if (places[:, 0] % (size * count)).any():
            raise Fault(f"misaligned: {instruction.text}")
        data = np.stack([read(group) for read in reads], 1)[lanes]
        if space == "shared":
            local_shared(places, instruction.text)
            shared = group.block.shared
            shared.data.view(dtype)[places // size] = data
            warps = (group.rows.start + _WARP)[lanes]
            clocks = group.block.knowledge.table[0, warps, warps]
            shared.wrote(places, warps[:, None], clocks[:, None])
        else:
            array, offsets = group.memory.find(places.reshape(-1), size, instruction.text)
            array.view(dtype)[offsets // size] = data.reshape(-1)

    return run


BUILDERS = {"ld": load, "st": store}
