"""`quikjax.weights.linear` on top of the kernels' dispatch: groups, tile form, the named backend, the explanation."""

import dataclasses
import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from flax import nnx

from quikjax.models import cache as caches
from quikjax.models import stacked
from quikjax.models.registry import pure_params
from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.devices import A100, H100, tracing_for
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.testing import tiny_model
from quikjax.weights.linear import Produced, explain, linear, linears
from quikjax.weights.quik import QuikWeight
from quikjax.weights.tiled import TiledMember, TiledWeight, join_groups, put_on_device


def packed_weight(seed: int, outputs: int, inputs: int, outliers: int, bits: int = 4, group: str | None = None) -> QuikWeight:
    arrays = kernel_cases.weight(seed, outputs, inputs, outliers)
    return QuikWeight(
        qweight=arrays.qweight,
        scale=arrays.scale,
        reduced=arrays.reduced,
        outliers=arrays.outliers,
        columns=jnp.asarray(np.random.default_rng(0).permutation(inputs), jnp.int32),
        weight_bits=4,
        activation_bits=bits,
        shape=(outputs, inputs),
        in_axes=(1,),
        base=inputs - outliers,
        group=group,
    )


def test_a_group_is_split_once_and_equals_its_members_alone() -> None:
    weights = [packed_weight(seed, 40, 192, 12, group="attention") for seed in (1, 2, 3)] + [packed_weight(4, 24, 192, 30)]
    dense = jnp.ones((8, 192), jnp.float32)
    x = kernel_cases.tokens(5, (2, 3, 192), jnp.float32)
    together = linears(x, [*weights[:2], dense, *weights[2:]], [None] * 5)
    order: list[Any] = [weights[0], weights[1], dense, weights[2], weights[3]]
    for y, weight in zip(together, order, strict=True):
        np.testing.assert_array_equal(np.asarray(y), np.asarray(linear(x, weight)))

    # One rounding per split: the group has one, the layer without a group its own.
    # Counted before XLA merges what is equal.
    def splits(weights: list[QuikWeight]) -> int:
        text = jax.jit(lambda x: linears(x, weights, [None] * len(weights))).lower(x).as_text()
        return len(re.findall(r"call @round\w*\(", text))

    assert splits(weights) == 2
    assert splits([dataclasses.replace(weight, group=None) for weight in weights]) == 4


def test_biases_of_layers_that_were_joined_lie_as_their_tiles_do() -> None:
    biases = {name: kernel_cases.tokens(n, (16 * (n + 1),)) for n, name in enumerate("abc")}
    params: dict[str, dict[str, Any]] = {
        name: {"weight": packed_weight(n, 16 * (n + 1), 192, 12, group="g"), "bias": biases[name]} for n, name in enumerate("abc")
    }
    placed = join_groups(put_on_device(params, H100), [("a", "b", "c")])
    assert join_groups(placed, [("a", "b", "c")]) is placed
    assert [(placed[name]["bias"].dtype, placed[name]["bias"].shape) for name in "ab"] == [
        ("float32", (3 * 128,)),
        ("float32", (32,)),
    ]
    x = kernel_cases.tokens(1, (2, 192))
    want = linears(x, [params[name]["weight"] for name in "bca"], [biases[name] for name in "bca"])
    got = linears(x, [placed[name]["weight"] for name in "bca"], [placed[name]["bias"] for name in "bca"])
    for one, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(expected))


@pytest.mark.parametrize(
    "producer", [api.RmsNorm(1e-5), api.LayerNorm(1e-5), api.SiluMul(), api.Gelu()], ids=lambda p: type(p).__name__
)
def test_a_tensor_that_layers_make_themselves(producer: api.Producer) -> None:
    weights: list[Any] = [packed_weight(1, 40, 192, 12, group="g"), packed_weight(2, 24, 192, 30), jnp.ones((8, 192))]
    inputs = tuple(kernel_cases.tokens(i, (2, 3, 192), jnp.float32) for i in range(producer.inputs))
    parameters = tuple(jnp.linspace(0.5, 1.5, 192) for _ in range(producer.parameters))
    # One program each: XLA rounds a norm that stands alone and one that is fused with what reads it differently.
    made = jax.jit(lambda *inputs: linears(Produced(producer, inputs, parameters), weights, [None] * 3))(*inputs)
    given = jax.jit(lambda *inputs: linears(Produced(producer, inputs, parameters).value(), weights, [None] * 3))(*inputs)
    for y, expected in zip(made, given, strict=True):
        np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))


