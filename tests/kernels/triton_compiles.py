"""Compile the Triton layer for one absent GPU and print, as JSON, the instructions of its kernels that matter.

    python tests/kernels/triton_compiles.py a100|l40s|h100

A process of its own: it needs jax-triton, and looks into it for the PTX, which the compiled program hides.
"""

import collections
import importlib
import json
import re
import sys
from typing import Any

import absent_gpu
import jax
import jax.numpy as jnp
import kernel_cases

from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.quik_linear import triton as triton_layer

_INSTRUCTIONS = r"(?:wgmma\.mma_async|mma\.sync)[a-z0-9.:_]*|(?:rcp|div)\.[a-z.]+f32|cvt\.rni\.f32\.f32|(?:ld|st)\.local"


def main(gpu: str) -> int:
    seen: collections.Counter[str] = collections.Counter()
    triton_lib: Any = importlib.import_module("jax_triton.triton_lib")
    original = triton_lib.compile_ttir_to_ptx_inplace

    def watched(*arguments: Any) -> Any:
        result = original(*arguments)
        seen.update(re.findall(_INSTRUCTIONS, result.binary))
        return result

    triton_lib.compile_ttir_to_ptx_inplace = watched
    major, minor = absent_gpu.GPUS[gpu][0]
    capability = 10 * major + minor
    compiled = 0
    for rows, outliers, bits in [(1, 64, 4), (17, 36, 4), (129, 0, 8)]:
        packed = kernel_cases.weight(0, 576, 576, outliers, bits)
        x = kernel_cases.tokens(1, (rows, 576))

        def layer(x: jax.Array, packed: api.Packed, bits: int = bits) -> jax.Array:
            split = triton_layer.split((x,), packed.columns, packed.base, bits, api.Identity(), (), capability)
            return triton_layer.product(split, packed, None, bits, jnp.bfloat16, capability)

        hlo = absent_gpu.compile_for(gpu, layer, x, packed).hlo
        compiled += len(re.findall(r'custom_call_target="\w*triton\w*"', hlo))
    print(json.dumps({"kernels": compiled, "instructions": seen}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
