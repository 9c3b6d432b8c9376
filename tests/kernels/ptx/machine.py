"""Thread blocks, warpgroups and the schedule: one cluster after the other, its groups in turns of random length.

Branches must be taken by a whole warpgroup or by none of it; instructions may be predicated by thread. A kernel ends well when
every thread has returned, no barrier waits for bytes, and no store or product is left that nobody waited for.
"""

import collections
import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import arithmetic, barriers, copies, memory, tensor_core
from ptx.barriers import STALL
from ptx.memory import WARPS, Global, Knowledge, Shared
from ptx.parser import Fault, Instruction, Kernel, Unknown
from ptx.tensor_core import Product
from ptx.values import LANES, PARAMETER_BASE, PARAMETER_STEP, UNSIGNED, reader

_TURNS = (3, 20, 100, 400)  # instructions a group runs before another has its turn
_NOTHING = ("setmaxnreg", "nanosleep", "prefetch")


@dataclasses.dataclass(frozen=True)
class Timing:
    """When asynchronous work is done: `early` at its issue, `late` when the program waits for it or can do nothing else."""

    copies: str
    products: str
    seed: int = 0


# A slot that is given back too soon is overwritten under the first; one that is read too soon holds old bytes under the second.
OPPOSITE = (Timing("early", "late", 1), Timing("late", "early", 2))


def _build(instruction: Instruction, kernel: Kernel) -> Callable[[Any], Any]:
    """The instruction as a function of a warpgroup: None, the next instruction's number, or `STALL`."""
    name = instruction.parts[0]
    guard = reader(instruction.predicate, "pred", kernel) if instruction.predicate else None
    if name in ("bra", "ret", "exit"):
        return _jump(instruction, kernel, guard)
    builder: Any = _BUILDERS.get(name)
    if name in _NOTHING:
        return lambda group: None
    if instruction.opcode.startswith("st.async"):
        builder = copies.store_async
    elif instruction.opcode.startswith("barrier.cluster"):
        builder = barriers.cluster_barrier
    if builder is None:
        raise Unknown(f"unknown instruction: {instruction.text}")
    try:
        run = builder(instruction, kernel)
    except KeyError as unknown:
        raise Unknown(f"unknown instruction, for {unknown}: {instruction.text}") from unknown
    if guard is None:
        if name not in arithmetic.BUILDERS:
            return lambda group: run(group, None)
        numbers = [
            kernel.registers[part]
            for part in re.findall(r"[%\w]+(?:@\d+)?", ",".join(instruction.operands))
            if part in kernel.registers
        ]

        def perhaps_later(group: Any) -> None:
            if group.busy and not group.busy.keys().isdisjoint(numbers):
                group.do_later(run, numbers)
            else:
                run(group, None)

        return perhaps_later

    def guarded(group: Any) -> Any:
        mask = guard(group)
        return run(group, None if mask.all() else mask) if mask.any() else None

    return guarded


_BUILDERS: dict[str, Any] = {
    **arithmetic.BUILDERS,
    **memory.BUILDERS,
    **barriers.BUILDERS,
    **copies.BUILDERS,
    **tensor_core.BUILDERS,
}


def _jump(instruction: Instruction, kernel: Kernel, guard: Any) -> Callable[[Any], Any]:
    end = len(kernel.instructions)
    target = kernel.labels[instruction.operands[0]] if instruction.parts[0] == "bra" else end

    def run(group: Any) -> Any:
        if guard is None:
            return target
        taken = guard(group)
        if taken.all():
            return target
        if taken.any():
            raise Fault(f"threads of a warpgroup part: {instruction.text}")
        return None

    return run


class Group:
    """A warpgroup: 128 threads, their registers, and what they have under way."""

    def __init__(self, cluster: "Cluster", block: "Block", index: int):
        self.cluster, self.block, self.index = cluster, block, index
        self.machine, self.timing, self.memory = cluster.machine, cluster.machine.timing, cluster.machine.memory
        self.parameters = cluster.machine.parameters
        first = WARPS * (block.rank * len(range(0, cluster.machine.kernel.threads, LANES)) + index)
        self.rows = slice(first, first + WARPS)
        self.registers: list[Any] = [None] * len(cluster.machine.kernel.widths)
        self.position = 0
        self.meeting: int | None = None
        self.arrivals = 0
        # Products: issued, committed, arithmetic that waits for them, and by register how many of these hold it.
        self.issued: list[Product] = []
        self.committed: list[list[Product]] = []
        self.busy: dict[int, int] = {}
        self.late: list[tuple[Any, list[int]]] = []
        self.stores_open: list[Any] = []
        self.stores: list[list[Any]] = []

    @property
    def done(self) -> bool:
        return self.position >= len(self.machine.program)

    def run(self, turns: int) -> bool:
        """Run up to so many instructions; whether any was run."""
        program, moved = self.machine.program, False
        for _ in range(turns):
            if self.done:
                break
            following = program[self.position](self)
            if following is STALL:
                return moved
            moved = True
            self.position = self.position + 1 if following is None else following
        if self.done and (self.issued or self.committed or self.stores_open or any(self.stores)):
            raise Fault("a warpgroup ends with products or stores that it has not waited for")
        return moved

    def known(self, which: int) -> np.ndarray:
        """The writes that each of the four warps may see, `[warp, agent]`: by own loads (0), through copies and products (1)."""
        return self.block.knowledge.table[which, self.rows]

    def undefined(self, number: int) -> np.ndarray:
        """The value of a register that nothing was put into."""
        self.count("undefined", 1)
        dtype = UNSIGNED[self.machine.kernel.widths[number]]
        rubbish = 0xA5A5A5A5A5A5A5A5 >> 64 - 8 * dtype.itemsize
        return np.zeros(LANES, bool) if dtype.kind == "b" else np.full(LANES, rubbish, dtype)

    def count(self, what: str, amount: int) -> None:
        self.machine.counts[what] += amount

    def tensor_map(self, place: int) -> Any:
        """The descriptor at an address among the parameters."""
        number, odd = divmod(place - self.machine.maps_at, copies.MAP_BYTES)
        if odd or not 0 <= number < len(self.machine.maps):
            raise Fault(f"no tensor map at {place:#x}")
        return self.machine.maps[number]

    def _hold(self, numbers: Any, change: int) -> None:
        for number in numbers:
            self.busy[number] = self.busy.get(number, 0) + change
            if not self.busy[number]:
                del self.busy[number]

    def issue(self, product: Product) -> None:
        self.issued.append(product)
        self._hold(product.registers, 1)

    def commit(self) -> None:
        self.committed.append(self.issued)
        self.issued = []

    def wait(self, left: int) -> None:
        """Finish all committed products but those of the last `left` groups."""
        while len(self.committed) > left:
            for product in self.committed.pop(0):
                product.finish()
                self._hold(product.registers, -1)
        # In their order, as far as what they touch is free.
        waiting, self.late = self.late, []
        for _, numbers in waiting:
            self._hold(numbers, -1)
        for run, numbers in waiting:
            if self.busy.keys().isdisjoint(numbers):
                run(self, None)
            else:
                self.do_later(run, numbers)

    def do_later(self, run: Any, numbers: list[int]) -> None:
        """Arithmetic on a register that a product in flight holds, done when the product is.

        LLVM moves it above `wgmma.wait_group`; ptxas keeps it behind (`sass.py` checks that it did). Memory never sees it.
        """
        self.late.append((run, numbers))
        self._hold(numbers, 1)


