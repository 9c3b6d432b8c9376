"""The device that layers are traced for: this process's, another one by choice, and descriptions of odd ones."""

import types

import jax
import jax.numpy as jnp
import kernel_cases
import pytest
from jax import export

from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.devices import H100, current_device, describe, tracing_for


def _gpu(**fields: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform="gpu", **fields)


def test_a_gpu_is_described_by_what_it_says_of_itself() -> None:
    assert describe(_gpu(device_kind=H100.kind, compute_capability="9.0", core_count=132)) == H100
    amd = describe(_gpu(device_kind="AMD Instinct MI300X", compute_capability="gfx942", core_count=304))
    assert (amd.capability, amd.hopper) == (None, False)
    problem = api.Problem(4, 640, 128, 576, jnp.int4, 4, jnp.bfloat16, jnp.bfloat16)
    assert api.choose(problem, amd).backend == "xla"
    with pytest.raises(api.BackendError, match=r"Mosaic kernels need a Hopper GPU .*MI300X"):
        api.choose(problem, amd, "mosaic")


def test_the_default_device_is_respected() -> None:
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_device().platform == "cpu"
    with jax.default_device("cpu"):
        assert current_device().platform == "cpu"


def test_a_layer_with_kernels_is_exported_for_a_gpu_that_is_not_here() -> None:
    packed, x = kernel_cases.weight(0, 64, 256, 16), kernel_cases.tokens(1, (3, 256))
    layer = jax.jit(lambda x: api.linears((x,), [packed], [None], 4)[0])
    assert layer(x).shape == (3, 64)  # traced for this CPU first
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice(H100.kind, H100.cores, "gpu"))
    allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with tracing_for(H100), jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(layer, platforms=["cuda"], disabled_checks=allowed)(x)
    assert exported.mlir_module().count("mosaic_gpu_v2") == 2
    assert exported.out_avals[0].shape == (3, 64)
    # For both platforms at once: XLA on either.
    both = export.export(layer, platforms=["cpu", "cuda"])(x)
    assert "mosaic_gpu" not in both.mlir_module()
    assert current_device().platform == "cpu"
