"""The program that decodes, compiled for an H100 that is not there: packed weights are read where they lie."""

from typing import Any

import absent_gpu
import hlo
import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from test_gpu_scripts import module

from quikjax.models.cache import LayerCache, empty_cache
from quikjax.models.dtypes import CACHE_KINDS
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.devices import H100, Device, tracing_for

LOOP = """
%moved (p: s4[2,8,64], i: s32[]) -> s4[1,8,64] {
  %p = s4[2,8,64]{2,1,0:E(4)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = s4[1,8,64]{2,1,0:E(4)} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,64}
}

%body (t: (s32[], s4[2,8,64])) -> (s32[], s4[2,8,64]) {
  %t = (s32[], s4[2,8,64]{2,1,0:E(4)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %w = s4[2,8,64]{2,1,0:E(4)} get-tuple-element(%t), index=1
  %slice = s4[1,8,64]{2,1,0:E(4)} fusion(%w, %i.1), kind=kCustom, calls=%moved
  %flat = s4[8,64]{1,0:E(4)} bitcast(%slice)
  %y = bf16[8,8]{1,0} custom-call(%flat), custom_call_target="mosaic_gpu_v2"
  %z = bf16[8,8]{1,0} custom-call(%y), custom_call_target="mosaic_gpu_v2"
  ROOT %out = (s32[], s4[2,8,64]{2,1,0:E(4)}) tuple(%i.1, %w)
}

ENTRY %main (w: s4[2,8,64]) -> (s32[], s4[2,8,64]) {
  %w.2 = s4[2,8,64]{2,1,0:E(4)} parameter(0)
  %zero = s32[] constant(0)
  %given = (s32[], s4[2,8,64]{2,1,0:E(4)}) tuple(%zero, %w.2)
  ROOT %loop = (s32[], s4[2,8,64]{2,1,0:E(4)}) while(%given), body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_copies_are_read_from_hlo() -> None:
    program = hlo.Program(LOOP)
    assert program.launched() == 3 * 5
    assert [(array.name, array.bytes, times) for array, times in program.copied_for_kernels()] == [("slice", 8 * 64 // 2, 5)]


compiles = pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))


@compiles
def test_a_scan_copies_what_its_kernels_read() -> None:
    """A custom call takes no part of an array (JAX 0.10): why a GPU unrolls its blocks; that the test below would see copies."""
    layer, (inputs, packed, _, _) = kernel_cases.layer_shapes(LinearSpec("scan", "w4a16", 256, 256, 0, 4, 16), 8)
    stack = jax.tree.map(lambda array: jax.ShapeDtypeStruct((3, *array.shape), array.dtype), packed)

    def scanned(x: jax.Array, stack: Any) -> jax.Array:
        return jax.lax.scan(lambda x, packed: (layer((x,), packed, None, ()), None), x, stack)[0]

    program = hlo.Program(absent_gpu.compile_for("h100", scanned, inputs[0], stack).hlo)
    copied = [(array.result.split("{")[0], times) for array, times in program.copied_for_kernels()]
    assert program.kernels() == 3
    # From JAX 0.11 on arrays of whole bytes are handed over where they lie.
    assert (("s32[1,2,256,16]", 3) in copied) == (jax.__version_info__ < (0, 11))


@compiles
def test_a_block_decodes_one_row_in_five_kernels_and_copies_no_packed_weight() -> None:
    """Four products, which split their row: q, k and v are one, gate and up another; no slice of `y`, no sum with a residual.

    And attention, which rotates queries and key, and writes key and value.
    """
    fields = module("gpu_model").TINY | {"num_hidden_layers": 2}
    decoding = module("counted_decode").compiled(fields)
    assert decoding.program.kernels() == 2 * 4
    assert decoding.compiled.complaints(exact_division=False) == []  # the gate's SiLU divides as it likes
    # What is left is the embedding of the token.
    assert decoding.copied <= fields["hidden_size"] * 2
    # Keys and values stay as they lie, before, in and behind the loop over tokens.
    heads, size = fields["num_attention_heads"], fields["hidden_size"]
    cache = jax.eval_shape(lambda: empty_cache(2, heads, 1, 256, size // heads, "bfloat16"))
    assert decoding.program.moved(cache.nbytes() // 2) == []
    # Around the blocks: the token's embedding, angles, head and choice.
    assert decoding.program.launched() <= 2 * (4 + 1) + 15


@pytest.mark.long
@compiles
def test_biases_cost_no_kernel() -> None:
    """Those of q, k and v lie as their tiles do, all in float32: OPT's block launches its layers (ReLU in one) and attention."""
    small = {"hidden_size": 128, "num_attention_heads": 2, "ffn_dim": 256}
    programs = [
        module("counted_decode")
        .compiled(module("gpu_model").TINY_BLOCKS["opt-66b"] | small | {"num_hidden_layers": depth})
        .program
        for depth in (1, 2)
    ]
    kernels, launched = (after - before for before, after in zip(*[(p.kernels(), p.launched()) for p in programs], strict=True))
    assert kernels == 4
    assert launched == 4 + 1


def _written(cache: Any, key: jax.Array, at: jax.Array) -> Any:
    return LayerCache(cache, jnp.int32(1)).write(key, key + 1, at).stacked


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_a_gpu_writes_texts_of_their_own_lengths_as_a_cpu_does(kind: str) -> None:
    key = kernel_cases.tokens(3, (3, 2, 2, 8), jnp.float32)
    arguments = (empty_cache(2, 2, 3, 16, 8, kind), key, jnp.array([0, 14, 5], jnp.int32))
    want = jax.jit(_written)(*arguments)
    with tracing_for(Device("gpu")):
        got = jax.jit(_written)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


@compiles
def test_a_cache_is_written_in_place_by_one_kernel_each() -> None:
    """Keys and values of 16 texts: not a kernel for each of them, and nothing turned round or copied."""
    s = jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: empty_cache(2, 4, 16, 64, 32, "bfloat16"))
    arguments = (cache, s((16, 1, 4, 32), jnp.bfloat16), s((16,), jnp.int32))
    with tracing_for(H100):
        lowered = absent_gpu.lower("h100", _written, *arguments, donate=(0,))
    program = hlo.Program(absent_gpu.compile_lowered(lowered).hlo)
    assert program.launched() == 2
