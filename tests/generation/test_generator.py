"""A generator against reading everything again: ragged prompts, buckets, caches, determinism, stops, and no compiling twice."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.generation import Generator, Sampling
from quikjax.generation.cache_error import cache_error
from quikjax.generation.programs import Programs
from quikjax.generation.rows import bucket
from quikjax.models import cache as caches
from quikjax.models import stacked
from quikjax.models.base import CausalLM
from quikjax.models.registry import pure_params
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.testing import forward, tiny_model, tiny_tokenizer, write_tiny_checkpoint
from quikjax.weights.compiled import why_no_compiled_products

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, length).tolist() for length in (3, 40, 17, 9, 16, 1, 70, 25, 5, 11)]

# Generators here share what they compile.
PROGRAMS = Programs()


def packed_model(rule: dict[str, Any] | None = None, **fields: Any) -> CausalLM:
    model = tiny_model(**fields)
    rules = (Rule(match=r"proj\.weight", method="rtn", outliers=0, **(rule or {})),)
    return nnx.merge(nnx.split(model)[0], quantize_params(pure_params(model), Recipe(name="test", rules=rules)))


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model(), tokenizer=tiny_tokenizer(), programs=PROGRAMS)


def logits_of(model: CausalLM, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits behind every token of every text, read whole."""
    size = max(map(len, texts))
    ids = np.zeros((len(texts), size), np.int32)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
    whole = np.asarray(forward(model, ids))
    return [whole[i, : len(text)] for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, id="batched", marks=pytest.mark.long), pytest.param({"deterministic": True}, id="deterministic")],
)
def test_each_row_goes_on_as_if_read_whole(settings: dict[str, Any]) -> None:
    model = tiny_model()
    out = Generator(model, batch_size=4, programs=PROGRAMS, **settings).generate(PROMPTS, max_new_tokens=20, logprobs=True)
    assert out.logprobs is not None
    whole = logits_of(model, [[*prompt, *row.tolist()] for prompt, row in zip(PROMPTS, out.tokens, strict=True)])
    for prompt, tokens, chances, logits in zip(PROMPTS, out.tokens, out.logprobs, whole, strict=True):
        behind = logits[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(tokens, behind.argmax(axis=1))
        expected = behind.max(axis=1) - np.log(np.exp(np.float64(behind)).sum(axis=1))
        np.testing.assert_allclose(chances, expected, atol=1e-3)  # random weights with large norms magnify rounding
    assert out.finished == ("length",) * len(PROMPTS)
    assert out.decoded == 19 * len(PROMPTS)


@pytest.mark.parametrize("kind", ["float32", pytest.param("bfloat16", marks=pytest.mark.long), "int8"])
def test_caches_of_every_kind_give_nearly_the_same_probabilities(kind: str) -> None:
    model = tiny_model()
    out = Generator(model, cache=kind, programs=PROGRAMS).generate(PROMPTS[1:3], max_new_tokens=24, logprobs=True)
    assert out.logprobs is not None
    whole = logits_of(model, [[*prompt, *row.tolist()] for prompt, row in zip(PROMPTS[1:3], out.tokens, strict=True)])
    errors: list[float] = []
    for prompt, tokens, chances, logits in zip(PROMPTS[1:3], out.tokens, out.logprobs, whole, strict=True):
        behind = np.float64(logits[len(prompt) - 1 : -1])
        exact = behind - np.log(np.exp(behind).sum(axis=1, keepdims=True))
        errors += np.abs(chances - exact[np.arange(len(tokens)), tokens]).tolist()
    # Of the first token nothing came from the cache.
    typical = float(np.median(errors))
    assert typical < {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.04}[kind]
    assert kind == "float32" or typical > 1e-4


@pytest.mark.long
def test_the_error_of_a_cache_is_that_of_its_codes_and_of_what_follows() -> None:
    model = tiny_model()
    text = np.asarray(PROMPTS[6], np.int32)
    exact = cache_error(Generator(model, programs=PROGRAMS), text, decoded=4)
    assert exact == (0, 0, pytest.approx(0, abs=1e-9), 4)
    narrow = {
        kind: cache_error(Generator(model, cache=kind, programs=PROGRAMS), text, decoded=4) for kind in ("bfloat16", "int8")
    }
    # Rounding a mantissa of 8 bits, and codes of 255 steps over 16 numbers.
    assert 2**-11 < narrow["bfloat16"].keys < 2**-8
    assert 2**-9 < narrow["int8"].values < 2**-6
    assert 0 < narrow["bfloat16"].kl < 0.1
    assert 0 < narrow["int8"].kl < 0.1
    with pytest.raises(QuikError, match="5 to 256 tokens are needed"):
        cache_error(Generator(model, programs=PROGRAMS), text[:4], decoded=4)


def test_programs_know_the_memory_they_take() -> None:
    programs = Programs()
    x = np.zeros((64, 64), np.float32)
    programs.run(lambda x: x @ x + 1, (), (x,))
    assert 2 * x.nbytes <= programs.largest < 4 * x.nbytes
    programs.largest = 0
    programs.run(lambda y: y + 1, (), (x[:1],))
    assert 0 < programs.largest < x.nbytes


@pytest.mark.long
def test_a_cpu_keeps_what_16_bits_computed_in_float32() -> None:
    narrow = nnx.merge(
        nnx.split(tiny_model())[0], jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pure_params(tiny_model()))
    )
    given = {kind: Generator(narrow, cache=kind, programs=PROGRAMS) for kind in (None, "bfloat16")}
    assert {kind: generator.cache for kind, generator in given.items()} == {None: "float32", "bfloat16": "bfloat16"}
    # The keys and values are the same numbers in both.
    one, other = (g.generate(PROMPTS[:3], max_new_tokens=8, logprobs=True) for g in given.values())
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.logprobs is not None
    np.testing.assert_array_equal(one.logprobs, other.logprobs)


