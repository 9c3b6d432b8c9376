"""The machine that a kernel would run on, as plain data, so that the choice of a backend is a pure function."""

import dataclasses
import functools
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """`platform` (`cpu`, `gpu`, `tpu`), `kind` as the vendor names it, compute `capability` and multiprocessors of a GPU.

    `bfloat16_products`: a CPU with instructions for them, whose integer products are faster that way (`cpu`).
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None
    cores: int = 0
    bfloat16_products: bool = False

    @property
    def hopper(self) -> bool:
        return self.platform == "gpu" and self.capability is not None and self.capability[0] == 9

    def __str__(self) -> str:
        return self.kind or self.platform


CPU = Device("cpu", "cpu")
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
L40S = Device("gpu", "NVIDIA L40S", (8, 9), 142)


def current_device() -> Device:
    """The default device of this process."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Device(device.platform, device.device_kind, bfloat16_products=device.platform == "cpu" and cpu_has_bfloat16())
    major, minor = (int(part) for part in str(device.compute_capability).split("."))
    return Device("gpu", device.device_kind, (major, minor), int(device.core_count))


@functools.cache
def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware, as far as the operating system tells (Linux on x86 does)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split()
