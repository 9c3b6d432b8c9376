"""Machine code of a kernel: the registers of a product in flight that it touches before the wait.

In PTX, LLVM moves arithmetic on accumulators above `wgmma.wait_group` (`machine.Group.do_later`); only the assembler's output
says whether it ran behind the wait. PTX goes through ptxas and nvdisasm here, and the listing is read from top to bottom: a loop
begins its second pass as its first, because every product of a loop is waited for within it or by its successor.
"""

import dataclasses
import functools
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?(?!\w)")
_WIDTH = {".128": 4, ".64": 2}
# Instructions whose first register is read, not written.
_READ_ONLY = ("ST", "RED", "BAR", "SYNCS", "UTMA", "R2UR", "ISETP", "FSETP", "BRA", "EXIT")

# A byte of a register.
Byte = tuple[int, int]


def _tool(name: str) -> Path | None:
    """A program of the CUDA wheels, wherever they are installed; None without it."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((path for folder in folders for path in sorted(folder.rglob(name)) if path.is_file()), None)


def missing() -> str | None:
    """The reason why no machine code can be listed here, or None."""
    absent = [name for name in ("ptxas", "nvdisasm") if _tool(name) is None]
    return f"{' and '.join(absent)} not installed (make gpu-compile installs them)" if absent else None


def listing(ptx: str) -> str:
    """The machine code of a PTX module for sm_90a, as text."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        # The version that the wheel's ptxas knows; JAX carries a newer one inside, and these kernels ask for nothing new.
        source.write_text(re.sub(r"(?m)^\.version \d+\.\d+", ".version 8.8", ptx))
        assemble = [str(_tool("ptxas")), "-arch=sm_90a", "-O3", "-o", str(binary), str(source)]
        subprocess.run(assemble, check=True, capture_output=True)
        done = subprocess.run([str(_tool("nvdisasm")), "-c", str(binary)], check=True, capture_output=True, text=True)
    return done.stdout


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    operands: str
    sometimes: bool  # under a predicate

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands.strip()}"

    @functools.cached_property
    def registers(self) -> frozenset[int]:
        """Everything that is read or written."""
        width = next((count for suffix, count in _WIDTH.items() if suffix in self.opcode), 1)
        found: set[int] = set()
        for number, pair in _REGISTER.findall(self.operands):
            found |= set(range(int(number), int(number) + max(width, 2 if pair else 1)))
        return frozenset(found)

    @functools.cached_property
    def selected(self) -> tuple[Byte | None, ...] | None:
        """Of a permutation with a constant selector: the byte that each byte of the result is taken from (or the sign of)."""
        parts = [part.strip() for part in self.operands.split(",")]
        if self.opcode != "PRMT" or len(parts) != 4 or not parts[2].startswith("0x"):
            return None
        sources = [_REGISTER.match(parts[1]), _REGISTER.match(parts[3])]
        picks = [int(parts[2], 16) >> 4 * i & 7 for i in range(4)]
        return tuple((int(source[1]), pick % 4) if (source := sources[pick // 4]) else None for pick in picks)

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """The registers that an instruction other than a product writes: its first operand, over the width of the access."""
        first = _REGISTER.match(self.operands.strip())
        if first is None or self.opcode.startswith(_READ_ONLY):
            return frozenset()
        # A width in the name is a load's, or a result's of two registers; anything else is taken to write one.
        width = next((count for suffix, count in _WIDTH.items() if suffix in self.opcode), 1)
        return frozenset(range(int(first[1]), int(first[1]) + width))

    @functools.cached_property
    def read(self) -> frozenset[Byte]:
        """The bytes that it looks at."""
        if self.selected is not None:
            return frozenset(byte for byte in self.selected if byte is not None)
        first = _REGISTER.match(self.operands.strip())
        rest = self.operands.strip()[first.end() :] if first is not None and self.written else self.operands
        others = dataclasses.replace(self, operands=rest).registers
        return frozenset((register, byte) for register in others for byte in range(4))


def touched_too_early(text: str) -> list[str]:
    """Instructions that read or write an accumulator between its product and the wait for it.

    LLVM widens an int8 inside a vector whose upper half is undefined, and ptxas takes any register for that half: a permutation
    picks up two bytes that mean nothing, maybe of an accumulator. Such a permutation is let pass, and its result followed
    through every branch: whoever then looks at one of those bytes touches the accumulator.
    """
    code, targets = _instructions(text)
    found: list[tuple[int, str]] = []
    open_: set[int] = set()
    groups: list[set[int]] = []
    for place, instruction in enumerate(code):
        opcode, operands = instruction.opcode, instruction.operands
        if "GMMA" in opcode:
            shape = re.search(r"\.64x(\d+)x", opcode)
            first = _REGISTER.search(operands)
            assert shape is not None
            assert first is not None
            open_ |= set(range(int(first[1]), int(first[1]) + int(shape[1]) // 2))
            if "gsb0" in operands:
                groups.append(open_)
                open_ = set()
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            left = re.search(r"gsb0,\s*(0x[0-9a-f]+)", operands)
            assert left is not None
            groups = groups[max(0, len(groups) - int(left[1], 16)) :]
        elif clash := instruction.registers & (flying := open_.union(*groups)):
            stray = _stray_half(instruction, flying)
            if stray is None:
                found.append((place, f"{instruction} touches R{min(clash)}"))
            elif (reader := _reader(code, targets, place, stray)) is not None:
                found.append((reader, f"{code[reader]} looks at what {instruction} took of R{min(clash)}"))
    return [text for _, text in sorted(found)]


def _instructions(text: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions of a listing, and the one that each label stands before."""
    code: list[_Instruction] = []
    targets: dict[str, int] = {}
    for line in text.splitlines():
        if (label := _LABEL.match(line)) is not None:
            targets[label[1]] = len(code)
        elif (match := _INSTRUCTION.search(line)) is not None:
            code.append(_Instruction(match[2], match[3], bool(match[1])))
    return code, targets


def _stray_half(instruction: _Instruction, flying: set[int]) -> frozenset[Byte] | None:
    """The bytes of its result that a permutation takes from registers in flight, if that is one half, and all that it does."""
    if instruction.selected is None or instruction.written & flying:
        return None
    (target,) = instruction.written
    taken = [i for i, byte in enumerate(instruction.selected) if byte is not None and byte[0] in flying]
    return frozenset((target, i) for i in taken) if taken in ([], [0, 1], [2, 3]) else None


def _reader(code: list[_Instruction], targets: dict[str, int], place: int, stray: frozenset[Byte]) -> int | None:
    """The first instruction that looks at one of the bytes `stray`, written at `place`, on any way through the code."""
    seen: dict[int, frozenset[Byte]] = {}
    ways = [(place + 1, stray)]
    while ways:
        at, bytes_ = ways.pop()
        if at >= len(code) or bytes_ <= seen.get(at, frozenset()):
            continue
        bytes_ |= seen.get(at, frozenset())
        seen[at] = bytes_
        instruction = code[at]
        if bytes_ & instruction.read:
            return at
        target = re.search(r"\(?(\.L_x_\d+)\)?", instruction.operands) if instruction.opcode.startswith("BRA") else None
        if target is not None:
            ways.append((targets[target[1]], bytes_))
        ends = target is not None or instruction.opcode.startswith("EXIT")
        if instruction.sometimes or not ends:
            kept = bytes_ if instruction.sometimes else frozenset(b for b in bytes_ if b[0] not in instruction.written)
            if kept:
                ways.append((at + 1, kept))
    return None
