"""What moves and what stays: nothing is lost on the way there and back, and what has moved is where the equations put it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fake_quant import N, packed

from quikjax.errors import QuikError
from quikjax.training.moving import StillWeight, finish, level_clips, start, student
from quikjax.weights.quik import QuikWeight, dequantize

rng = np.random.default_rng(0)
PARAMS: dict[str, Any] = {
    "norm.weight": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
    "norm.bias": jnp.asarray(rng.normal(size=5), jnp.float32),
    "layer.weight": packed(),
    "layer.bias": jnp.ones(N),
    "dense.weight": jnp.ones((3, 5)),
}


def test_at_step_0_everything_comes_back_as_it_was() -> None:
    still, moving = start(PARAMS)
    assert {path: set(kinds) for path, kinds in moving.items()} == {
        "norm.weight": {"gain"},
        "norm.bias": {"shift"},
        "layer.weight": {"sigma", "outliers"},
    }
    finished = finish(PARAMS, moving)
    assert list(finished) == list(PARAMS)
    for one, other in zip(jax.tree.leaves(finished), jax.tree.leaves(PARAMS), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    made = student(jax.tree.map(jnp.asarray, still), jax.tree.map(jnp.asarray, moving))
    np.testing.assert_array_equal(made["norm.weight"], PARAMS["norm.weight"].astype(jnp.float32))
    assert made["dense.weight"].dtype == jnp.float32


def test_what_has_moved_is_where_the_equations_put_it() -> None:
    _, moving = start(PARAMS)
    moved = {path: {kind: array + np.float32(0.01) for kind, array in own.items()} for path, own in moving.items()}
    finished = finish(PARAMS, moved)
    weight = finished["layer.weight"]
    assert isinstance(weight, QuikWeight)
    weight.validate("layer.weight")  # `reduced` among other things
    np.testing.assert_allclose(weight.scale, np.asarray(packed().scale, np.float64) * np.exp(0.01), rtol=1e-6)
    expected = (np.asarray(packed().outliers, np.float32) + np.float32(0.01)).astype(np.float16)
    np.testing.assert_array_equal(weight.outliers, expected)
    np.testing.assert_array_equal(np.asarray(weight.qweight, np.int8), np.asarray(packed().qweight, np.int8))
    np.testing.assert_allclose(finished["norm.bias"], np.asarray(PARAMS["norm.bias"]) + 0.01, rtol=1e-6)
    gained = np.asarray(PARAMS["norm.weight"], np.float64) * np.exp(0.01)
    np.testing.assert_allclose(np.asarray(finished["norm.weight"], np.float64), gained, rtol=1 / 256)
    assert weight.bits() == packed().bits()


def test_leaving_a_dtype_s_range_is_said() -> None:
    _, moving = start(PARAMS)
    moving["layer.weight"]["outliers"] = moving["layer.weight"]["outliers"] + 1e6
    with pytest.raises(QuikError, match=r"layer\.weight has left the range of float16"):
        finish(PARAMS, moving)


def test_latent_codes_begin_at_their_codes_and_outlier_columns_have_none() -> None:
    weight = packed()
    original = np.asarray(dequantize(weight)) * 1.02
    still, moving = start({"w": weight}, {"w": original})
    finished = finish({"w": weight}, moving)["w"]
    np.testing.assert_array_equal(np.asarray(finished.qweight, np.int8), np.asarray(weight.qweight, np.int8))
    latent = moving["w"]["latent"]
    assert 0 < np.abs(latent - still["w"].codes).max() <= 0.8 * 0.45 + 1e-6
    moving["w"]["latent"] = latent + 1
    up = finish({"w": weight}, moving)["w"]
    expected = np.clip(np.round(latent + 1), -8, 7)[:, np.asarray(weight.columns)[: weight.base]]
    np.testing.assert_array_equal(np.asarray(up.qweight, np.int8), expected)
    made = student(jax.tree.map(jnp.asarray, still), jax.tree.map(jnp.asarray, moving))["w"]
    assert not np.asarray(made.codes)[:, np.asarray(weight.columns)[weight.base :]].any()


def test_blocks_that_differ_in_their_level_clip_alone_stack() -> None:
    import dataclasses

    clipped = dataclasses.replace(packed(), level_clip=(17, 1))
    blocks = [{"w": packed()}, {"w": clipped}]
    clips = level_clips(blocks)
    assert clips == {"w": (None, (17, 1))}
    one, other = (start(params, clips=clips)[0]["w"] for params in blocks)
    assert isinstance(one, StillWeight)
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    assert (one.clip, other.clip) == (0, 1)
