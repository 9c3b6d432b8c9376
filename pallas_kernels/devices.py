"""The machine that a kernel would run on, as plain data, so that the choice of a backend is a pure function."""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

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


# In the keys of JAX's caches: what was traced for one device is not taken for another.
_TARGET: Any = jax.make_user_context(None)


def tracing_for(device: Device) -> contextlib.AbstractContextManager[None]:
    """A context in which layers are traced for `device`, whatever this process has: to lower or export for another machine.

    A model with kernels exports for an H100 from a machine without one, given what they are compiled into:

        h100 = jax.sharding.AbstractDevice(H100.kind, H100.cores, "gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=h100)
        kernels = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")
        allowed = [jax.export.DisabledSafetyCheck.custom_call(kernel) for kernel in kernels]
        with tracing_for(H100), jax.sharding.use_abstract_mesh(mesh):
            exported = jax.export.export(jax.jit(model), platforms=["cuda"], disabled_checks=allowed)(*arguments)

    JAX gives no promise that a later version runs such a program: export again after an update. One program for `cpu` and `cuda`
    at once holds no kernels: trace it without this context, for XLA.
    """
    return _TARGET(device)


def current_device() -> Device:
    """The device that a layer called here would run on: `tracing_for`'s, else `jax.default_device`, else the process's first."""
    if _TARGET.value is not None:
        return _TARGET.value
    default: Any = jax.config.values["jax_default_device"]
    return describe(default if hasattr(default, "platform") else jax.devices(default)[0])


def describe(device: Any) -> Device:
    """A JAX device as plain data. A GPU whose capability is no `major.minor` (an AMD one says `gfx942`) has none here."""
    if device.platform != "gpu":
        return Device(device.platform, device.device_kind, bfloat16_products=device.platform == "cpu" and cpu_has_bfloat16())
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    capability = (int(numbers[1]), int(numbers[2])) if numbers else None
    return Device("gpu", device.device_kind, capability, int(getattr(device, "core_count", 0)))


@functools.cache
def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether this machine's CPU multiplies bfloat16 in hardware, as far as the system says (Linux on x86 does)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split()
