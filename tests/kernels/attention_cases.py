"""Calls of attention whose GPU kernels are compiled for a device that is not there: shapes of published models, every branch."""

import dataclasses
import glob
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import absent_gpu
import hlo
import jax
import jax.numpy as jnp

from quikjax.pallas_kernels.devices import A100, H100, L40S, Device
from quikjax.pallas_kernels.flash_attention import choice
from quikjax.pallas_kernels.flash_attention.choice import AttentionProblem
from quikjax.pallas_kernels.flash_attention.decode import Cached, Token, decode
from quikjax.pallas_kernels.flash_attention.prefill import prefill

DEVICES: dict[str, Device] = {"h100": H100, "a100": A100, "l40s": L40S}
_ASSEMBLED = {"h100": "sm_90a", "a100": "sm_80", "l40s": "sm_89"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: who makes it, its shapes, and which branch of the kernels it takes."""

    name: str
    problem: AttentionProblem
    alibi: bool = False
    rotated: bool = True
    causal: bool = True

    def call(self, gpu: str) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
        """The function, the shapes of its arguments and which of them it may overwrite."""
        problem, s = self.problem, jax.ShapeDtypeStruct
        tiles = choice.tiles(problem, DEVICES[gpu])
        batch, length, heads, kv_heads, head = (
            getattr(problem, name) for name in ("batch", "length", "heads", "kv_heads", "head")
        )
        scale = head**-0.5
        query = s((batch, length, heads, head), problem.dtype)
        positions = s((batch, length), jnp.int32)
        slopes = s((heads,), jnp.float32) if self.alibi else None
        fresh = s((batch, length, kv_heads, head), problem.dtype)
        if not problem.cached:

            def read(query: Any, key: Any, value: Any, positions: Any, slopes: Any) -> Any:
                return prefill(query, key, value, positions, scale=scale, tiles=tiles, causal=self.causal, slopes=slopes)

            return read, (query, fresh, fresh, positions, slopes), ()
        codes = problem.kind == jnp.int8
        writes = length == 1 and not codes
        keys = s((2, kv_heads, batch, problem.slots, head), problem.kind)
        scales = s(keys.shape[:-1], jnp.float32) if codes else None
        angles = s((batch, length, head // 2), jnp.float32) if writes and self.rotated else None

        def write(cached: Any, query: Any, layer: Any, positions: Any, key: Any, angles: Any, slopes: Any) -> Any:
            return decode(
                query,
                cached,
                layer,
                positions,
                scale=scale,
                tiles=tiles,
                slopes=slopes,
                turns=None if angles is None else (angles, angles),
                token=Token(key, key) if writes else None,
            )

        arguments = (Cached(keys, keys, scales, scales), query, s((), jnp.int32), positions, fresh, angles, slopes)
        return write, arguments, (0,)


def _cached(
    batch: int, length: int, heads: int, kv_heads: int, head: int, slots: int, dtype: Any, **rest: Any
) -> AttentionProblem:
    kind = rest.pop("kind", dtype)
    return AttentionProblem(batch, length, heads, kv_heads, head, slots, jnp.dtype(dtype), jnp.dtype(kind), True, **rest)


def _prompt(batch: int, length: int, heads: int, kv_heads: int, head: int, dtype: Any) -> AttentionProblem:
    dtype = jnp.dtype(dtype)
    return AttentionProblem(batch, length, heads, kv_heads, head, length, dtype, dtype, False)


BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
CASES = (
    Case("LLaMA-2-7B, one row", _cached(1, 1, 32, 32, 128, 2048, BF16)),
    Case("LLaMA-2-7B, 64 rows", _cached(64, 1, 32, 32, 128, 2048, BF16)),
    Case("LLaMA-2-7B, deterministic", _cached(4, 1, 32, 32, 128, 2048, BF16, alone=True)),
    Case("LLaMA-2-7B, int8 cache", _cached(4, 1, 32, 32, 128, 2048, BF16, kind=jnp.int8)),
    Case("LLaMA-2-7B, float32", _cached(1, 1, 32, 32, 128, 2048, F32)),
    Case("LLaMA-2-7B, float32 cache", _cached(1, 1, 32, 32, 128, 2048, BF16, kind=F32)),
    Case("LLaMA-2-70B, 4 rows", _cached(4, 1, 64, 8, 128, 4096, BF16)),
    Case("LLaMA-2-70B, further tokens", _cached(2, 128, 64, 8, 128, 4096, BF16)),
    Case("LLaMA-2-7B, further tokens, float32", _cached(2, 128, 32, 32, 128, 2048, F32)),
    Case("Falcon-7B, one row", _cached(1, 1, 71, 1, 64, 2048, BF16)),
    Case("Falcon-RW, one row", _cached(1, 1, 32, 32, 64, 2048, F16), alibi=True, rotated=False),
    Case("OPT-2.7B, one row", _cached(1, 1, 32, 32, 80, 2048, F16), rotated=False),
    Case("heads of 256", _cached(1, 1, 8, 1, 256, 2048, BF16)),
    Case("LLaMA-2-7B, prompt", _prompt(1, 2048, 32, 32, 128, BF16)),
    Case("LLaMA-2-70B, prompt", _prompt(2, 512, 64, 8, 128, BF16)),
    Case("Falcon-RW, prompt", _prompt(2, 512, 32, 32, 64, F16), alibi=True),
    Case("heads of 256, prompt", _prompt(1, 512, 8, 1, 256, BF16)),
    Case("MiniLM, texts", _prompt(8, 128, 12, 12, 32, F16), causal=False),
)


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A compiled call: the program, and of its kernels the PTX and the assembler's report."""

    program: hlo.Program
    ptx: str
    report: str

    @property
    def spilled_bytes(self) -> int:
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", self.report))

    def problems(self, problem: AttentionProblem) -> list[str]:
        """List what no kernel may have: spills, local memory, products beside the tensor cores."""
        found = [f"{self.spilled_bytes} bytes spilled"] if self.spilled_bytes else []
        if re.search(r"\b(?:ld|st)\.local", self.ptx):
            found.append("local memory")
        kind = {"bfloat16": "bf16", "float16": "f16"}.get(str(problem.product_dtype))
        if kind is not None and not re.search(rf"mma\S*\.f32\.{kind}\.{kind}", self.ptx):
            found.append(f"no product of {kind} on the tensor cores")
        if "cp.async" not in self.ptx:
            found.append("keys are not copied while others are multiplied")
        return found


def assemble(case: Case, gpu: str) -> Assembled:
    """Compile a call to machine code for an absent GPU."""
    function, arguments, donated = case.call(gpu)
    lowered = absent_gpu.lower(gpu, function, *arguments, donate=donated)
    with tempfile.TemporaryDirectory() as folder, absent_gpu.compiled_here():
        options: dict[str, Any] = {"xla_dump_to": folder}
        if jax.__version_info__ >= (0, 11):
            options |= {"xla_gpu_dump_llvmir": True, "xla_dump_emitter_re": ".*"}  # with them goes the PTX
        compiled = lowered.compile(compiler_options=options)
        files = [file for file in sorted(Path(folder).glob("*.ptx")) if ".entry" in file.read_text()]
        texts, reports = [file.read_text() for file in files], [_report(file, gpu) for file in files]
    return Assembled(hlo.Program(compiled.as_text()), "\n".join(texts), "\n".join(reports))


def _report(file: Path, gpu: str) -> str:
    spec = importlib.util.find_spec("nvidia")  # a folder of packages, installed with the compiler
    assert spec is not None
    folders = spec.submodule_search_locations or []
    (assembler,) = (path for folder in folders for path in glob.glob(os.path.join(folder, "*", "bin", "ptxas")))
    done = subprocess.run(
        [assembler, "-v", f"-arch={_ASSEMBLED[gpu]}", str(file), "-o", os.devnull], capture_output=True, text=True, check=True
    )
    return done.stderr
