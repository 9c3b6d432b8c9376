"""Every row of `encoder_variants.py` against Hugging Face's PyTorch (`make_encoder_golden.py`), and what encoders promise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_variants import VARIANTS
from flax import nnx
from random_weights import checksum, random_weights

from quikjax.errors import QuikError
from quikjax.evaluation import evaluate
from quikjax.generation import Generator
from quikjax.models.base import CausalLM
from quikjax.models.encoder import Encoded, Encoder, EncoderConfig, masked_positions
from quikjax.models.encoder_decoder import EncoderDecoderConfig
from quikjax.models.published import ENCODER_DECODERS, ENCODERS
from quikjax.models.registry import FAMILIES, abstract_model, dotted, nested, pure_params

GOLDEN = Path(__file__).parent / "golden"
# Most of the time would go into optimizing code that runs once.
QUICK = {"xla_backend_optimization_level": 0}
FLOAT32 = 2e-4  # of the root mean square; measured: at most 3e-6


class Case(NamedTuple):
    """A golden file, and the same model here."""

    golden: dict[str, np.ndarray]
    model: Encoder


def encoder(fields: dict[str, Any], seed: int = 1) -> Encoder:
    """A random encoder of a configuration."""
    abstract = abstract_model(fields)
    assert isinstance(abstract, Encoder)
    shapes = {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract)).items()}
    weights = random_weights(shapes, seed)
    return nnx.merge(nnx.split(abstract)[0], nested({path: jnp.asarray(weight) for path, weight in weights.items()}))


@pytest.fixture(params=VARIANTS, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        golden = dict(file)
    fields = VARIANTS[request.param]
    assert json.loads(str(golden["config"])) == fields, "the golden file is older than its row: run make_encoder_golden.py"
    model = encoder(fields, int(golden["seed"]))
    weights = {path: np.asarray(leaf) for path, leaf in dotted(pure_params(model)).items()}
    assert checksum(weights) == int(golden["checksum"]), "names, shapes or NumPy's random numbers differ from PyTorch's side"
    yield Case(golden, model)
    jax.clear_caches()


def assert_close(found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() / np.sqrt(np.mean(expected**2)) < FLOAT32


def test_it_computes_what_pytorch_does(case: Case) -> None:
    golden, model = case.golden, case.model
    mask = golden["mask"]
    found = jax.jit(lambda ids, mask, types: model(ids, mask, types), compiler_options=QUICK)(
        golden["ids"].astype(np.int32), mask, golden["types"].astype(np.int32) if "types" in golden else None
    )
    output, pooled = found if isinstance(found, Encoded) else (found, None)
    assert output.dtype == jnp.float32
    if output.ndim == 2:
        assert_close(output, golden["output"])
    else:
        assert_close(output[mask == 1], golden["output"][mask == 1])
    assert (pooled is None) == ("pooled" not in golden)
    if pooled is not None:
        assert_close(pooled, golden["pooled"])


def test_labels_are_read(case: Case) -> None:
    config = case.model.config
    assert isinstance(config, EncoderConfig)
    named = json.loads(str(case.golden["config"])).get("id2label", {})
    assert config.label_count == len(named)
    assert config.labels == (("negative", "neutral", "positive") if len(named) == 3 else ())


def test_types_of_encoders_are_those_of_the_registry() -> None:
    both = {kind for kind, (config, _) in FAMILIES.items() if issubclass(config, EncoderDecoderConfig)}
    assert both == ENCODER_DECODERS
    assert {kind for kind, (config, _) in FAMILIES.items() if issubclass(config, EncoderConfig)} - both == ENCODERS


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "distilbert"])
def test_a_text_does_not_depend_on_its_padding(name: str) -> None:
    model = encoder({**VARIANTS[name], "n_layers" if name == "distilbert" else "num_hidden_layers": 1})
    run = jax.jit(lambda ids, mask: model(ids, mask), compiler_options=QUICK)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 64, (1, 7))
    alone = run(ids, np.ones((1, 7), bool))
    for side in ("left", "right"):
        there = slice(4, 11) if side == "left" else slice(0, 7)
        padded, mask = rng.integers(0, 64, (2, 11)), np.zeros((2, 11), bool)
        padded[0, there], mask[0, there], mask[1] = ids[0], True, True
        found = run(padded, mask)
        if isinstance(found, Encoded):
            assert isinstance(alone, Encoded)
            assert_close(found.hidden[0, there], np.asarray(alone.hidden[0]))
        else:
            assert_close(found[0], np.asarray(alone[0]))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.ones((2, 1, 1, 5), int), r"has the shape \(2, 1, 1, 5\); give the mask of the tokens, not of pairs of them"),
        (np.ones(5, int), r"has the shape \(5,\)"),
        (np.zeros((2, 5), np.float32), "holds float32"),
        (np.array([[1, 1, 1, 0, 0], [1, 1, -10000, 1, 1]]), "holds -10000"),
        (np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]), "row 1 of this one has no token"),
        ("all", "mask is"),
    ],
)
def test_masks_of_another_form_are_refused(mask: Any, said: str) -> None:
    with pytest.raises(QuikError, match=r"a padding mask is \[batch, length\] = \(2, 5\), 1 for each token") as error:
        masked_positions(jnp.zeros((2, 5), jnp.int32), mask)
    error.match(said)


def test_positions_count_the_tokens() -> None:
    mask = np.array([[1, 1, 1, 0], [0, 1, 0, 1]])
    assert masked_positions(jnp.zeros((2, 4), jnp.int32), mask).tolist() == [[0, 1, 2, -1], [-1, 0, -1, 1]]
    assert masked_positions(jnp.zeros((1, 3), jnp.int32), [[True, True, False]]).tolist() == [[0, 1, -1]]


def test_positions_that_were_never_learned_give_nan() -> None:
    model = encoder({**VARIANTS["minilm"], "max_position_embeddings": 4, "num_hidden_layers": 1})
    found = model.embed(jnp.zeros((1, 5), jnp.int32), jnp.arange(5, dtype=jnp.int32)[None])
    assert jnp.isnan(found).all(axis=-1).tolist() == [[False] * 4 + [True]]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("minilm", {"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ("roberta", {"position_embedding_type": "relative_key_query"}, "position_embedding_type 'relative_key_query'"),
        ("minilm", {"is_decoder": True}, "is_decoder True is not supported"),
        ("minilm", {"architectures": ["BertForQuestionAnswering"]}, "BERT as BertForQuestionAnswering is not supported"),
        ("minilm", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ("minilm", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple"),
        ("bert-masked-lm", {"tie_word_embeddings": False}, "tie_word_embeddings False is not supported"),
        ("bert-classifier", {"id2label": {"0": "no", "2": "yes"}}, "id2label names the classes 0, 2"),
        ("bert-classifier", {"num_labels": 2}, "and num_labels is 2"),
        ("bert-classifier", {"problem_type": "ranking"}, "problem_type 'ranking' is not supported"),
        ("distilbert", {"n_heads": 5}, "dim 48 is not a multiple"),
        ("minilm", {"embedding_size": 24}, "does not know the configuration's embedding_size"),
    ],
)
def test_configurations_that_are_refused(name: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(QuikError, match=said):
        abstract_model({**VARIANTS[name], **change})


def test_a_masked_language_model_for_pretraining_is_one() -> None:
    model = abstract_model({**VARIANTS["bert-masked-lm"], "architectures": ["BertForPreTraining"]})
    assert type(model).__name__ == "BertForMaskedLM"


def test_encoders_do_not_continue_text() -> None:
    model = encoder(VARIANTS["minilm"])
    assert not isinstance(model, CausalLM)
    with pytest.raises(QuikError, match=r"BertModel is an encoder, which does not predict the next token.*quikjax embed"):
        Generator(model)
    with pytest.raises(QuikError, match="is an encoder"):
        evaluate(model, np.zeros((1, 4), np.int32))


def test_token_types_where_there_are_none() -> None:
    with pytest.raises(QuikError, match="no token types"):
        encoder(VARIANTS["distilbert"])(np.zeros((1, 4), np.int32), None, np.ones((1, 4), np.int32))
