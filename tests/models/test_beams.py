"""Beam search against transformers' (`make_beam_golden.py`) and against trying everything; what it does not do is said."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_bart
import test_golden
from bart_variants import VARIANTS as BARTS
from beam_cases import CASES, MODELS, NEW, STOPS, texts
from flax import nnx

from quikjax.errors import QuikError
from quikjax.generation import Beams, Generator, Sampling, generator_of
from quikjax.generation.beams import NEVER, Continuations, Search, advanced
from quikjax.generation.decode import Kind, Past
from quikjax.models.cache import StackedCache, empty_cache
from quikjax.testing import tiny_model, tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def generator(name: str) -> tuple[Generator, dict[str, np.ndarray]]:
    """The model of a golden file, and what transformers found with it."""
    with np.load(GOLDEN / f"beams-{name}.npz") as file:
        golden = dict(file)
    if name in BARTS:
        model, crc = test_bart.bart(BARTS[name], int(golden["seed"]))
        assert crc == int(golden["checksum"])
    else:
        graphdef, weights = test_golden.random_model(name, int(golden["seed"]), int(golden["checksum"]))
        model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, weights))
    return generator_of(model, batch_size=16), golden


# Each case is a program of its own to compile; these show every setting, and both kinds of model.
FAST = {("gpt2", "never"), ("gpt2", "short"), ("bart-summarizer", "as-bart-large-cnn"), ("bart-summarizer", "greedy")}
PAIRS = [pytest.param(name, key, marks=() if (name, key) in FAST else pytest.mark.long) for name in MODELS for key in CASES]


@pytest.fixture(scope="module")
def given() -> Callable[[str], tuple[Generator, dict[str, np.ndarray]]]:
    return functools.cache(generator)


def settings(case: dict[str, Any]) -> dict[str, Any]:
    sampled = {key: case[key] for key in ("no_repeat_ngram", "min_new_tokens", "repetition_penalty") if key in case}
    searched = {key: case[key] for key in ("length_penalty", "early_stopping") if key in case}
    count = case["beams"]
    beams = Beams(count=count, **searched) if count > 1 else None
    return {"sampling": Sampling(**sampled), "beams": beams, "samples": count, "stop": case.get("stops", STOPS)}


@pytest.mark.parametrize(("name", "key"), PAIRS)
def test_it_finds_what_transformers_finds(
    given: Callable[[str], tuple[Generator, dict[str, np.ndarray]]], name: str, key: str
) -> None:
    """Three texts of unequal lengths at once, which transformers was given one by one; every beam, and its score."""
    made, golden = given(name)
    found = made.generate(texts(name), max_new_tokens=NEW, **settings(CASES[key]))
    stops = CASES[key].get("stops", STOPS)
    for row, whole in enumerate(golden[f"{key}/tokens"].reshape(-1, NEW)):
        expected = [int(token) for token in whole if token >= 0]
        ended = expected[-1] in stops
        assert found.finished[row] == ("stop" if ended else "length")
        assert found.tokens[row, : found.lengths[row]].tolist() == (expected[:-1] if ended else expected)
    if found.scores is not None:
        np.testing.assert_allclose(found.scores, golden[f"{key}/scores"].reshape(-1), rtol=1e-4, atol=1e-4)


def states(count: int, room: int) -> tuple[Continuations, StackedCache]:
    """The first beam of a text of one token, and a cache that only counts its rows."""
    nothing = Continuations(
        tokens=jnp.zeros((1, count, room), jnp.int32),
        lengths=jnp.zeros((1, count), jnp.int32),
        scores=jnp.full((1, count), NEVER),
    )
    return nothing, empty_cache(1, 1, count, 2, 1)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all_texts(penalty: float) -> None:
    """Where every text has a beam of its own, the search gives what scoring each in float64 gives; next tokens by a table."""
    vocabulary, new, stop, count = 4, 3, 3, 40
    rng = np.random.default_rng(4)
    table = rng.standard_normal((vocabulary + 1, vocabulary)).astype(np.float32)
    logs = table.astype(np.float64) - np.log(np.exp(table.astype(np.float64)).sum(1, keepdims=True))
    scored = {}
    for text in itertools.product(range(vocabulary), repeat=new):
        end = text.index(stop) + 1 if stop in text else new
        total = sum(logs[before, token] for before, token in zip((vocabulary, *text), text[:end], strict=False))
        scored[text[:end]] = total / end**penalty
    expected = sorted(scored.items(), key=lambda pair: -pair[1])

    nothing, cache = states(count, new)
    search = Search(
        cache=cache,
        last=jnp.full(count, vocabulary, jnp.int32),  # the text before has a row of its own
        at=jnp.zeros(count, jnp.int32),
        past=Past(),
        going=dataclasses.replace(nothing, scores=nothing.scores.at[0, 0].set(0)),
        ended=dataclasses.replace(nothing, scores=jnp.full_like(nothing.scores, -jnp.inf)),
        open=jnp.ones(1, bool),
        step=jnp.int32(0),
    )
    beams = Beams(count=count, length_penalty=penalty, early_stopping="never")
    given = (jnp.asarray([stop]), Sampling().values(), jnp.int32(new), Kind(), beams)
    for _ in range(new):
        search = advanced(search, jnp.asarray(table)[search.last], *given)
    found = search.ended
    assert int((np.asarray(found.lengths) > 0).sum()) == len(expected)
    for i, (text, score) in enumerate(expected):
        assert tuple(np.asarray(found.tokens)[0, i, : found.lengths[0, i]].tolist()) == text
        assert float(found.scores[0, i]) == pytest.approx(score, rel=1e-5)


def test_texts_that_are_not_there_are_empty() -> None:
    """Of two forced tokens there is one text; and a steep penalty, under which scores are beyond -1e9, loses none."""
    model, _ = test_bart.bart(BARTS["bart-summarizer"])
    found = generator_of(model).generate([[5, 6, 2]], max_new_tokens=2, beams=Beams(count=3), samples=3)
    assert found.lengths.tolist() == [1, 0, 0]
    assert found.scores is not None
    assert np.isfinite(found.scores).tolist() == [True, False, False]
    steep = Beams(count=2, length_penalty=-10.0)
    long = Generator(tiny_model()).generate([[5, 6]], max_new_tokens=12, beams=steep, samples=2, stop=[])
    assert long.lengths.tolist() == [12, 12]
    assert long.scores is not None
    assert (long.scores < -1e9).all()


def test_no_candidates_are_sorted() -> None:
    """A step takes the best few of all candidates; a sort of them took longer than the model."""
    count, vocabulary = 3, 50
    nothing, cache = states(count, 4)
    zeros, step = jnp.zeros(count, jnp.int32), jnp.int32(1)
    search = Search(
        cache=cache, last=zeros, at=zeros, past=Past(), going=nothing, ended=nothing, open=jnp.ones(1, bool), step=step
    )

    def once(search: Search, logits: jax.Array) -> Search:
        return advanced(search, logits, jnp.asarray([2]), Sampling().values(), jnp.int32(4), Kind(), Beams(count=count))

    program = jax.jit(once).lower(search, jnp.zeros((count, vocabulary))).compile().as_text()
    assert program is not None
    assert "TopK" in program
    assert " sort(" not in program


def test_a_search_compiles_once_and_gives_texts() -> None:
    made = Generator(tiny_model(), tokenizer=tiny_tokenizer(), batch_size=4)
    beams = Beams(count=2)
    pieces: list[tuple[int, str]] = []
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    found = made.generate(
        prompts, max_new_tokens=6, beams=beams, samples=2, on_text=lambda row, piece: pieces.append((row, piece))
    )
    assert found.texts is not None
    assert found.scores is not None
    assert dict(pieces) == {i: text for i, text in enumerate(found.texts) if text}
    assert (found.scores[::2] >= found.scores[1::2]).all()
    compiled = made.programs.compiled
    one = made.generate(prompts[3:2:-1] + prompts[:1], max_new_tokens=6, beams=beams)
    assert made.programs.compiled == compiled
    np.testing.assert_array_equal(one.tokens, found.tokens[[6, 0]])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_beams_are_followed_in_smaller_caches(kind: str) -> None:
    """Rows of every array of a cache go with their beams: scores are near those of float32, and of the same texts."""
    beams, model, prompts = Beams(count=3), tiny_model(), [[5, 6, 7], [8, 9]]
    exact, small = (
        Generator(model, cache=cache).generate(prompts, max_new_tokens=9, beams=beams, samples=3, stop=[])
        for cache in ("float32", kind)
    )
    assert exact.scores is not None
    assert small.scores is not None
    difference = np.abs(exact.scores - small.scores).max()
    assert 0 < difference < 0.05


def test_what_a_search_does_not_do_is_said() -> None:
    made = Generator(tiny_model(), tokenizer=tiny_tokenizer())
    two = Beams(count=2)
    for asked, said in (
        ({"beams": two, "samples": 3}, "2 beams finds so many texts of a prompt, not 3"),
        ({"beams": two, "stop_strings": ["a"]}, "give stop tokens, or no beams"),
        ({"beams": two, "logprobs": True}, "a search gives each text's score"),
        ({"beams": two, "sampling": Sampling(temperature=1.0)}, "searched and not drawn"),
        ({"sampling": Sampling(min_new_tokens=9)}, "at most 4 may be added"),
    ):
        with pytest.raises(QuikError, match=said):
            made.generate([[5]], max_new_tokens=4, **asked)
    with pytest.raises(QuikError, match="deterministic is for tokens chosen one by one"):
        Generator(tiny_model(), deterministic=True).generate([[5]], max_new_tokens=4, beams=two)
    for wrong, said in (
        ({"count": 1}, "2 beams or more, not 1"),
        ({"count": 2, "length_penalty": float("nan")}, "from -10 to 10, not nan"),
        ({"count": 2, "length_penalty": -11.0}, "from -10 to 10, not -11"),
        ({"count": 2, "early_stopping": "maybe"}, "True, False or 'never'"),
    ):
        with pytest.raises(QuikError, match=said):
            Beams(**wrong)
