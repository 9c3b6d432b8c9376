"""Machine code of a kernel: the registers of a product in flight that it touches before the wait.

In PTX, LLVM moves arithmetic on accumulators above `wgmma.wait_group` (`machine.Group.do_later`); only the assembler's output
says whether it ran behind the wait. PTX goes through ptxas and nvdisasm here, and the listing is read from top to bottom: a loop
begins its second pass as its first, because every product of a loop is waited for within it or by its successor.
"""

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?(?!\w)")
_WIDTH = {".128": 4, ".64": 2}


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
        # Lines of source code refer to a section behind the kernel, which is not kept.
        without_lines = re.sub(r"(?m)^\s*\.loc\s.*$", "", ptx)
        source.write_text(re.sub(r"(?m)^\.version \d+\.\d+", ".version 8.8", without_lines))
        assemble = [str(_tool("ptxas")), "-arch=sm_90a", "-O3", "-o", str(binary), str(source)]
        subprocess.run(assemble, check=True, capture_output=True)
        done = subprocess.run([str(_tool("nvdisasm")), "-c", str(binary)], check=True, capture_output=True, text=True)
    return done.stdout


def touched_too_early(text: str) -> list[str]:
    """Instructions that read or write an accumulator between its product and the wait for it."""
    found = []
    open_: set[int] = set()
    groups: list[set[int]] = []
    for opcode, operands in _INSTRUCTION.findall(text):
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
        elif clash := _registers(opcode, operands) & open_.union(*groups):
            found.append(f"{opcode} {operands.strip()} touches R{min(clash)}")
    return found


def _registers(opcode: str, operands: str) -> set[int]:
    if opcode == "PRMT":
        # Lower half of the second register, upper half of the last: LLVM widens an int8 inside a vector whose upper half is
        # undefined, ptxas takes any register for it, and the permutation behind it selects no byte of that half.
        operands = re.sub(r"(0x7610,\s*)R\d+", r"\1RZ", operands)
    width = next((count for suffix, count in _WIDTH.items() if suffix in opcode), 1)
    found: set[int] = set()
    for number, pair in _REGISTER.findall(operands):
        found |= set(range(int(number), int(number) + max(width, 2 if pair else 1)))
    return found