def test_dense_layers_that_share_a_tensor_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    value = Produced.value

    def noted(self: Produced) -> jax.Array:
        made.append(1)
        return value(self)

    monkeypatch.setattr(Produced, "value", noted)
    x = Produced(api.RmsNorm(1e-5), (kernel_cases.tokens(0, (3, 64), jnp.float32),), (jnp.ones(64),))
    linears(x, [jnp.ones((8, 64))] * 3, [None] * 3)
    assert len(made) == 1


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tile_form_of_a_tree_changes_no_bit(bits: int) -> None:
    params: dict[str, Any] = {"layer": packed_weight(7, 72, 320, 20, bits), "norm": jnp.ones(3)}
    tiled = put_on_device(params, H100)
    assert isinstance(tiled["layer"], TiledWeight)
    assert tiled["layer"].tiles.qweight.shape == (3, 128, 16)
    assert tiled["norm"] is params["norm"]
    x = kernel_cases.tokens(8, (4, 320), jnp.float32)
    np.testing.assert_array_equal(np.asarray(linear(x, tiled["layer"])), np.asarray(linear(x, params["layer"])))
    assert explain(tiled["layer"], 4, jnp.bfloat16, device=H100) == explain(params["layer"], 4, jnp.bfloat16, device=H100)


def test_tile_form_is_made_once_and_only_for_kernels_that_read_it() -> None:
    params = {"layer": packed_weight(7, 72, 320, 20, 4)}
    assert put_on_device(params) is params  # this process has a CPU
    assert put_on_device(params, A100) is params
    tiled = put_on_device(params, H100)
    assert put_on_device(tiled, H100)["layer"] is tiled["layer"]


def test_where_triton_runs_codes_lie_two_to_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    params: dict[str, Any] = {"narrow": packed_weight(7, 40, 320, 20), "wide": packed_weight(8, 40, 320, 20)}
    wide = params["wide"]
    params["wide"] = dataclasses.replace(wide, qweight=wide.qweight.astype(jnp.int8), weight_bits=8)
    placed = put_on_device(params, A100)
    assert placed["wide"] is params["wide"]
    assert isinstance(placed["narrow"].tiles, api.Halved)
    assert placed["narrow"].tiles.qweight.shape == (40, 3 * 64)
    assert put_on_device(placed, A100) is placed
    x = kernel_cases.tokens(8, (4, 320), jnp.float32)
    np.testing.assert_array_equal(np.asarray(linear(x, placed["narrow"])), np.asarray(linear(x, params["narrow"])))
    assert explain(placed["narrow"], 4, jnp.bfloat16, device=A100).backend == "triton"


def test_a_sharded_weight_keeps_its_form() -> None:
    weight = packed_weight(7, 72, 320, 20, 4)

    class TwoDevices:
        device_set = frozenset({0, 1})

    class Array:
        sharding = TwoDevices()

    sharded = dataclasses.replace(weight, qweight=Array())
    assert put_on_device({"layer": sharded}, H100)["layer"] is sharded


def test_named_backend_and_explanation() -> None:
    weight = packed_weight(9, 64, 256, 16)
    x = kernel_cases.tokens(1, (2, 256))
    np.testing.assert_array_equal(np.asarray(linear(x, weight, backend="xla")), np.asarray(linear(x, weight)))
    with pytest.raises(api.BackendError, match="'mosaic' cannot run this layer: Mosaic kernels need a Hopper GPU"):
        linear(x, weight, backend="mosaic")
    shapes = jax.eval_shape(lambda: weight)
    assert explain(shapes, 2, jnp.bfloat16, device=H100).backend == "mosaic"
    assert explain(shapes, 2, jnp.float32, device=H100).backend == "xla"
    odd = dataclasses.replace(shapes, activation_bits=16)
    assert explain(odd, 2, jnp.bfloat16, device=H100).backend == "mosaic"


