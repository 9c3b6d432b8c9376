"""Where accuracy is lost, against the definition: whole models' logits in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.errors import QuikError
from quikjax.models.base import CausalLM
from quikjax.quantizing.model import quantize_model
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.study.loss import LossStudy, study_loss
from quikjax.testing import forward, tiny_model

IDS = np.random.default_rng(0).integers(0, 60, (2, 24)).astype(np.int32)
MODEL = tiny_model()


def artifact(**fields: object) -> CausalLM:
    rule = Rule(match=r"_proj\.weight$", method="rtn", outliers=2, clip=False, **fields)
    params = quantize_model(MODEL, Recipe(name="x", rules=(rule,)), [jnp.asarray(IDS)])
    return nnx.merge(nnx.split(MODEL)[0], params)


@pytest.fixture(scope="module")
def four_bits() -> tuple[CausalLM, LossStudy]:
    model = artifact(level_clip=(17, 1))
    return model, study_loss(MODEL, model, IDS)


def slow_kl(model: CausalLM) -> np.ndarray:
    wide = [np.asarray(forward(one, jnp.asarray(IDS)), np.float64) for one in (MODEL, model)]
    theirs, mine = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in wide)
    return (np.exp(theirs) * (theirs - mine)).sum(-1)


@pytest.mark.long
def test_everything_and_positions_are_the_definition(four_bits: tuple[CausalLM, LossStudy]) -> None:
    model, found = four_bits
    kl = slow_kl(model)
    np.testing.assert_allclose(found.causes["everything"], kl.mean(), rtol=1e-3)
    assert [(row.first, row.last) for row in found.positions] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 23)]
    for row in found.positions:
        np.testing.assert_allclose(row.kl, kl[:, row.first : row.last + 1].mean(), rtol=1e-2, atol=1e-6)
    assert list(found.blocks) == [f"model.layers.{i}" for i in range(len(MODEL.blocks))]
    assert all(0 < error < 1 for error in found.blocks.values())
    assert all(0 < spread.median <= spread.largest for spread in found.spreads)


@pytest.mark.long
def test_each_cause_alone_is_less_than_everything(four_bits: tuple[CausalLM, LossStudy]) -> None:
    _, found = four_bits
    groups = ["attention_input", "attention_output", "mlp_input", "mlp_output"]
    assert list(found.causes) == ["everything", "weights only", "activations only", *(f"{group} at 8 bits" for group in groups)]
    assert all(0 < kl < found.causes["everything"] for kl in list(found.causes.values())[1:3])
    assert min(found.causes[f"{group} at 8 bits"] for group in groups) < found.causes["everything"]


def test_lifting_what_has_eight_bits_changes_nothing() -> None:
    found = study_loss(MODEL, artifact(weight_bits=8, activation_bits=8), IDS)
    lifted = [kl for name, kl in found.causes.items() if name.endswith("at 8 bits")]
    np.testing.assert_allclose([*lifted, found.causes["activations only"]], found.causes["everything"], rtol=1e-4)


def test_what_is_not_an_artifact_of_the_model_is_refused() -> None:
    with pytest.raises(QuikError, match="no quantized layer"):
        study_loss(MODEL, MODEL, IDS)
    with pytest.raises(QuikError, match="not made from this model"):
        study_loss(tiny_model(hidden_size=16), artifact(), IDS)
