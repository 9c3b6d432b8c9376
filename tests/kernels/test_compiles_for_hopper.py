"""The Mosaic kernels compiled to an H100's machine code without one: a case of every kind.

`make gpu-compile` does the same for every distinct kernel of `arg_specs`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import absent_gpu
import hlo
import jax
import jax.numpy as jnp
import kernel_cases
import pytest

from quikjax.pallas_kernels import api, reference
from quikjax.pallas_kernels.arg_specs import MODELS, LinearSpec
from quikjax.pallas_kernels.devices import H100
from quikjax.pallas_kernels.split_quantize.producers import Gelu, SiluMul

pytestmark = pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))


def _spec(model: str, name: str) -> LinearSpec:
    return next(spec for spec in MODELS[model] if spec.name == name)


CASES = [
    (_spec("llama-2-7b", "q"), 17),
    (_spec("llama-2-7b", "down"), 1),
    (_spec("llama-2-70b", "gate"), 64),
    (_spec("opt-66b", "fc2"), 2),
    (_spec("falcon-7b", "qkv"), 2048),
    (_spec("smollm2-135m", "down"), 129),
    (LinearSpec("outliers", "one", 4096, 4096, 1), 8),
    (LinearSpec("odd", "264 outputs", 264, 640, 36), 2048),  # no whole number of the copy engine's pieces
    (LinearSpec("odd", "40 outputs", 40, 640, 0), 3),
    (LinearSpec("odd", "1376 inputs", 512, 1376, 86, 8, 8, producer=SiluMul()), 17),  # rows that do not end on 128 bytes
    (LinearSpec("bits", "w8a4", 4096, 4096, 256, 8, 4), 2048),
    (LinearSpec("bits", "w4a8", 4096, 4096, 256, 4, 8), 2048),
    (LinearSpec("bits", "w4a16", 4096, 4096, 256, 4, 16), 1),
    (LinearSpec("bits", "w4a16", 4096, 4096, 256, 4, 16), 2048),  # the longer list has few rows of these widths
    (LinearSpec("bits", "w8a16", 4096, 4096, 256, 8, 16), 64),
]
# Those that take the compilers longest.
LONG = (
    "llama-2-7b-down-1",
    "smollm2-135m-down-129",
    "outliers-one-8",
    "odd-1376 inputs-17",
    "odd-264 outputs-2048",
    "llama-2-70b-gate-64",
    "opt-66b-fc2-2",
    "falcon-7b-qkv-2048",
    "bits-w8a4-2048",
    "bits-w4a8-2048",
)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        pytest.param(spec, rows, id=name, marks=[pytest.mark.long] if name in LONG else [])
        for spec, rows in CASES
        for name in [f"{spec.model}-{spec.name}-{rows}"]
    ],
)
def test_layer_compiles_to_integer_wgmma_without_spills(spec: LinearSpec, rows: int) -> None:
    function, shapes = kernel_cases.layer_shapes(spec, rows)
    compiled = absent_gpu.compile_for("h100", function, *shapes)
    apart = kernel_cases.has_split_kernel(spec, rows) and not kernel_cases.splits_inside(spec, rows)
    assert compiled.kernels == (2 if apart else 1), "one kernel splits, one multiplies; of one row one kernel does both"
    assert compiled.complaints(exact_division=not isinstance(spec.producer, SiluMul | Gelu)) == []
    integer = [product for product in compiled.products if product.endswith(".s32.s8.s8")]
    floating = [product for product in compiled.products if ".f32.bf16.bf16" in product]
    assert len(integer) + len(floating) == len(compiled.products)
    assert bool(integer) == (spec.bits < 16)
    assert bool(floating) == (spec.bits == 16 or spec.outliers > 0)


@pytest.mark.parametrize(
    ("names", "rows", "residual", "kernels"),
    [
        (("q", "k", "k"), 8, False, 2),
        pytest.param(("gate", "gate"), 129, False, 2, marks=pytest.mark.long),
        pytest.param(("o",), 64, True, 2, marks=pytest.mark.long),
        (("q", "k", "k"), 1, False, 1),  # one row is split in the product
        pytest.param(("o",), 1, True, 1, marks=pytest.mark.long),
        pytest.param(("down",), 1, True, 2, marks=pytest.mark.long),  # but not one of 28672 columns
    ],
)
def test_joined_products_and_residuals_are_in_the_kernel(names: tuple[str, ...], rows: int, residual: bool, kernels: int) -> None:
    specs = [_spec("llama-2-70b", name) for name in names]
    compiled = absent_gpu.compile_for("h100", *_flat(kernel_cases.joined_shapes(specs, rows, residual)))
    program = hlo.Program(compiled.hlo)
    assert compiled.kernels == kernels
    # Rows that are no multiple of 8 are cut out of what the copy engine stored.
    assert program.launched() == (kernels if rows <= 64 else kernels + len(names))
    assert compiled.complaints(exact_division=names != ("down",)) == []


def _flat(made: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    function, shapes = made
    return function, *shapes


@pytest.mark.parametrize(("bits", "rows"), [(4, 8), (16, 8), pytest.param(4, 2048, marks=pytest.mark.long)])
def test_float16_compiles(bits: int, rows: int) -> None:
    function, shapes = kernel_cases.layer_shapes(LinearSpec("bits", "f16", 1024, 1024, 64, 4, bits), rows, jnp.float16)
    compiled = absent_gpu.compile_for("h100", function, *shapes)
    assert compiled.complaints() == []
    assert any(".f32.f16.f16" in product for product in compiled.products)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_wider_outputs_take_their_room_from_the_ring(weight_bits: int) -> None:
    _, (_, packed, _, _) = kernel_cases.layer_shapes(LinearSpec("out", "f32", 512, 1024, 64, weight_bits, 8), 2048)
    split = jax.eval_shape(
        lambda x: reference.split_quantize(x, jnp.arange(1024), 960, 8), jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
    )
    compiled = absent_gpu.compile_for(
        "h100", lambda s, p: api.quik_matmul(s, p, None, 8, jnp.float32, backend="mosaic", device=H100), split, packed
    )
    assert compiled.complaints() == []


def test_quantizer_uses_exact_instructions() -> None:
    """Bit-identical codes hang on these: IEEE division, rounding half to even, nothing flushed to zero."""
    function, shapes = kernel_cases.layer_shapes(LinearSpec("exact", "alone", 640, 640, 64), 640)
    log = absent_gpu.compile_for("h100", function, *shapes).log
    assert "rcp.rn.f32" in log
    assert "rcp.approx" not in log
    assert "cvt.rni.f32.f32" in log


def test_unsigned_codes_are_refused() -> None:
    """An unsigned operand in shared memory silently becomes a signed product on the device: it must not get that far."""
    spec = _spec("llama-2-7b", "o")
    function, (inputs, packed, bias, parameters) = kernel_cases.layer_shapes(spec, 64)
    unsigned = dataclasses.replace(packed, qweight=jax.ShapeDtypeStruct(packed.qweight.shape, jnp.uint8))
    with pytest.raises(ValueError, match="uint8"):
        absent_gpu.lower("h100", function, inputs, unsigned, bias, parameters)


def test_named_backend_is_the_one_that_is_compiled() -> None:
    """The Mosaic layer is two custom calls; the reference on the same device has none of them."""
    spec = _spec("smollm2-135m", "o")
    function, shapes = kernel_cases.layer_shapes(spec, 8)
    assert "mosaic_gpu" in absent_gpu.lower("h100", function, *shapes).as_text()

    def reference(inputs: tuple[jax.Array, ...], packed: api.Packed, bias: None, parameters: tuple[jax.Array, ...]) -> jax.Array:
        return api.linears(inputs, [packed], [bias], spec.bits, backend="xla")[0]

    assert "mosaic_gpu" not in absent_gpu.lower("h100", reference, *shapes).as_text()
