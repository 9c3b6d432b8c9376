"""Compile for a GPU that is not there, to machine code, and read what came out.

Needs the CUDA plugin wheels beside a CPU JAX of the same version (`make test` installs them): `jax-cuda12-plugin`,
`jax-cuda12-pjrt`, `nvidia-cuda-nvcc-cu12`.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

# Read when a backend is made and when a kernel is compiled, so before anything of JAX runs in a test.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTX", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

# Compute capability, name, multiprocessors, shared memory a block may opt in to and of a multiprocessor, threads of one.
GPUS = {
    "h100": ((9, 0), "NVIDIA H100 80GB HBM3", 132, 232448, 233472, 2048),
    "a100": ((8, 0), "NVIDIA A100-SXM4-80GB", 108, 166912, 167936, 2048),
    "l40s": ((8, 9), "NVIDIA L40S", 142, 101376, 102400, 1536),
}


def missing() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        return "the CUDA plugin wheels are not installed (make test installs them)"
    return None


def target_config(gpu: str) -> str:
    """XLA's description of the device, as text."""
    (major, minor), name, cores, block, core, threads = GPUS[gpu]
    limits = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": core,
        "threads_per_core_limit": threads,
        "core_count": cores,
        "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 84942979072,
        "shared_memory_per_block_optin": block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    info = " ".join(f"{key}: {value}" for key, value in limits.items())
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 } runtime_version { major: 12 minor: 9 } '
        f'device_description_str: "{name}"'
    )


def on(gpu: str) -> jax.sharding.NamedSharding:
    """A sharding on one absent device."""
    topology = topologies.get_topology_desc("1x1x1", platform="cuda", target_config=target_config(gpu), topology="1x1x1")
    mesh = jax.sharding.Mesh(topology.devices, ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's own output: PTX of the Mosaic kernels and ptxas's report.

    A kernel that this process has compiled before comes out of a cache and prints nothing: `log` has only what is new.
    """

    log: str
    hlo: str

    @property
    def products(self) -> list[str]:
        """Every WGMMA instruction's shape and types, `m64n128k32.s32.s8.s8`, in order."""
        return re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", self.log)

    @property
    def kernels(self) -> int:
        """Mosaic kernels in the compiled program."""
        return len(re.findall(r'custom_call_target="mosaic_gpu', self.hlo))

    @property
    def registers(self) -> list[int]:
        return [int(n) for n in re.findall(r"Used (\d+) registers", self.log)]

    @property
    def spilled_bytes(self) -> int:
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", self.log))

    def complaints(self, exact_division: bool = True) -> list[str]:
        """List what no kernel of ours may have: spills, local memory, serialized WGMMA, emulated s4 products, flushed denormals.

        `exact_division=False` allows the approximate division that SiLU and GELU are lowered to.
        """
        found = []
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled")
        patterns = {
            r"\b(?:ld|st)\.local": "local memory",
            r"C751[0-8]": "serialized WGMMA",
            r"mma\.\S*\.s4|mma\.\S*\.u4": "emulated 4-bit product",
            r"wgmma\.mma_async\S*\.u8": "unsigned operand: a silent signed product",
            r"(?:add|sub|mul|fma|div|max|min|cvt)\.\S*ftz\S*f32": "denormals flushed",
        }
        if exact_division:
            patterns[r"(?:div|rcp)\.(?:approx|full)"] = "inexact division"
        found += [f"{meaning}: {match[0]}" for pattern, meaning in patterns.items() if (match := re.search(pattern, self.log))]
        return found


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Everything written to the process's stdout and stderr, by C++ too."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved, text = (os.dup(1), os.dup(2)), [""]
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, target)
                os.close(copy)
            file.seek(0)
            text[0] = file.read().decode(errors="replace")


@contextlib.contextmanager
def compiled_here() -> Iterator[None]:
    """No executables from disk: one for a device that is not there cannot be loaded, and its PTX would not be printed."""
    kept = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def lower(gpu: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """Lower for an absent GPU; `arguments` are pytrees of anything with `shape` and `dtype`."""
    sharding = on(gpu)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    _, name, cores, *_ = GPUS[gpu]
    device = jax.sharding.AbstractDevice(name, cores, "gpu")
    # From JAX 0.11 on kernels are lowered for the mesh's device, in place of the process's.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function, donate_argnums=donate).lower(*shapes)


def compile_lowered(lowered: Any) -> Compiled:
    """All the way to machine code."""
    with _captured() as text, compiled_here():
        compiled = lowered.compile()
    return Compiled(text[0], compiled.as_text())


def compile_for(gpu: str, function: Callable[..., Any], *arguments: Any) -> Compiled:
    """`lower` and `compile_lowered`."""
    return compile_lowered(lower(gpu, function, *arguments))
