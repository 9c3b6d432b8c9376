"""Log-likelihoods and greedy continuations against the slow way: one request, one forward pass, float64."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from quikjax.errors import QuikError
from quikjax.evaluation.scoring import Scorer, batches
from quikjax.models.base import CausalLM
from quikjax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny_model(max_position_embeddings=64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def scorer(model: CausalLM) -> Scorer:
    return Scorer(model, tiny_tokenizer())


@partial(jax.jit, static_argnums=0)
def all_logits(graphdef: Any, params: Any, ids: Any) -> Any:
    return nnx.merge(graphdef, params)(ids)


def log_softmax(model: CausalLM, tokens: list[int]) -> np.ndarray:
    # One padded length, one compilation.
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(all_logits(*nnx.split(model), padded), np.float64)[0, : len(tokens)]
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def slow(model: CausalLM, before: list[int], after: list[int]) -> tuple[float, bool]:
    tokens = [*before, *after][-65:]
    logs = log_softmax(model, tokens[:-1])[-len(after) :]
    return float(sum(logs[i, token] for i, token in enumerate(after))), bool((logs.argmax(axis=1) == after).all())


def bytes_of(text: str) -> list[int]:
    return [int(token) for token in tiny_tokenizer()(text)["input_ids"]]


def test_pairs_are_scored_as_one_by_one(model: CausalLM, scorer: Scorer) -> None:
    pairs = [
        ("Question: why?\nAnswer:", " because"),
        ("a", "b"),
        ("", "no context"),
        ("x" * 80, " too long"),
        ("ends in spaces  ", "c"),
        ("  ", "only spaces"),
    ]
    tokens = [
        (bytes_of(pairs[0][0]), bytes_of(pairs[0][1])),
        (bytes_of("a"), bytes_of("b")),
        ([scorer.prefix], bytes_of("no context")),
        (bytes_of(pairs[3][0]), bytes_of(pairs[3][1])),
        (bytes_of("ends in spaces"), bytes_of("  c")),
        ([scorer.prefix], bytes_of("  only spaces")),
    ]
    for (log, greedy), (before, after) in zip(scorer.loglikelihoods(pairs), tokens, strict=True):
        expected = slow(model, before, after)
        assert log == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]


def test_a_greedy_continuation_is_known_as_one(model: CausalLM, scorer: Scorer) -> None:
    before = bytes_of("abc")
    best = int(log_softmax(model, before)[-1].argmax())
    other = (best + 1) % 256
    scores = scorer.score([(before, [best]), (before, [other]), (before, [other, best])])
    assert [greedy for _, greedy in scores] == [True, False, False]


@pytest.mark.parametrize("length", [0, 1, 64, 65, 150])
def test_rolling_predicts_every_token_once_with_the_harness_windows(model: CausalLM, scorer: Scorer, length: int) -> None:
    text = "".join(chr(token) for token in np.random.default_rng(0).integers(97, 122, length))
    ids = bytes_of(text)
    expected = 0.0
    for start in range(0, length, 64):
        end = min(start + 64, length)
        before = [scorer.prefix] if start == 0 else ids[end - 65 : start]
        expected += slow(model, before, ids[start:end])[0]
    assert scorer.rolling_loglikelihoods([text]) == [pytest.approx(expected, rel=1e-4)]


def test_continuations_are_greedy_and_end_before_what_was_asked(model: CausalLM, scorer: Scorer) -> None:
    prompts = ["one prompt", "two", "six"]
    free = scorer.continuations([(prompt, {"max_gen_toks": 5}) for prompt in prompts])
    for prompt, text in zip(prompts, free, strict=True):
        made: list[int] = []
        for _ in range(5):
            made.append(int(log_softmax(model, bytes_of(prompt) + made)[-1].argmax()))
            if made[-1] == 256:
                break
        assert text == tiny_tokenizer().decode(made, skip_special_tokens=True)
    end = free[0][1:3]
    cut = scorer.continuations([("one prompt", {"max_gen_toks": 5, "until": [end]})])
    assert cut[0] == free[0][: free[0].index(end)]
    with pytest.raises(QuikError, match="asks for sampling"):
        scorer.continuations([("a", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(QuikError, match="asks for 64 new tokens"):
        scorer.continuations([("a", {"max_gen_toks": 64})])


def test_batches_cover_every_request_once_and_pad_little() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(1, 2000, 200)]
    seen: list[int] = []
    for members, padded in batches(lengths):
        assert all(padded - max(32, padded / 4) < lengths[index] <= padded for index in members)
        seen += members
    assert sorted(seen) == list(range(200))
    assert [lengths[index] for index in seen] == sorted(lengths, reverse=True)
    assert len({padded for _, padded in batches(lengths)}) <= 32


def test_what_cannot_be_scored(scorer: Scorer) -> None:
    with pytest.raises(QuikError, match="a continuation has 0 tokens"):
        scorer.loglikelihoods([("context", "")])
    with pytest.raises(QuikError, match="a continuation has 65 tokens, where 1 to 64"):
        scorer.loglikelihoods([("context", "x" * 65)])
    with pytest.raises(QuikError, match="no chat template"):
        scorer.chat([{"role": "user", "content": "hello"}])


def test_a_chat_template_is_applied(model: CausalLM) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    assert Scorer(model, tokenizer).chat([{"role": "user", "content": "hello"}]) == "<user>hello<answer>"