@pytest.mark.long
def test_codes_in_whole_bytes_multiply_to_the_same_bits() -> None:
    model = packed_model(QUANTIZED)
    ids, lengths = np.asarray([PROMPTS[1]], np.int32), np.array([len(PROMPTS[1])], np.int32)
    logits = []
    for widen in (False, True):
        layout, params = stacked.stack(model, widen=widen)
        held = {leaf.dtype for leaf in jax.tree.leaves(params["runs"])}
        assert (jnp.dtype(jnp.int4) in held) is not widen
        logits.append(np.asarray(jax.jit(partial(stacked.read, layout))(params, ids, lengths)[0]))
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("products", ["compiled", pytest.param("XLA's", marks=pytest.mark.long)])
def test_blocks_compiled_one_by_one_write_the_same(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if products == "XLA's":
        monkeypatch.setenv("QUIKJAX_NATIVE", "0")
    model = packed_model(QUANTIZED, num_hidden_layers=2)
    narrow = nnx.merge(
        nnx.split(model)[0],
        jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim == 2 and leaf.dtype == jnp.float32 else leaf, pure_params(model)
        ),
    )
    codes = [leaf for leaf in jax.tree.leaves(pure_params(narrow)) if leaf.dtype == jnp.int4]
    scanned, unrolled = Generator(narrow, programs=PROGRAMS), Generator(narrow, unrolled=True, release=True, programs=PROGRAMS)
    assert (scanned.layout.unrolled, unrolled.layout.unrolled) == (False, True)
    # Held as a CPU multiplies them, in either form, and what they were made of is free.
    codes_in = "int8" if why_no_compiled_products() else "uint8"
    assert {leaf.dtype for leaf in jax.tree.leaves(unrolled.params["runs"])} == {
        jnp.dtype(name) for name in ("float32", "float16", codes_in, "int32")
    }
    assert all(leaf.is_deleted() for leaf in codes)
    one, other = (g.generate(PROMPTS[:3], max_new_tokens=8, logprobs=True) for g in (scanned, unrolled))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.logprobs is not None
    assert other.logprobs is not None
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)


def test_int8_codes_are_within_half_a_step() -> None:
    x = jnp.asarray(RNG.normal(size=(2, 5, 3, 16)), jnp.float32).at[0, 0, 0].set(0)
    codes, scale = caches.encode(x)
    error = np.abs(np.float64(codes) * np.asarray(scale, np.float64)[..., None] - np.asarray(x, np.float64))
    assert (error <= np.abs(np.asarray(x)).max(axis=-1, keepdims=True) / 127 * 0.5000001).all()
    assert float(scale[0, 0, 0]) == 0


QUANTIZED = {"weight_bits": 4, "activation_bits": 4}


