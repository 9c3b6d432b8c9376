"""Dropout and the running average of what moves: against their equations, and through a training that is stopped."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies
from pydantic import ValidationError
from tiny_classifier import SETTINGS, prepare

from quikjax.checkpoint.load import load
from quikjax.models.base import Positions
from quikjax.models.encoder import masked_positions
from quikjax.models.registry import dotted, pure_params
from quikjax.training import blocks, steps
from quikjax.training import train as training
from quikjax.training.loop import NoProgress
from quikjax.training.student import beginning
from quikjax.training.train import Trained, take_teacher, train
from quikjax.training.train_settings import TrainSettings


@given(share=strategies.floats(0.01, 0.9) | strategies.just(0.999999), seed=strategies.integers(0, 1000))
def test_dropout_leaves_the_mean(share: float, seed: int) -> None:
    x = np.random.default_rng(seed).uniform(1, 2, (40, 500)).astype(np.float32)
    y = np.asarray(blocks.dropped(jnp.asarray(x), share, jax.random.key(seed)))
    kept = y != 0
    # Six standard errors of the share of zeros, and the 16 bits that it is drawn with.
    assert abs((~kept).mean() - share) < 6 * np.sqrt(share * (1 - share) / x.size) + 1e-4
    np.testing.assert_allclose(y[kept], x[kept] / (1 - share), rtol=1e-5)


def test_the_average_is_its_equation() -> None:
    values = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    average, expected = {"a": jnp.zeros(3)}, np.zeros(3)
    for step, value in enumerate(values):
        average = steps.next_average(average, {"a": jnp.asarray(value)}, step, 0.5)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value.astype(np.float64)
    np.testing.assert_allclose(average["a"], expected, rtol=1e-5, atol=1e-6)
    assert steps.next_average(None, values, 0, 0.5) is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("regularization")
    prepare(directory)
    return directory


def run(place: Path, out: str, progress: NoProgress | None = None, **changes: Any) -> Trained:
    model, tokenizer = load(place / "model")
    settings = SETTINGS.model_copy(update=changes)
    return train(model, tokenizer, place / "texts.tsv", place / out, settings, validation=place / "held.tsv", progress=progress)


class Stops(NoProgress):
    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        if step == 4:
            raise KeyboardInterrupt


def test_a_stopped_run_with_both_goes_on_to_the_same_bytes(place: Path) -> None:
    both: dict[str, Any] = {"dropout": 0.1, "average": 0.5}
    whole = run(place, "whole", **both)
    assert whole.step > 4
    with pytest.raises(KeyboardInterrupt):
        run(place, "stopped", Stops(), **both)
    assert run(place, "stopped", **both).fingerprint == whole.fingerprint
    without: dict[str, str] = {}
    for name, value in both.items():
        only: dict[str, Any] = {name: value}
        without[name] = run(place, name, **only).fingerprint
    assert len({whole.fingerprint, *without.values()}) == 3


def test_what_is_kept_is_the_average(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = training.make_step

    def watched(*arguments: Any) -> Any:
        def step(*inputs: Any) -> Any:
            done = real(*arguments)(*inputs)
            seen.append(jax.tree.map(np.asarray, done[0]["rest"]))
            return done

        return step

    start = dotted(pure_params(load(place / "model")[0]))["embeddings.word_embeddings.weight"]
    monkeypatch.setattr(training, "make_step", watched)
    done = run(place, "averaged", average=0.6)
    assert done.step > 0
    name = "bert.embeddings.word_embeddings.weight"
    expected = np.asarray(start, np.float64)
    for index, values in enumerate(seen[: done.step]):
        decay = min(0.6, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * values[name]["value"]
    kept = np.asarray(dotted(pure_params(load(place / "averaged")[0]))[name])
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(kept - seen[done.step - 1][name]["value"]).max() > 3e-4


def test_dropout_is_of_embeddings_and_of_what_enters_the_last_layers(place: Path) -> None:
    model = load(place / "model")[0]
    ids = np.random.default_rng(0).integers(0, 256, (2, 7)).astype(np.int32)
    mask = np.asarray([[1] * 7, [1] * 4 + [0] * 3])
    where = Positions(masked_positions(jnp.asarray(ids), mask))
    share, key = 0.3, jax.random.key(5)
    taken = take_teacher(beginning(model), (0,))
    hidden = model.embed(jnp.asarray(ids), where.queries)
    found = blocks.forward_traced(
        taken.skeleton, taken.still, taken.moving, hidden, where, dropout=blocks.Dropout(share, key)
    ).hidden[0]

    own = jax.random.split(jax.random.fold_in(key, 0), 1)[0]
    names: list[str] = []

    def see(name: str, x: jax.Array) -> jax.Array:
        names.append(name)
        drawn = {"attention_output": 0, "mlp_output": 1}
        return blocks.dropped(x, share, jax.random.fold_in(own, drawn[name])) if name in drawn else x

    block = next(iter(model.blocks.values()))
    expected = block(blocks.dropped(hidden, share, key), where, observe=see)[0]
    assert {"attention_output", "mlp_output"} <= set(names)
    np.testing.assert_allclose(np.asarray(found)[mask == 1], np.asarray(expected)[mask == 1], rtol=1e-4, atol=1e-5)
    without = blocks.forward_traced(taken.skeleton, taken.still, taken.moving, hidden, where).hidden[0]
    assert np.abs(np.asarray(found - without)).max() > 1e-2


@pytest.mark.parametrize("name", ["dropout", "average"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_shares_are_shares(name: str, value: float) -> None:
    with pytest.raises(ValidationError):
        TrainSettings(**{name: value})
