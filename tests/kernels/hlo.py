"""Kernels and copies of a compiled program, read from XLA's optimized HLO."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+[0-9]*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Not launched: names for what is there already.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
# A fusion of nothing else computes nothing: it moves what is there.
_MOVES = {"parameter", "constant", "bitcast", "copy", "slice", "dynamic-slice", "reshape", "transpose", "pad", "concatenate"}
_KERNEL = 'custom_call_target="mosaic_gpu'


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `rest`: its operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    @property
    def called(self) -> str:
        """The computation of a fusion, or the body of a loop."""
        found = re.search(r"(?:calls|body|to_apply)=%?([\w.\-]+)", self.rest)
        return "" if found is None else found[1]

    @property
    def result(self) -> str:
        """The shape of what is made; of what begins and ends later, without its operands."""
        inside = re.match(r"\(\(.*?\), (.*), u32\[\]\)$", self.shape) if self.opcode.endswith("-start") else None
        return self.shape if inside is None else inside[1]

    @property
    def bytes(self) -> int:
        """Bytes of the result; codes of 4 bits take half a byte."""
        return sum(size(dtype, dims) for dtype, dims in _ARRAY.findall(self.result))


def size(dtype: str, dims: str) -> int:
    """Bytes of an array `dtype[dims]` as HLO writes them.

    >>> size("s4", "8,64"), size("bf16", "3"), size("pred", "")
    (256, 6, 1)
    """
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return -(-bits * math.prod(int(n) for n in dims.split(",") if n) // 8)


class Program:
    """An optimized HLO module: its computations by name, and the name of the entry."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if (head := _COMPUTATION.match(line)) is not None:
                lines = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) is not None:
                lines[found[1]] = Instruction(*found.groups())

    def executed(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that one run executes, with its computation and how often: loops of unknown length once."""
        name = self.entry if computation is None else computation
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                trips = _TRIPS.search(instruction.rest)
                body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
                assert body is not None
                yield from self.executed(body[1], times * (int(trips[1]) if trips else 1))
            elif instruction.opcode == "call":
                yield from self.executed(instruction.called, times)
            elif instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
                yield name, instruction, times

    def is_kernel(self, instruction: Instruction) -> bool:
        """Whether it is a Mosaic kernel, alone or (JAX 0.11) in a fusion that hands it parts of arrays where they lie."""
        if instruction.opcode == "fusion":
            return any(self.is_kernel(inside) for inside in self.computations[instruction.called].values())
        return instruction.opcode == "custom-call" and _KERNEL in instruction.rest

    def kernels(self) -> int:
        """Mosaic kernels of one run."""
        return sum(times for _, instruction, times in self.executed() if self.is_kernel(instruction))

    def launched(self) -> int:
        """Kernels and copies of one run (of a loop of unknown length, one turn)."""
        return sum(times for _, _, times in self.executed())

    def copied_for_kernels(self) -> list[tuple[Instruction, int]]:
        """Arrays of the program's own arguments that are copied, whole or in part, for a kernel to read; and how often."""
        found: dict[str, tuple[Instruction, int]] = {}
        for name, instruction, times in self.executed():
            if not self.is_kernel(instruction):
                continue
            for operand in instruction.operands:
                source = self._behind(name, operand)
                if source is not None and self._moves(source) and self._is_given(name, source):
                    found[source.name] = (source, times)
        return list(found.values())

    def moved(self, at_least: int) -> list[Instruction]:
        """Instructions that only move so many bytes, whoever reads them."""
        return [i for _, i, _ in self.executed() if i.bytes >= at_least and self._moves(i)]

    def _behind(self, computation: str, name: str) -> Instruction | None:
        """The instruction that made an array, behind those that only rename it."""
        instruction = self.computations[computation].get(name)
        while instruction is not None and (instruction.opcode == "bitcast" or instruction.opcode.endswith("-done")):
            instruction = self.computations[computation].get(instruction.operands[0])
        return instruction

    @functools.cache  # noqa: B019 -- a program lives as long as the test that reads it
    def _only_moves(self, computation: str) -> bool:
        return all(instruction.opcode in _MOVES for instruction in self.computations[computation].values())

    def _moves(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("fusion", "fusion-start"):
            return self._only_moves(instruction.called)
        return instruction.opcode in _MOVES - {"parameter", "constant"} or instruction.opcode.startswith("copy-")

    def _is_given(self, computation: str, instruction: Instruction) -> bool:
        """Whether what an instruction moves is an argument, or is carried by a loop, and was not computed beside it."""
        if not instruction.operands:
            return False
        source = self._behind(computation, instruction.operands[0])
        while source is not None and source.opcode == "get-tuple-element":
            source = self._behind(computation, source.operands[0])
        return source is not None and source.opcode == "parameter"
