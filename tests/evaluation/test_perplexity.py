"""Perplexity, its standard error, divergence and agreement against their definitions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.evaluation import evaluate, reference, windows
from quikjax.testing import tiny_model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_figures_are_their_definitions() -> None:
    model, other = tiny_model(0), tiny_model(1)
    ids = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)
    result = evaluate(model, ids, reference(other, ids))
    mine, theirs = log_softmax(np.asarray(model(jnp.asarray(ids)))), log_softmax(np.asarray(other(jnp.asarray(ids))))
    loss = -np.take_along_axis(mine[:, :-1], ids[:, 1:, None], axis=2).ravel()
    assert result.perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-4)
    assert result.stderr == pytest.approx(np.exp(loss.mean()) * loss.std(ddof=1) / np.sqrt(loss.size), rel=1e-3)
    assert (result.tokens, result.windows, result.window) == (3 * 39, 3, 40)
    kl = (np.exp(theirs) * (theirs - mine)).sum(axis=-1).ravel()
    assert result.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert result.kl_stderr == pytest.approx(kl.std(ddof=1) / np.sqrt(kl.size), rel=1e-3)
    assert result.top1_agreement == pytest.approx((mine.argmax(-1) == theirs.argmax(-1)).mean())


def test_a_model_agrees_with_itself() -> None:
    model = tiny_model()
    ids = np.random.default_rng(0).integers(0, 256, (1, 20)).astype(np.int32)
    result = evaluate(model, ids, reference(model, ids))
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert result.tokens_per_second > 0
    assert "kl" not in evaluate(model, ids).as_json()


def test_a_perplexity_beyond_all_numbers_is_infinite_and_warns_of_nothing() -> None:
    """Warnings are errors here. A single prediction has no standard error."""
    model = tiny_model()
    table = model.model.embed_tokens.weight  # type: ignore[attr-defined]
    table.set_value(table.get_value() * 1e4)
    result = evaluate(model, np.random.default_rng(0).integers(0, 256, (2, 20)).astype(np.int32))
    assert result.perplexity == float("inf")
    assert np.isnan(evaluate(tiny_model(), [[1, 2]]).stderr)


def test_windows_do_not_overlap_and_say_what_is_missing() -> None:
    np.testing.assert_array_equal(windows(np.arange(11), 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(windows(np.arange(11), 3, 2), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(QuikError, match="5 tokens, fewer than one window of 6"):
        windows(np.arange(5), 6)
    with pytest.raises(QuikError, match="has 3 windows of 3 tokens, 4 were asked for"):
        windows(np.arange(11), 3, 4)
    with pytest.raises(QuikError, match="must be positive"):
        windows(np.arange(11), 3, 0)
    with pytest.raises(QuikError, match="at least 2 tokens"):
        windows(np.arange(11), 1)


def test_what_a_model_cannot_evaluate() -> None:
    model = tiny_model()
    with pytest.raises(QuikError, match="exceeds the model's context of 256"):
        evaluate(model, np.zeros((1, 257), np.int32))
    with pytest.raises(QuikError, match="outside the model's vocabulary"):
        evaluate(model, np.full((1, 8), 257, np.int32))
