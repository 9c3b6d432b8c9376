"""What a recovery is told to do: which windows, in what order, at what rates."""

import numpy as np
import optax
import pytest

from quikjax.errors import QuikError
from quikjax.training.settings import RecoverySettings, cut, optimizer, order, schedule


def test_windows_to_train_on_stand_before_those_to_choose_on() -> None:
    settings = RecoverySettings(seqlen=4, windows=3, validation=2)
    train, held_out = cut(np.arange(23, dtype=np.int32), settings)
    np.testing.assert_array_equal(train, np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(held_out, np.arange(12, 20).reshape(2, 4))
    assert len(cut(np.arange(40, dtype=np.int32), settings.model_copy(update={"windows": None}))[0]) == 8
    assert len(cut(np.arange(40, dtype=np.int32), settings.model_copy(update={"windows": None, "steps": 5}))[0]) == 5
    with pytest.raises(QuikError, match="the text has 19 tokens, 4 windows of 4; 5 are needed, 2 of them to choose on"):
        cut(np.arange(19, dtype=np.int32), settings)
    with pytest.raises(QuikError, match="3 are needed"):
        cut(np.arange(8, dtype=np.int32), settings.model_copy(update={"windows": None}))


def test_every_window_is_seen_before_one_is_seen_again() -> None:
    plan = order(5, RecoverySettings(steps=6, batch=2, seed=3))
    flat = plan.reshape(-1)
    assert plan.shape == (6, 2)
    assert sorted(flat[:5]) == sorted(flat[5:10]) == list(range(5))
    assert (flat[:5] != flat[5:10]).any()
    np.testing.assert_array_equal(plan, order(5, RecoverySettings(steps=6, batch=2, seed=3)))
    assert (plan != order(5, RecoverySettings(steps=6, batch=2, seed=4))).any()


@pytest.mark.parametrize("steps", [1, 2, 10, 30])
def test_rates_rise_for_a_tenth_and_fall_to_nothing(steps: int) -> None:
    rates = [float(schedule(RecoverySettings(steps=steps))(step)) for step in range(steps + 1)]
    warm = max(1, steps // 10)
    np.testing.assert_allclose(rates[:warm], np.arange(1, warm + 1) / warm, rtol=1e-6)
    np.testing.assert_allclose(rates[warm - 1 :], 1 - np.arange(steps - warm + 2) / (steps - warm + 1), atol=1e-6)


def test_each_kind_moves_at_its_rate() -> None:
    settings = RecoverySettings(steps=1, sigma_rate=1e-3, outlier_rate=3e-5, norm_rate=5e-4)
    params = {
        "0": {
            "w": {"sigma": np.zeros(2, np.float32), "outliers": np.zeros(2, np.float32)},
            "n": {"gain": np.zeros(1, np.float32)},
        }
    }
    gradient = {
        "0": {
            "w": {"sigma": np.asarray([0.1, -3], np.float32), "outliers": np.asarray([2, -0.1], np.float32)},
            "n": {"gain": np.ones(1, np.float32)},
        }
    }
    transform = optimizer(settings)
    updates, _ = transform.update(gradient, transform.init(params))
    moved = optax.apply_updates(params, updates)["0"]
    # Adam's first step is the rate, against the gradient's sign.
    np.testing.assert_allclose(moved["w"]["sigma"], [-1e-3, 1e-3], rtol=1e-4)
    np.testing.assert_allclose(moved["w"]["outliers"], [-3e-5, 3e-5], rtol=1e-4)
    np.testing.assert_allclose(moved["n"]["gain"], [-5e-4], rtol=1e-4)
    assert RecoverySettings(codes=True).rates()["sigma"] == pytest.approx(1e-4)
