"""Every family against Hugging Face's PyTorch: `model_variants.py` lists the models, `make_golden.py` says what was computed."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_variants import VARIANTS
from random_weights import checksum, random_weights

from quikjax.models.base import PADDING
from quikjax.models.registry import abstract_model, dotted, nested, pure_params

GOLDEN = Path(__file__).parent / "golden"

# The largest error of any logit, relative to the root mean square of all. Measured: 2e-6 (OPT, Falcon) to 1e-5 (LLaMA).
FLOAT32 = 2e-4
# The root mean square error in units of PyTorch's own in the type, which relative to the logits is 0.8e-2 to 2.8e-2 in
# bfloat16 and 1e-3 to 3.5e-3 in float16. Measured: 0.67 to 1.04 of it (rotation, scores and norms stay float32 here).
HALF = 1.15
# One row for each kind of block; the others repeat much of it and are left to the slow tests.
HALF_VARIANTS = ("llama-2-70b", "opt-125m", "opt-350m", "gpt2", "falcon-7b", "falcon-40b", "falcon-rw-1b")


# With a cache these rows go the same way as another one; their greedy text is left to the slow tests.
GREEDY_REPEATS = (
    "llama-1",
    "llama-3",
    "llama-linear-transformers-5",
    "opt-projected-and-untied",
    "opt-without-final-norm",
    "cerebras-gpt",
    "falcon-180b",
    "falcon-multi-head-linear",
)
# Nor do these; of the last one and of LLaMA-3.1 rows of unequal length go on in a cache below.
GREEDY_LONG = (
    "tinyllama",
    "smollm2",
    "llama-3.1",
    "llama-3.2-transformers-5",
    "llama-linear",
    "llama-dynamic-transformers-5",
    "galactica",
    "gpt2-crfm",
)
# Half of these tests' time would go into optimizing code that runs once. The float32 forward pass of one row for each kind of
# block is compiled as for users.
OPTIMIZED = True
QUICK = {"xla_backend_optimization_level": 0}


class Case(NamedTuple):
    """A golden file, and the same model here."""

    golden: dict[str, np.ndarray]
    graphdef: Any
    params: dict[str, Any]
    forward: Callable[..., jax.Array]
    quick: Callable[..., jax.Array]  # the same without optimizations


def load(name: str) -> Case:
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    assert json.loads(str(golden["config"])) == VARIANTS[name], "the golden file is older than its row: run make_golden.py"
    graphdef, weights = random_model(name, int(golden["seed"]), int(golden["checksum"]))

    def plain(params: dict[str, Any], ids: jax.Array, positions: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(ids, positions)

    forward = jax.jit(plain, compiler_options=None if name in HALF_VARIANTS else QUICK)
    return Case(golden, graphdef, weights, forward, jax.jit(plain, compiler_options=QUICK))


def random_model(name: str, seed: int, crc: int) -> tuple[Any, dict[str, Any]]:
    """A variant's definition and its random weights, which must have this checksum."""
    graphdef, _ = nnx.split(model := abstract_model(VARIANTS[name]))
    turned = {path: -1 if type(model).lies_transposed(path) else 1 for path in dotted(pure_params(model))}
    shapes = {path: leaf.shape[:: turned[path]] for path, leaf in dotted(pure_params(model)).items()}
    weights = random_weights(shapes, seed)
    assert checksum(weights) == crc, "names, shapes or NumPy's random numbers differ from PyTorch's side"
    return graphdef, nested({path: weight.T if turned[path] < 0 else weight for path, weight in weights.items()})


def assert_close(logits: Any, expected: np.ndarray) -> None:
    assert logits.shape == expected.shape
    error = np.abs(np.asarray(logits) - expected).max() / np.sqrt(np.mean(expected**2))
    assert error < FLOAT32


