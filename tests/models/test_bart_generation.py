"""BART's generation: transformers' own tokens, forced ones among them; the text read once; settings and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bart_variants import VARIANTS
from flax import nnx
from test_bart import bart, load

import quikjax
from quikjax.errors import QuikError
from quikjax.evaluation import evaluate
from quikjax.generation import Generator, Sampling, TextToText, generator_of
from quikjax.generation.decode import Kind
from quikjax.generation.programs import Programs
from quikjax.models.bart import BartConfig, BartForConditionalGeneration
from quikjax.models.cache import Memory
from quikjax.models.registry import abstract_model, pure_params
from quikjax.testing import tiny_model, tiny_tokenizer

FIELDS = {**VARIANTS["bart-summarizer"], "vocab_size": 257, "encoder_layers": 1, "decoder_layers": 1}
TEXTS = [[int(token) for token in np.random.default_rng(length).integers(3, 256, length)] + [2] for length in (5, 30, 11)]
# Generators here share what they compile.
PROGRAMS = Programs()


@pytest.fixture(scope="module")
def model() -> BartForConditionalGeneration:
    found, _ = bart(FIELDS)
    assert isinstance(found, BartForConditionalGeneration)
    return found


@pytest.fixture(scope="module")
def writer(model: BartForConditionalGeneration) -> TextToText:
    return TextToText(model, tokenizer=tiny_tokenizer(), programs=PROGRAMS)


@pytest.mark.parametrize("name", ["bart-summarizer", pytest.param("bart-distilled", marks=pytest.mark.long)])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """Of two texts at once, one of them padded; the first token is forced, and the end where there is no more room."""
    golden, model = load(name)
    texts = [ids[mask == 1].tolist() for ids, mask in zip(golden["ids"], golden["mask"], strict=True)]
    penalized = Sampling(repetition_penalty=float(golden["penalty"]))
    new = golden["tokens"].shape[1]
    writer = TextToText(model)
    made = writer.generate(texts, max_new_tokens=new, sampling=penalized, stop=[])
    np.testing.assert_array_equal(made.tokens, golden["tokens"])
    assert made.tokens[:, 0].tolist() == [model.config.first] * 2
    ended = writer.generate(texts, max_new_tokens=new, sampling=penalized)
    assert ended.lengths.tolist() == [new - 1] * 2
    assert ended.finished == ("stop", "stop")


def test_a_text_is_read_once(writer: TextToText) -> None:
    """What cross-attention has of it is made by the encoder, stands beside the cache, and is all that decoding needs of it."""
    rows = writer.rows(TEXTS, 8, Sampling(), 0, 1, ())
    stops, values = writer.stops([]), Sampling().values()
    expected = writer.generate(TEXTS, max_new_tokens=8, stop=[]).tokens[:, 1:]
    batch = writer.start(rows, 8, values, stops, Kind())
    memory = batch.state.cache.memory
    assert isinstance(memory, Memory)
    assert memory.lengths.tolist() == [len(text) for text in TEXTS] + [0]
    assert memory.parts.keys.shape == (1, 4, 4, 32, 12)
    blind = TextToText(bart(FIELDS)[0], programs=PROGRAMS)
    blind.params["runs"]["0"] = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), blind.params["runs"]["0"])
    batch.generator = blind
    batch.advance()
    np.testing.assert_array_equal(batch.advance()[0][:3], expected)


@pytest.mark.long
def test_a_row_does_not_depend_on_the_rows_beside_it(writer: TextToText) -> None:
    drawn = partial(writer.generate, max_new_tokens=9, sampling=Sampling(temperature=1.0, top_k=20), seed=3)
    together = drawn(TEXTS, samples=2, logprobs=True)
    assert together.texts is not None
    assert len(set(together.texts)) == 6
    for row, text in enumerate(TEXTS):
        alone = drawn([text])
        assert alone.tokens[0].tolist() == together.tokens[2 * row].tolist()
    assert together.logprobs is not None
    assert np.isfinite(together.logprobs).all()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_smaller_caches_are_near(writer: TextToText, model: BartForConditionalGeneration, kind: str) -> None:
    small = TextToText(model, cache=kind, programs=PROGRAMS)
    found, exact = (one.generate(TEXTS[1:2], max_new_tokens=2, logprobs=True, stop=[]) for one in (small, writer))
    assert found.logprobs is not None
    assert exact.logprobs is not None
    difference = np.abs(found.logprobs - exact.logprobs).max()
    assert 0 < difference < 0.1


def test_one_call_writes_as_well(model: BartForConditionalGeneration, writer: TextToText) -> None:
    made = quikjax.generate(nnx.split(model)[0], pure_params(model), TEXTS, max_new_tokens=4)
    np.testing.assert_array_equal(made.tokens, writer.generate(TEXTS, max_new_tokens=4).tokens)
    assert isinstance(generator_of(tiny_model()), Generator)


def test_what_cannot_be_read_or_written_is_said(writer: TextToText, model: BartForConditionalGeneration) -> None:
    for texts, new, said in (
        ([[5] * 65], 4, "a text of 65 tokens exceeds the 64 that the model reads"),
        ([[5]], 65, "65 new tokens exceed the 64 that the model writes"),
        ([[]], 4, "the text is empty"),
        ([[257]], 4, "outside the model's vocabulary of 257"),
    ):
        with pytest.raises(QuikError, match=said):
            writer.generate(texts, max_new_tokens=new)
    with pytest.raises(QuikError, match="deterministic is for models that continue a text"):
        TextToText(model, deterministic=True)
    with pytest.raises(QuikError, match=r"BartForConditionalGeneration reads a whole text .*use it with: quikjax generate"):
        Generator(model)
    with pytest.raises(QuikError, match="neither chats nor has a perplexity"):
        evaluate(model, np.zeros((1, 4), np.int32))
    with pytest.raises(QuikError, match=r"BartForSequenceClassification .*quikjax classify"):
        TextToText(bart(VARIANTS["bart-classifier"])[0])
    with pytest.raises(QuikError, match="continues a text and has no encoder"):
        TextToText(tiny_model())


def test_nothing_is_forced_where_nothing_is_named() -> None:
    config = abstract_model({**FIELDS, "forced_bos_token_id": None, "forced_eos_token_id": None}).config
    assert isinstance(config, BartConfig)
    assert (config.first, config.last) == (None, None)
