"""Generation against the plain way: the whole text read again for every token."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from quikjax.errors import QuikError
from quikjax.generation import generate
from quikjax.models.base import CausalLM
from quikjax.models.registry import pure_params
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.testing import tiny_model

PROMPTS = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)


def slow(graphdef: nnx.GraphDef[CausalLM], params: Any, ids: np.ndarray, count: int) -> np.ndarray:
    length = ids.shape[1]
    ids = np.pad(ids, ((0, 0), (0, count)))
    run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
    for at in range(length, length + count):
        # What stands behind a token cannot change its successor.
        ids[:, at] = np.asarray(run(params, ids))[:, at - 1].argmax(-1)
    return ids[:, length:]


# 4-bit activations would turn the last bit of a sum into another code; 16-bit ones follow the same path both ways.
WEIGHT_ONLY = Recipe(name="w4a16", rules=(Rule(match=r"proj\.weight", activation_bits=16, method="rtn", outliers=0),))


@pytest.mark.parametrize("recipe", [Recipe(name="fp", rules=()), WEIGHT_ONLY], ids=lambda recipe: recipe.name)
def test_tokens_are_those_of_reading_everything_again(recipe: Recipe) -> None:
    model = tiny_model()
    graphdef = nnx.split(model)[0]
    params = quantize_params(pure_params(model), recipe)
    expected = slow(graphdef, params, PROMPTS, 12)
    out = generate(graphdef, params, PROMPTS, max_new_tokens=12)
    np.testing.assert_array_equal(out.tokens, expected)
    np.testing.assert_array_equal(out.lengths, [12, 12])
    assert out.prompt_tokens == 18
    assert out.prefill_tokens_per_second > 0
    assert out.decode_tokens_per_second > 0
    # A row alone gives the tokens it gives in a batch.
    np.testing.assert_array_equal(generate(graphdef, params, PROMPTS[1:], max_new_tokens=12).tokens, expected[1:])


def test_rows_end_before_their_stop_token() -> None:
    model = tiny_model()
    graphdef, params = nnx.split(model)[0], pure_params(model)
    free = generate(graphdef, params, PROMPTS, max_new_tokens=12).tokens
    stop = int(free[0, 5])
    first = [int(np.flatnonzero(row == stop)[0]) if stop in row else 12 for row in free]
    out = generate(graphdef, params, PROMPTS, max_new_tokens=12, stop=stop)
    np.testing.assert_array_equal(out.lengths, first)
    for row, (length, tokens) in enumerate(zip(first, out.tokens, strict=True)):
        np.testing.assert_array_equal(tokens[:length], free[row, :length])
        assert (tokens[length:] == stop).all()
    one = generate(graphdef, params, PROMPTS[:1], max_new_tokens=1)
    assert (one.tokens.shape, one.decode_tokens_per_second) == ((1, 1), 0.0)


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        (np.zeros((1, 0), np.int32), 4, "the prompt is empty"),
        (np.zeros((1, 250), np.int32), 7, "exceed the model's context of 256"),
        (np.full((1, 3), 257, np.int32), 4, "outside the model's vocabulary of 257"),
        (np.zeros((1, 3), np.int32), 0, "at least 1"),
    ],
)
def test_prompts_that_cannot_be_continued(ids: np.ndarray, new: int, message: str) -> None:
    model = tiny_model()
    with pytest.raises(QuikError, match=message):
        generate(nnx.split(model)[0], pure_params(model), ids, max_new_tokens=new)
