"""Barriers and fences (PTX ISA 9.7.13): `bar.sync`, `mbarrier`, the cluster barrier, the proxy fence.

An `mbarrier` counts arrivals and bytes of its current phase; with both at zero the phase is complete, the next one begins, and
who waits for the old one's parity goes on. A wait that cannot go on gives its turn back (`STALL`); a deadlock is found by the
machine.
"""

import dataclasses
from typing import Any

import numpy as np

from ptx.arithmetic import Operation
from ptx.memory import CLUSTER_WINDOW, address_reader
from ptx.parser import Fault, Instruction, Kernel, Unknown
from ptx.values import LANES, reader, writer

STALL = object()


@dataclasses.dataclass
class MBarrier:
    """`expected` arrivals a phase, `pending` of the current one, `bytes` announced and not yet copied."""

    expected: int
    pending: int
    known: np.ndarray  # what those who arrived in this phase know
    released: np.ndarray  # what who waits for the last phase learns
    phase: int = 0
    bytes: int = 0

    def arrive(self, count: int, known: np.ndarray) -> None:
        if count > self.pending:
            raise Fault(f"{count} arrivals at a barrier that waits for {self.pending}")
        self.pending -= count
        np.maximum(self.known, known, out=self.known)
        self._complete()

    def copied(self, size: int, agent: int, clock: int) -> None:
        """Take `size` bytes off, written by `agent` at `clock`."""
        self.bytes -= size
        self.known[:, agent] = np.maximum(self.known[:, agent], clock)
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected
            self.released = self.known.copy()


def find(group: Any, place: int, what: str) -> MBarrier:
    """The barrier at an address of this block or, within `CLUSTER_WINDOW`, of any of the cluster.

    Raises:
        Fault: there is none.
    """
    block = group.block
    if place & CLUSTER_WINDOW:
        block = block.cluster[place >> 24 & 0x7F]
        place &= 0xFFFFFF
    if place not in block.barriers:
        raise Fault(f"no barrier at {place:#x}: {what}")
    return block.barriers[place]


def _initialize(instruction: Instruction, kernel: Kernel) -> Operation:
    where, count = address_reader(instruction.operands[0], kernel), reader(instruction.operands[1], "u32", kernel)

    def run(group: Any, mask: np.ndarray | None) -> None:
        lane = _only_lane(mask, instruction)
        arrivals = int(count(group)[lane])
        shape = group.block.knowledge.table[:, 0].shape
        nothing = np.full(shape, -1, np.int64)
        group.block.barriers[int(where(group)[lane])] = MBarrier(arrivals, arrivals, nothing, nothing.copy())

    return run


def _only_lane(mask: np.ndarray | None, instruction: Instruction) -> int:
    if mask is None or mask.sum() != 1:
        raise Fault(f"issued by {LANES if mask is None else int(mask.sum())} threads, not one: {instruction.text}")
    return int(np.argmax(mask))


def _arrive(instruction: Instruction, kernel: Kernel) -> Operation:
    state = writer(instruction.operands[0], kernel)
    where = address_reader(instruction.operands[1], kernel)
    amount = reader(instruction.operands[2], "u32", kernel) if len(instruction.operands) > 2 else None
    expects = "expect_tx" in instruction.parts

    def run(group: Any, mask: np.ndarray | None) -> None:
        lanes = np.ones(LANES, bool) if mask is None else mask
        places = where(group)[lanes]
        if (places != places[0]).any():
            raise Fault(f"threads arrive at several barriers: {instruction.text}")
        barrier = find(group, int(places[0]), instruction.text)
        total = int(lanes.sum()) if amount is None else int(amount(group)[lanes].sum())
        known = group.block.knowledge.release(group.rows)
        if expects:
            barrier.bytes += total
            barrier.arrive(int(lanes.sum()), known)
        else:
            barrier.arrive(total, known)
        state(group, np.zeros(LANES, np.uint64), mask)

    return run


def _wait(instruction: Instruction, kernel: Kernel) -> Operation:
    done = writer(instruction.operands[0], kernel)
    where, parity = address_reader(instruction.operands[1], kernel), reader(instruction.operands[2], "u32", kernel)

    def run(group: Any, mask: np.ndarray | None) -> Any:
        barrier = find(group, int(where(group)[0]), instruction.text)
        if barrier.phase & 1 == int(parity(group)[0]) & 1:
            return STALL
        group.block.knowledge.acquire(group.rows, barrier.released)
        done(group, np.ones(LANES, bool), mask)
        return None

    return run


def mbarrier(instruction: Instruction, kernel: Kernel) -> Operation:
    """`mbarrier.init`, `.arrive` with or without `.expect_tx`, `.try_wait.parity`."""
    builders = {"init": _initialize, "arrive": _arrive, "try_wait": _wait}
    if instruction.parts[1] not in builders:
        raise Unknown(f"unknown instruction: {instruction.text}")
    return builders[instruction.parts[1]](instruction, kernel)


@dataclasses.dataclass
class Meeting:
    """A `bar.sync` under way: the groups that are there, and the turn it is."""

    groups: list[Any] = dataclasses.field(default_factory=list)
    turn: int = 0


def meet(instruction: Instruction, kernel: Kernel) -> Operation:
    """`bar.sync name, threads`: goes on when so many threads of the block are there."""
    name = reader(instruction.operands[0], "u32", kernel)
    count = reader(instruction.operands[1], "u32", kernel) if len(instruction.operands) > 1 else None

    def run(group: Any, mask: np.ndarray | None) -> Any:
        meeting = group.block.meetings.setdefault(int(name(group)[0]), Meeting())
        if group.meeting is not None:
            if group.meeting == meeting.turn:
                return STALL
            group.meeting = None
            return None
        wanted = int(count(group)[0]) if count else kernel.threads
        meeting.groups.append(group)
        if LANES * len(meeting.groups) < wanted:
            group.meeting = meeting.turn
            return STALL
        knowledge = group.block.knowledge
        known = np.max([knowledge.release(other.rows) for other in meeting.groups], axis=0)
        for other in meeting.groups:
            knowledge.acquire(other.rows, known)
        meeting.groups = []
        meeting.turn += 1
        return None

    return run


def cluster_barrier(instruction: Instruction, kernel: Kernel) -> Operation:
    """`barrier.cluster.arrive` and `.wait`. Relaxed: it orders barriers' initialization, which a fence precedes, and no data."""
    if instruction.parts[2] == "arrive":
        if "relaxed" not in instruction.parts:
            raise Unknown(f"unknown instruction: {instruction.text}")

        def arrive(group: Any, mask: np.ndarray | None) -> None:
            group.arrivals += 1

        return arrive

    def wait(group: Any, mask: np.ndarray | None) -> Any:
        there = all(other.arrivals >= group.arrivals for block in group.block.cluster for other in block.groups)
        return None if there else STALL

    return wait


def fence(instruction: Instruction, kernel: Kernel) -> Operation:
    """`fence.proxy.async` hands a warp's writes to copies and products; other fences order nothing that is modelled."""
    if instruction.opcode.startswith("fence.proxy.async"):
        return lambda group, mask: group.block.knowledge.fence(group.rows)
    return lambda group, mask: None


BUILDERS = {"mbarrier": mbarrier, "bar": meet, "fence": fence}