class Block:
    """A thread block: its shared memory, barriers, and warpgroups."""

    def __init__(self, cluster: "Cluster", index: int, rank: int):
        self.index, self.rank = index, rank
        self.knowledge = cluster.knowledge
        self.copies = cluster.knowledge.copies_of(rank)
        self.shared = Shared(cluster.knowledge, index)
        self.barriers: dict[int, barriers.MBarrier] = {}
        self.meetings: dict[int, barriers.Meeting] = {}
        self._clock = 0
        self.cluster: list[Block] = cluster.blocks
        self.groups = [Group(cluster, self, i) for i in range(cluster.machine.kernel.threads // LANES)]

    def copy_clock(self) -> int:
        """The time of the copy engine's next write."""
        self._clock += 1
        return self._clock


class Cluster:
    """Blocks that run together."""

    def __init__(self, machine: "Machine", first: int):
        self.machine = machine
        size = machine.kernel.cluster
        self.knowledge = Knowledge(size * machine.kernel.threads // 32, size)
        self.pending: list[Callable[[], None]] = []
        self.blocks: list[Block] = []
        for rank in range(size):
            self.blocks.append(Block(self, first + rank, rank))

    def later(self, land: Callable[[], None]) -> None:
        """Do what a copy does, now or when nothing else can go on."""
        if self.machine.timing.copies == "early":
            land()
        else:
            self.pending.append(land)

    def run(self) -> None:
        choose = self.machine.random
        groups = [group for block in self.blocks for group in block.groups]
        while live := [group for group in groups if not group.done]:
            choose.shuffle(live)
            # Every group has its turn, whether or not another one moved.
            moved = [group.run(choose.choice(_TURNS)) for group in live]
            if any(moved):
                continue
            if not self.pending:
                raise Fault("deadlock: " + "; ".join(self._where(group) for group in live))
            self.pending.pop(choose.randrange(len(self.pending)))()
        for land in self.pending:
            land()
        for block in self.blocks:
            if any(barrier.bytes for barrier in block.barriers.values()):
                raise Fault("a barrier is left with bytes that no copy brought")

    def _where(self, group: Group) -> str:
        text = self.machine.kernel.instructions[group.position].text
        return f"block {group.block.index} warpgroup {group.index} at {text[:70]!r}"


class Machine:
    """A GPU for one launch. `arrays`: flat uint8, written in place; `pointers`: of each pointer parameter, the array's number."""

    def __init__(
        self, kernel: Kernel, arrays: list[np.ndarray], pointers: list[int], maps: list[copies.TensorMap], timing: Timing
    ):
        self.kernel, self.maps, self.timing = kernel, maps, timing
        self.memory = Global(arrays)
        self.random = random.Random(timing.seed)
        self.counts: collections.Counter[str] = collections.Counter()
        names = [name for name, _ in kernel.parameters]
        plain = [name for name, size in kernel.parameters if size == 8]
        if len(plain) != len(pointers):
            raise Fault(f"{len(plain)} pointer parameters, {len(pointers)} arrays for them")
        self.parameters = {name: self.memory.base(number) for name, number in zip(plain, pointers, strict=True)}
        large = next((i for i, (_, size) in enumerate(kernel.parameters) if size > 8), len(names))
        self.maps_at = PARAMETER_BASE + PARAMETER_STEP * large
        self.program = [_build(instruction, kernel) for instruction in kernel.instructions]

    def launch(self, blocks: int) -> list[np.ndarray]:
        """Run so many thread blocks; returns the arrays as they are afterwards."""
        with np.errstate(all="ignore"):
            for first in range(0, blocks, self.kernel.cluster):
                Cluster(self, first).run()
        return [array[:size] for array, size in zip(self.memory.arrays, self.memory.sizes, strict=True)]