@pytest.mark.long
def test_a_model_as_a_hopper_gpu_runs_it_gives_the_same_bits() -> None:
    """In tile form, and its blocks unrolled; here XLA multiplies in either form."""
    model = tiny_model(num_hidden_layers=2)
    recipe = Recipe(name="test", rules=(Rule(match=r"proj\.weight", method="rtn", outliers=0),))
    quantized = nnx.merge(nnx.split(model)[0], quantize_params(pure_params(model), recipe))
    for block in quantized.blocks.values():
        for group, layers in block.groups.items():
            for layer in layers:
                param = functools.reduce(getattr, layer.split("."), block).weight  # type: ignore[attr-defined]
                param.set_value(dataclasses.replace(param.get_value(), group=group))
    plain, params = stacked.stack(quantized)
    given = [leaf for block in quantized.blocks.values() for leaf in jax.tree.leaves(nnx.split(block)[1])]
    with tracing_for(H100):
        layout, tiled = stacked.stack(quantized, release=True)
    assert (plain.unrolled, layout.unrolled) == (False, True)
    assert any(leaf.is_deleted() for leaf in given), "what was padded is freed"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(tiled)), "what was not is kept"
    found = [leaf for leaf in jax.tree.leaves(tiled, is_leaf=_is_tiled) if _is_tiled(leaf)]
    joined = [leaf.tiles.members for leaf in found if isinstance(leaf, TiledWeight) and isinstance(leaf.tiles, api.Joined)]
    assert joined == [(112, 112), (64, 32, 32)] * 2, "gate and up are one product, q, k and v another"
    assert sum(isinstance(leaf, TiledMember) for leaf in found) == 2 * 3
    assert not any(_is_tiled(leaf) for leaf in jax.tree.leaves(params, is_leaf=_is_tiled))
    ids, lengths = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.array([6, 4], jnp.int32)
    token, one = jnp.array([[7], [9]], jnp.int32), jnp.ones(2, jnp.int32)
    outputs = []
    for which, tree in ((plain, params), (layout, tiled)):
        logits, fresh = jax.jit(stacked.read, static_argnums=0)(which, tree, ids, lengths)
        cache = caches.insert(caches.empty_cache(2, 2, 2, 16, 16), fresh, jnp.int32(0))
        outputs.append((logits, *jax.jit(stacked.extend, static_argnums=0)(which, tree, token, lengths, one, cache)))
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(np.asarray(got), np.asarray(want)), outputs[1], outputs[0])


def _is_tiled(leaf: Any) -> bool:
    return isinstance(leaf, TiledWeight | TiledMember)


def test_layers_that_were_joined_are_multiplied_together() -> None:
    params = {name: {"weight": packed_weight(n, (n + 1) * 16, 192, 12, group="g")} for n, name in enumerate("abc")}
    placed = join_groups(put_on_device(params, H100), [("a", "b", "c")])
    assert join_groups(placed, [("a", "b", "c")]) is placed
    x, residual = kernel_cases.tokens(1, (2, 192)), kernel_cases.tokens(2, (2, 16))
    weights = [placed[name]["weight"] for name in "bca"]
    want = linears(x, [params[name]["weight"] for name in "bca"], [None] * 3)
    for got, expected in zip(linears(x, weights, [None] * 3), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    with pytest.raises(ValueError, match="give all of them to one call"):
        linears(x, weights[:2], [None] * 2)
    added = linear(x, params["a"]["weight"], residual=residual)
    np.testing.assert_array_equal(np.asarray(added), np.asarray(residual + want[2]))
