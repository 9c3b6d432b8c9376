"""Every row of `bart_variants.py` against Hugging Face's PyTorch (`make_bart_golden.py`), and what BART promises."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bart_variants import VARIANTS
from flax import nnx
from random_weights import checksum, random_weights

from quikjax.errors import QuikError
from quikjax.models.bart import Bart, BartForConditionalGeneration, BartForSequenceClassification
from quikjax.models.encoder import masked_positions
from quikjax.models.registry import abstract_model, dotted, nested, pure_params

GOLDEN = Path(__file__).parent / "golden"
# Most of the time would go into optimizing code that runs once.
QUICK = {"xla_backend_optimization_level": 0}
FLOAT32 = 2e-4  # of the root mean square; measured: at most 3e-6


class Case(NamedTuple):
    """A golden file, and the same model here."""

    golden: dict[str, np.ndarray]
    model: Bart


def bart(fields: dict[str, Any], seed: int = 1) -> tuple[Bart, int]:
    """A random BART of a configuration, and the checksum of its weights by their published names."""
    abstract = abstract_model(fields)
    assert isinstance(abstract, Bart)
    bare = fields["architectures"] == ["BartModel"]
    names = {path: path.removeprefix("model.") if bare else path for path in dotted(pure_params(abstract))}
    shapes = {names[path]: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract)).items()}
    weights = random_weights(shapes, seed)
    params = nested({path: jnp.asarray(weights[name]) for path, name in names.items()})
    return nnx.merge(nnx.split(abstract)[0], params), checksum(weights)


def load(name: str) -> Case:
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    assert json.loads(str(golden["config"])) == VARIANTS[name], "the golden file is older than its row: run make_bart_golden.py"
    model, crc = bart(VARIANTS[name], int(golden["seed"]))
    assert crc == int(golden["checksum"]), "names, shapes or NumPy's random numbers differ from PyTorch's side"
    return Case(golden, model)


@pytest.fixture(params=VARIANTS, scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield load(request.param)
    jax.clear_caches()


def assert_close(found: Any, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() / np.sqrt(np.mean(expected**2)) < FLOAT32


def test_it_computes_what_pytorch_does(case: Case) -> None:
    golden, model = case.golden, case.model
    ids, mask = golden["ids"].astype(np.int32), golden["mask"]
    target = golden["target"].astype(np.int32) if "target" in golden else None

    def run(ids: Any, mask: Any, target: Any) -> Any:
        if isinstance(model, BartForSequenceClassification):
            return model(ids, mask)
        assert isinstance(model, BartForConditionalGeneration)
        if json.loads(str(golden["config"]))["architectures"] == ["BartModel"]:
            return model.written(ids, masked_positions(ids, mask), target)
        return model(ids, mask, target)

    output = jax.jit(run, compiler_options=QUICK)(ids, mask, target)
    assert output.dtype == jnp.float32
    assert_close(output, golden["output"])


def test_a_text_shifted_is_fed_as_pytorch_feeds_it() -> None:
    """The walk over the blocks with both halves in one state, which calibration takes, against the halves by themselves."""
    model, _ = bart({**VARIANTS["bart-distilled"], "encoder_layers": 1})
    assert isinstance(model, BartForConditionalGeneration)
    ids = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    target = np.concatenate([np.full((2, 1), 2, np.int32), ids[:, :-1]], axis=1)
    run = jax.jit(lambda ids, mask, target: (model(ids, mask), model(ids, mask, target)), compiler_options=QUICK)
    whole, halves = run(ids, mask, target)
    assert_close(whole[mask == 1], np.asarray(halves[mask == 1]))


@pytest.mark.parametrize("name", ["bart-classifier", "bart-summarizer"])
def test_a_text_does_not_depend_on_its_padding(name: str) -> None:
    model, _ = bart({**VARIANTS[name], "encoder_layers": 1, "decoder_layers": 1})
    run = jax.jit(lambda ids, mask: model(ids, mask), compiler_options=QUICK)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (1, 7))
    ids[0, -1] = 2
    alone = np.asarray(run(ids, np.ones((1, 7), bool))[0])
    for side in ("left", "right"):
        there = slice(4, 11) if side == "left" else slice(0, 7)
        padded, mask = rng.integers(3, 64, (2, 11)), np.zeros((2, 11), bool)
        padded[0, there], mask[0, there], mask[1], padded[:, -1] = ids[0], True, True, 2
        found = run(padded, mask)[0]
        assert_close(found if name == "bart-classifier" else found[there], alone)


def test_a_class_is_read_at_the_last_end() -> None:
    model, _ = bart({**VARIANTS["bart-classifier"], "encoder_layers": 1, "decoder_layers": 1})
    assert isinstance(model, BartForSequenceClassification)
    ids = np.random.default_rng(0).integers(3, 64, (1, 7)).astype(np.int32)
    with pytest.raises(QuikError, match=r"row 0 has no end token \(2\)"):
        model(ids)
    ids[0, [2, 4]] = 2
    state = model.state(jnp.asarray(ids), jnp.arange(7, dtype=jnp.int32)[None])
    assert_close(model(ids), np.asarray(model.head(state, jnp.array([[0, 1, 2, 3, 4, -1, -1]]))))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("bart", {"model_type": "mbart"}, "mBART normalizes before each layer"),
        ("bart", {"normalize_before": True}, "normalize_before True is not supported"),
        ("bart", {"add_final_layer_norm": True}, "add_final_layer_norm True is not supported"),
        ("bart", {"normalize_embedding": False}, "normalize_embedding False is not supported"),
        ("bart", {"static_position_embeddings": True}, "static_position_embeddings True is not supported"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings False is not supported"),
        ("bart", {"is_encoder_decoder": False}, "is_encoder_decoder False is not supported"),
        ("bart", {"architectures": ["BartForQuestionAnswering"]}, "BART as BartForQuestionAnswering is not supported"),
        ("bart", {"activation_function": "mish"}, "activation_function 'mish' is not supported"),
        ("bart", {"encoder_attention_heads": 5}, "d_model 48 is not a multiple of its encoder_attention_heads"),
        ("bart", {"decoder_start_token_id": 64}, "decoder_start_token_id is 64, which is no token of its vocabulary of 64"),
        ("bart", {"forced_bos_token_id": "<s>"}, "forced_bos_token_id is '<s>', which is no token"),
        ("bart-classifier", {"id2label": {"0": "no", "2": "yes"}}, "id2label names the classes 0, 2"),
        ("bart", {"relative_attention_num_buckets": 32}, "does not know the configuration's relative_attention_num_buckets"),
    ],
)
def test_configurations_that_are_refused(name: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(QuikError, match=said):
        abstract_model({**VARIANTS[name], **change})


def test_forced_tokens_are_read_under_their_older_names_too() -> None:
    fields = {name: value for name, value in VARIANTS["bart-summarizer"].items() if name != "forced_bos_token_id"}
    found = abstract_model({**fields, "force_bos_token_to_be_generated": True}).config
    assert found == abstract_model(VARIANTS["bart-summarizer"]).config