@pytest.fixture(params=VARIANTS, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield load(request.param)
    jax.clear_caches()


def both_rows(golden: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their positions."""
    ids = golden["ids"].astype(np.int32)
    return ids, np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def test_whole_sequences(case: Case) -> None:
    logits = case.forward(case.params, *both_rows(case.golden))
    assert logits.dtype == jnp.float32
    assert_close(np.asarray(logits)[:, case.golden["kept"]], case.golden["logits"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row(case: Case, side: str) -> None:
    ids, positions = both_rows(case.golden)
    length, short = ids.shape[1], int(case.golden["short"])
    there = slice(length - short, length) if side == "left" else slice(0, short)
    ids, positions, real = ids.copy(), positions.copy(), (ids[1, :short].copy(), positions[1, :short].copy())
    ids[1], positions[1] = 7, PADDING
    ids[1, there], positions[1, there] = real
    logits = np.asarray(case.forward(case.params, ids, positions))
    assert_close(logits[1, there], case.golden[side])
    assert_close(logits[0, case.golden["kept"]], case.golden["logits"][0])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in GREEDY_REPEATS) + [pytest.mark.long] * (name in GREEDY_LONG))
        for name in VARIANTS
    ],
    indirect=True,
    scope="module",
)
def test_greedy_tokens_with_a_cache(case: Case) -> None:
    prompt, count = case.golden["prompt"], len(case.golden["tokens"])

    @partial(jax.jit, compiler_options=QUICK)
    def generate(params: dict[str, Any], ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(case.graphdef, params)
        logits, cache = model.prefill(ids, ids.shape[1] + count)

        def step(carry: Any, position: jax.Array) -> Any:
            logits, cache = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
            after, cache = model.extend(token, position[None, None], cache)
            return (after[:, 0], cache), (token[0, 0], logits[0])

        positions = ids.shape[1] + jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(step, (logits, cache), positions)[1]

    tokens, steps = generate(case.params, jnp.asarray(prompt, jnp.int32)[None])
    assert_close(steps, case.golden["steps"])
    assert tokens.tolist() == case.golden["tokens"].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "case",
    [name if name in HALF_VARIANTS else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
    indirect=True,
    scope="module",
)
def test_half_precision(case: Case, dtype: str) -> None:
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), case.params)
    logits = case.quick(half, *both_rows(case.golden))
    assert logits.dtype == jnp.float32
    expected = case.golden["logits"]
    error = np.sqrt(np.mean((np.asarray(logits)[:, case.golden["kept"]] - expected) ** 2) / np.mean(expected**2))
    assert error < HALF * case.golden[dtype]


@pytest.mark.parametrize(
    "case", ["llama-3.1", "opt-350m", "gpt2-crfm", "falcon-7b", "falcon-rw-1b"], indirect=True, scope="module"
)
def test_rows_of_unequal_length_go_on_in_one_cache(case: Case) -> None:
    ids, positions = both_rows(case.golden)
    whole = np.asarray(case.forward(case.params, ids, positions))
    prefill = jax.jit(
        lambda params, ids, positions: nnx.merge(case.graphdef, params).prefill(ids, 20, positions), compiler_options=QUICK
    )
    extend = jax.jit(
        lambda params, ids, positions, cache: nnx.merge(case.graphdef, params).extend(ids, positions, cache),
        compiler_options=QUICK,
    )
    lengths = (9, 5)
    for side in ("left", "right"):
        prompts, places = np.full((2, 9), 3, np.int32), np.full((2, 9), PADDING, np.int32)
        for row, length in enumerate(lengths):
            there = slice(9 - length, 9) if side == "left" else slice(0, length)
            prompts[row, there], places[row, there] = ids[row, :length], np.arange(length)
        logits, cache = prefill(case.params, prompts, places)
        assert_close(logits, np.stack([whole[row, length - 1] for row, length in enumerate(lengths)]))
        # Three tokens at once, twice, each row from where it stands.
        for done in (0, 3):
            after = np.stack([np.arange(length + done, length + done + 3, dtype=np.int32) for length in lengths])
            logits, cache = extend(case.params, np.take_along_axis(ids, after, axis=1), after, cache)
            assert_close(logits, np.take_along_axis(whole, after[:, :, None], axis=1))
        assert int(cache.used) == 15