@pytest.mark.parametrize(
    "make",
    [pytest.param(tiny_model, id="dense", marks=pytest.mark.long), pytest.param(lambda: packed_model(QUANTIZED), id="packed")],
)
def test_deterministic_rows_have_the_bits_they_have_alone(make: Any) -> None:
    generator = Generator(make(), deterministic=True, programs=PROGRAMS)
    sampling = Sampling(temperature=1.0, top_p=0.95)

    def run(which: list[int], new: int = 20) -> list[tuple[bytes, bytes]]:
        out = generator.generate([PROMPTS[i] for i in which], max_new_tokens=new, logprobs=True, sampling=sampling, seed=which)
        assert out.logprobs is not None
        return [(tokens[:20].tobytes(), chances[:20].tobytes()) for tokens, chances in zip(out.tokens, out.logprobs, strict=True)]

    # Of 3, 40, 17, 1 and 70 tokens: every other length is another program.
    some = (0, 1, 2, 5, 6)
    alone = {i: run([i])[0] for i in some}
    for size in (2, 5, 8):
        which = [some[(3 * size + i) % len(some)] for i in range(size)]
        assert run(which) == [alone[i] for i in which], size
    # A longer continuation asks for a larger cache.
    assert run([6, 2], new=120) == [alone[6], alone[2]]


def test_no_request_of_a_known_bucket_compiles() -> None:
    generator = Generator(tiny_model(), batch_size=4)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = generator.generate(PROMPTS[:4], max_new_tokens=40)
        assert generator.programs.compiled > 0
        before = generator.programs.compiled
        assert len(compiled) >= before
        compiled.clear()
        for shift in range(3):
            again = [[(token + shift) % 256 for token in prompt] for prompt in PROMPTS[:4]]
            out = generator.generate(again, max_new_tokens=40 - shift, seed=shift, stop=[7, 9])
        np.testing.assert_array_equal(first.tokens, generator.generate(PROMPTS[:4], max_new_tokens=40).tokens)
        assert out.tokens.shape == (4, 38)
        assert generator.programs.compiled == before
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_row_ends_before_any_of_its_stop_tokens(generator: Generator) -> None:
    free = generator.generate(PROMPTS[:3], max_new_tokens=30)
    stops = [int(free.tokens[0, 7]), int(free.tokens[1, 20])]
    out = generator.generate(PROMPTS[:3], max_new_tokens=30, stop=stops)
    for row, tokens in enumerate(free.tokens):
        ends = np.flatnonzero(np.isin(tokens, stops))
        length = int(ends[0]) if len(ends) else 30
        assert out.lengths[row] == length
        assert out.finished[row] == ("stop" if len(ends) else "length")
        np.testing.assert_array_equal(out.tokens[row, :length], tokens[:length])
        assert (out.tokens[row, length:] == stops[0]).all()


def test_a_text_ends_before_a_stop_string(generator: Generator) -> None:
    prompt = list(b"hello")
    free = generator.generate([prompt], max_new_tokens=40)
    assert free.texts is not None
    stop = free.texts[0][9:12]
    pieces: list[str] = []
    out = generator.generate([prompt], max_new_tokens=40, stop_strings=[stop], on_text=lambda row, text: pieces.append(text))
    assert out.texts is not None
    assert out.texts[0] == free.texts[0][: free.texts[0].index(stop)] == "".join(pieces)
    assert out.finished == ("stop",)
    np.testing.assert_array_equal(out.tokens[0, : out.lengths[0]], free.tokens[0, : out.lengths[0]])


def test_samples_depend_on_prompt_seed_and_number_only(generator: Generator) -> None:
    sampling = Sampling(temperature=1.0, top_k=50, repetition_penalty=1.2)
    out = generator.generate(PROMPTS[:2], max_new_tokens=12, sampling=sampling, seed=5, samples=3)
    assert out.tokens.shape == (6, 12)
    assert len({row.tobytes() for row in out.tokens}) == 6
    alone = generator.generate(PROMPTS[1:2], max_new_tokens=12, sampling=sampling, seed=[5])
    np.testing.assert_array_equal(alone.tokens[0], out.tokens[3])
    other = generator.generate(PROMPTS[1:2], max_new_tokens=12, sampling=sampling, seed=6)
    assert not np.array_equal(other.tokens, alone.tokens)


def test_a_penalty_follows_the_whole_text(generator: Generator) -> None:
    """Greedy with a strong penalty never repeats a token while others are left."""
    out = generator.generate([PROMPTS[0]], max_new_tokens=60, sampling=Sampling(repetition_penalty=1e6))
    text = [*PROMPTS[0], *out.tokens[0].tolist()]
    fresh = out.tokens[0].tolist()
    assert len(set(fresh)) == len(fresh)
    assert not set(fresh) & set(PROMPTS[0])
    assert len(set(text)) == len(set(PROMPTS[0])) + 60


