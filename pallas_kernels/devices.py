"""The machine that a kernel would run on, as plain data, so that the choice of a backend is a pure function."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """`platform` (`cpu`, `gpu`, `tpu`), `kind` as the vendor names it, compute `capability` and multiprocessors of a GPU."""

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None
    cores: int = 0

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
        return Device(device.platform, device.device_kind)
    major, minor = (int(part) for part in str(device.compute_capability).split("."))
    return Device("gpu", device.device_kind, (major, minor), int(device.core_count))
