"""Compile the Triton layer for one absent GPU and print, as JSON, the instructions of its kernels that matter.

    python tests/kernels/triton_compiles.py a100|l40s|h100

A process of its own: it needs jax-triton, and looks into it for the PTX, which the compiled program hides.
"""

import collections
import dataclasses
import importlib
import json
import re
import sys
from typing import Any

import absent_gpu
import jax
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
    for rows, outliers, weight_bits, bits, clip in [
        (1, 64, 4, 4, None),
        (17, 36, 4, 4, (16, -8)),
        (129, 0, 8, 8, None),
        (3, 36, 4, 16, None),
    ]:
        weight = dataclasses.replace(kernel_cases.weight(0, 576, 576, outliers, weight_bits), level_clip=clip)
        packed = triton_layer.readable(weight)
        x = kernel_cases.tokens(1, (rows, 576))

        def layer(x: jax.Array, packed: api.Packed | api.Halved, bits: int = bits) -> jax.Array:
            return triton_layer.run((x,), (), api.Identity(), [packed], [None], bits, capability)[0]

        hlo = absent_gpu.compile_for(gpu, layer, x, packed).hlo
        compiled += len(re.findall(r'custom_call_target="\w*triton\w*"', hlo))
    print(json.dumps({"kernels": compiled, "instructions": seen}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