@pytest.mark.long
def test_blocks_that_differ_form_runs_of_their_own() -> None:
    model = tiny_model(num_hidden_layers=5)
    rules = (
        Rule(match=r"layers\.2\.mlp.*proj\.weight", method="rtn", outliers=0, weight_bits=8, activation_bits=16),
        Rule(match=r"proj\.weight", method="rtn", outliers=0, activation_bits=16),
    )
    graphdef = nnx.split(model)[0]
    mixed = nnx.merge(graphdef, quantize_params(pure_params(model), Recipe(name="test", rules=rules)))
    generator = Generator(mixed, programs=PROGRAMS)
    assert [run.count for run in generator.layout.runs] == [2, 1, 2]
    out = generator.generate(PROMPTS[:2], max_new_tokens=10)
    whole = logits_of(mixed, [[*prompt, *row.tolist()] for prompt, row in zip(PROMPTS[:2], out.tokens, strict=True)])
    for prompt, tokens, logits in zip(PROMPTS[:2], out.tokens, whole, strict=True):
        np.testing.assert_array_equal(tokens, logits[len(prompt) - 1 : -1].argmax(axis=1))


def test_releasing_frees_the_blocks_and_nothing_else() -> None:
    model = tiny_model()
    blocks = [leaf for block in model.blocks.values() for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.split(block)[1]))]
    _, params = stacked.stack(model, release=True)
    assert all(leaf.is_deleted() for leaf in blocks)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_blocks_that_were_read_are_stacked_where_they_lie(tmp_path: Path) -> None:
    model, _ = load(write_tiny_checkpoint(tmp_path, tokenizer=False))
    held = [nnx.to_pure_dict(nnx.split(block)[1]) for block in model.blocks.values()]
    whole = jax.tree.map(lambda *parts: np.stack(parts), *held)
    first = jax.tree.map(lambda part: part.unsafe_buffer_pointer(), held[0])
    _, params = stacked.stack(model, release=True)
    assert jax.tree.map(lambda part: part.unsafe_buffer_pointer(), params["runs"]["0"]) == first
    jax.tree.map(np.testing.assert_array_equal, params["runs"]["0"], whole)


def test_buckets_waste_at_most_half() -> None:
    sizes = sorted({bucket(n) for n in range(1, 5000)})
    assert sizes[:6] == [16, 24, 32, 48, 64, 96]
    assert all(n <= bucket(n) <= max(16, n * 1.5) for n in range(1, 5000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": 300}, "the stop token 300 is outside"),
        ({"seed": -1}, "a seed is a number"),
        ({"seed": [1, 2]}, "1 prompts and 2 seeds"),
        ({"samples": 2}, "2 greedy samples would be the same"),
        ({"samples": 0}, "samples of each prompt must be at least 1"),
        ({"stop_strings": [""]}, "a stop string is empty"),
        ({"max_new_tokens": 500}, "exceed the model's context of 256"),
    ],
)
def test_requests_that_cannot_be_met(generator: Generator, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QuikError, match=message):
        generator.generate([[1, 2, 3]], **settings)


def test_settings_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(QuikError, match="the context may be 2 to 256 tokens"):
        Generator(model, context=1000)
    with pytest.raises(QuikError, match='no KV cache of kind "int4"'):
        Generator(model, cache="int4")
    with pytest.raises(QuikError, match="stop strings need a tokenizer"):
        Generator(model).generate([[1]], stop_strings=["x"])
    with pytest.raises(QuikError, match="exceed the context of 20"):
        Generator(model, context=20).generate([[1, 2, 3]], max_new_tokens=18)
    small = Generator(model, programs=PROGRAMS)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    # 3 blocks, 2 key heads of 16, keys and values in float32: 768 bytes a token, and 130 tokens are free.
    monkeypatch.setattr("quikjax.generation.generator.device_memory", lambda: held + 130 * 768)
    with pytest.raises(QuikError, match=r"of 192 tokens takes .* GB are free; at most 128 tokens fit"):
        small.generate([[1, 2, 3]], max_new_tokens=150)
    assert small.generate([[1, 2, 3]], max_new_tokens=4).lengths[0] == 4
    # Said at once, however long the text that was asked for.
    monkeypatch.setattr("quikjax.generation.generator.device_memory", lambda: held + 10**6 * 128 * 768)
    endless = Generator(tiny_model(max_position_embeddings=10**10), programs=PROGRAMS)
    with pytest.raises(QuikError, match="at most 100663296 tokens fit"):
        endless.generate([[1, 2, 3]], max_new_tokens=2 * 10**9)
