"""Perplexity, its standard error, divergence and agreement against their definitions in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.evaluation import Evaluation, evaluate, reference, windows
from quikjax.evaluation.distance import ln_ratio_by_kl
from quikjax.evaluation.perplexity import batch_size
from quikjax.models.base import CausalLM
from quikjax.testing import forward, tiny_model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


IDS = np.random.default_rng(0).integers(0, 256, (3, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def models() -> tuple[CausalLM, CausalLM]:
    return tiny_model(0, num_hidden_layers=2), tiny_model(1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def by_definition(models: tuple[CausalLM, CausalLM]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of every successor but the last tokens', of both models."""
    mine, theirs = (log_softmax(np.asarray(forward(model, jnp.asarray(IDS))))[:, :-1] for model in models)
    return mine, theirs


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("as_reference", [False, True])
def test_figures_are_their_definitions(
    models: tuple[CausalLM, CausalLM], by_definition: tuple[np.ndarray, np.ndarray], batch: int, as_reference: bool
) -> None:
    model, other = models
    result = evaluate(model, IDS, reference(other, IDS) if as_reference else other, batch=batch)
    mine, theirs = by_definition
    right = np.take_along_axis(mine, IDS[:, 1:, None], axis=2).ravel()
    original = np.take_along_axis(theirs, IDS[:, 1:, None], axis=2).ravel()
    loss, count = -right, right.size
    assert (result.tokens, result.windows, result.window, result.stride) == (3 * 39, 3, 40, 40)
    assert result.perplexity == pytest.approx(np.exp(loss.mean()), rel=1e-4)
    assert result.stderr == pytest.approx(np.exp(loss.mean()) * loss.std(ddof=1) / np.sqrt(count), rel=1e-3)
    distance = result.distance
    assert distance is not None
    kl = (np.exp(theirs) * (theirs - mine)).sum(axis=-1).ravel()
    assert result.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert result.kl_stderr == pytest.approx(kl.std(ddof=1) / np.sqrt(count), rel=1e-3)
    assert distance.kl_median == pytest.approx(np.median(kl), rel=1e-3)
    assert distance.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert list(distance.kl_percentiles) == ["90", "95", "99", "99.9"]
    for share, value in distance.kl_percentiles.items():
        assert value == pytest.approx(np.percentile(kl, float(share)), rel=1e-3)
    same = (mine.argmax(-1) == theirs.argmax(-1)).mean()
    assert result.top1_agreement == pytest.approx(same)
    assert distance.top1_stderr == pytest.approx(math.sqrt(same * (1 - same) / (count - 1)))
    gap = original - right
    assert distance.original_perplexity == pytest.approx(np.exp(-original.mean()), rel=1e-4)
    assert distance.ln_ppl_ratio == pytest.approx(gap.mean(), rel=1e-3)
    assert distance.ln_ppl_ratio == pytest.approx(math.log(result.perplexity / distance.original_perplexity), rel=1e-3)
    assert distance.ln_ppl_ratio_stderr == pytest.approx(gap.std(ddof=1) / np.sqrt(count), rel=1e-3)
    change = np.exp(right) - np.exp(original)
    assert distance.right_change == pytest.approx(change.mean(), abs=1e-6)
    assert distance.right_change_stderr == pytest.approx(change.std(ddof=1) / np.sqrt(count), rel=1e-3)
    assert distance.right_rms == pytest.approx(np.sqrt((change**2).mean()), rel=1e-3)
    assert ln_ratio_by_kl(distance) == pytest.approx(gap.mean() / kl.mean(), rel=1e-3)
    assert set(result.as_json()) >= {"perplexity", "stderr", "kl", "top1_agreement", "kl_percentiles", "positions"}


def test_perplexity_by_position(models: tuple[CausalLM, CausalLM], by_definition: tuple[np.ndarray, np.ndarray]) -> None:
    result = evaluate(models[0], IDS, models[1])
    loss, original = (-np.take_along_axis(log, IDS[:, 1:, None], axis=2)[..., 0] for log in by_definition)
    assert [(row.first, row.last) for row in result.positions] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 39)]
    for row in result.positions:
        part = loss[:, row.first - 1 : row.last]
        assert row.tokens == part.size
        assert row.perplexity == pytest.approx(np.exp(part.mean()), rel=1e-4)
        assert row.original_perplexity == pytest.approx(np.exp(original[:, row.first - 1 : row.last].mean()), rel=1e-4)


def test_with_a_stride_every_token_counts_once_with_more_context(models: tuple[CausalLM, CausalLM]) -> None:
    model = models[0]
    tokens = IDS.ravel()[:70]
    ids = windows(tokens, 40, stride=10)
    assert ids.shape == (4, 40)
    np.testing.assert_array_equal(ids[1], tokens[10:50])
    result = evaluate(model, ids, stride=10, batch=2)
    log = log_softmax(np.asarray(forward(model, jnp.asarray(ids))))
    slow = [-log[i, at - 1, ids[i, at]] for i in range(4) for at in range(1 if i == 0 else 30, 40)]
    assert result.tokens == len(slow) == 69
    assert result.perplexity == pytest.approx(np.exp(np.mean(slow)), rel=1e-4)
    assert evaluate(model, ids[:1], stride=10).tokens == 39


def test_a_model_agrees_with_itself(models: tuple[CausalLM, CausalLM]) -> None:
    model = models[0]
    ids = IDS[:1]
    result = evaluate(model, ids, reference(model, ids))
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1
    assert result.tokens_per_second > 0
    assert "kl" not in evaluate(model, ids).as_json()
    assert "stderr" not in evaluate(model, ids[:, :2]).as_json()


def test_progress_is_told_after_every_batch(models: tuple[CausalLM, CausalLM]) -> None:
    told: list[tuple[int, int, float]] = []
    result: Evaluation = evaluate(models[0], IDS, batch=2, on_batch=lambda *what: told.append(what))
    assert [what[:2] for what in told] == [(2, 3), (3, 3)]
    assert told[-1][2] == pytest.approx(result.perplexity)


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
    with pytest.raises(QuikError, match="stride must be between 1 and the window's 3 tokens, not 4"):
        windows(np.arange(11), 3, stride=4)


def test_what_a_model_cannot_evaluate(models: tuple[CausalLM, CausalLM]) -> None:
    model = models[0]
    with pytest.raises(QuikError, match="exceeds the model's context of 256"):
        evaluate(model, np.zeros((1, 257), np.int32))
    with pytest.raises(QuikError, match="outside the model's vocabulary"):
        evaluate(model, np.full((1, 8), 257, np.int32))
    with pytest.raises(QuikError, match="vocabularies of 257 and 258 tokens"):
        evaluate(model, np.zeros((1, 8), np.int32), tiny_model(vocab_size=258))


@pytest.mark.parametrize(
    ("count", "most", "size"), [(1, 4, 1), (3, 1, 1), (3, 2, 2), (5, 4, 3), (9, 4, 3), (8, 4, 4), (16, 5, 4)]
)
def test_batches_are_even(count: int, most: int, size: int) -> None:
    assert batch_size(count, most) == size
    padded = size * -(-count // size)
    assert padded - count < -(-count // most), "less than one window a batch is filling"


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_is_a_positive_number(models: tuple[CausalLM, CausalLM], batch: int) -> None:
    with pytest.raises(QuikError, match="batch must be"):
        evaluate(models[0], IDS, batch=batch)
