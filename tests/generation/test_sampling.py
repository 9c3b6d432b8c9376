"""Sampling against transformers' own processors (golden values) and by its properties."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quikjax.errors import QuikError
from quikjax.generation import sampling
from quikjax.generation.settings import Sampling

GOLDEN = np.load(Path(__file__).parent / "golden" / "processors.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN.files if name.startswith("case")})


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    temperature, top_k, top_p, min_p, penalty = GOLDEN[f"{case}/settings"].tolist()
    chosen = Sampling(temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    logits, seen = jnp.asarray(GOLDEN["logits"]), jnp.asarray(GOLDEN["seen"])
    found = sampling.processed(sampling.penalized(logits, seen, chosen.values().repetition_penalty), chosen.values())
    expected = GOLDEN[f"{case}/expected"]
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(np.where(np.isinf(found), 0, found), np.where(np.isinf(expected), 0, expected), rtol=1e-6)


# No subnormals: XLA takes them for zero, and says so of its floats.
rows = st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), min_size=40, max_size=40).map(
    lambda row: np.asarray([row], np.float32)
)


@settings(max_examples=40, deadline=None)
@given(logits=rows, k=st.integers(0, 60))
def test_top_k_keeps_the_highest(logits: np.ndarray, k: int) -> None:
    kept = np.isfinite(np.asarray(TOP_K(logits, np.int32(k))))[0]
    wanted = min(k or 40, 40)
    threshold = np.sort(logits[0])[-wanted]
    np.testing.assert_array_equal(kept, logits[0] >= threshold)


@settings(max_examples=40, deadline=None)
@given(logits=rows, p=st.floats(0.0625, 0.984375, width=32))
def test_top_p_keeps_the_fewest_that_are_enough(logits: np.ndarray, p: float) -> None:
    kept = np.isfinite(np.asarray(TOP_P(logits, np.float32(p))))[0]
    weights = np.exp(np.float64(logits[0]) - logits[0].max())
    weights /= weights.sum()
    assert kept[logits[0].argmax()]
    assert logits[0][kept].min() > logits[0][~kept].max(initial=-np.inf)
    assert weights[kept].sum() >= p - 1e-6
    # Without its least likely tokens, those alike counted as one, it would not be enough.
    assert weights[kept & (logits[0] > logits[0][kept].min())].sum() < p + 1e-6


@settings(max_examples=20, deadline=None)
@given(logits=rows, share=st.floats(0, 1, width=32, allow_subnormal=False))
def test_min_p_is_relative_to_the_most_likely(logits: np.ndarray, share: float) -> None:
    kept = np.isfinite(np.asarray(MIN_P(logits, np.float32(share))))[0]
    ratio = np.exp(np.float64(logits[0]) - logits[0].max())
    clear = np.abs(ratio - share) > 1e-6
    np.testing.assert_array_equal(kept[clear], (ratio >= share)[clear])


WITHOUT_REPEATED = jax.jit(sampling.without_repeated, static_argnums=3)
TOP_K, TOP_P, MIN_P = jax.jit(sampling.top_k), jax.jit(sampling.top_p), jax.jit(sampling.min_p)


@given(
    history=arrays(np.int32, (2, 10), elements=st.integers(0, 3)),
    length=arrays(np.int32, (2,), elements=st.integers(1, 10)),
    n=st.integers(1, 4) | st.just(11),
)
def test_no_sequence_is_written_twice(history: np.ndarray, length: np.ndarray, n: int) -> None:
    """What may follow is every token but those that end a sequence of `n` which stands in the text already."""
    kept = np.isfinite(np.asarray(WITHOUT_REPEATED(jnp.zeros((2, 5)), history, length, n)))
    for row in range(2):
        text = history[row, : length[row]].tolist()
        written = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        before = tuple(text[len(text) - n + 1 :]) if n > 1 else ()
        forbidden = {token for token in range(5) if (*before, token) in written} if len(text) >= n - 1 else set()
        assert set(np.flatnonzero(~kept[row])) == forbidden


def test_a_text_does_not_stop_before_its_least_length() -> None:
    logits, stops = jnp.zeros((2, 6)), jnp.asarray([1, 4, -1, -1])
    kept = np.isfinite(np.asarray(sampling.unended(logits, jnp.asarray([2, 3]), stops, np.int32(3))))
    assert kept.tolist() == [[True, False, True, True, False, True], [True] * 6]


def test_settings_that_are_off_change_nothing() -> None:
    logits = jnp.asarray(GOLDEN["logits"])
    np.testing.assert_array_equal(sampling.processed(logits, Sampling().values()), logits)


def test_draws_follow_the_probabilities_and_each_row_its_own_key() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2, 0.0]] * 4000, jnp.float32))
    keys = sampling.row_keys(np.arange(4000, dtype=np.uint32), np.zeros(4000, np.int32))
    drawn = np.asarray(sampling.draw(logits, keys))
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0], atol=4 * np.sqrt(0.25 / 4000))
    # A row alone, with its key, draws what it drew among others.
    assert int(sampling.draw(logits[7:8], keys[7:8])[0]) == drawn[7]
    samples = sampling.row_keys(np.full(2, 7, np.uint32), np.arange(2, dtype=np.int32))
    assert not np.array_equal(*jax.random.key_data(samples))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "the temperature is 0"),
        ({"temperature": float("nan")}, "the temperature is 0"),
        ({"temperature": float("inf")}, "the temperature is 0"),
        ({"temperature": 1.0, "top_k": -1}, "top-k keeps that many"),
        ({"no_repeat_ngram": -2}, "no-repeat-ngram is the length"),
        ({"min_new_tokens": -1}, "min-new-tokens is how many"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p is a probability"),
        ({"temperature": 1.0, "min_p": 1.5}, "min-p is a share"),
        ({"repetition_penalty": 0.0}, "the repetition penalty is above 0"),
        ({"top_p": 0.5}, "give a temperature above 0"),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(QuikError, match=message):
        Sampling(**wrong)  # type: ignore[arg-type]
