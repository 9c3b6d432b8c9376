"""How much text a model is calibrated on where nothing is said."""

import sys
from pathlib import Path
from typing import Any

import pytest

from quikjax.models.registry import abstract_model
from quikjax.planning.plan import make_plan
from quikjax.quantizing.calibration import calibration_size
from quikjax.testing import tiny_config

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from encoder_variants import VARIANTS


@pytest.mark.parametrize(
    ("context", "given", "expected"),
    [
        (512, {}, (64, 128)),
        (512, {"seqlen": 24}, (341, 24)),
        (512, {"samples": 5}, (5, 128)),
        (512, {"samples": 5, "seqlen": 400}, (5, 400)),
        (64, {}, (128, 64)),
        (16384, {"seqlen": 10000}, (1, 10000)),
        (512, {"samples": 0, "seqlen": 0}, (0, 0)),
    ],
)
def test_an_encoder_reads_short_texts(context: int, given: dict[str, int], expected: tuple[int, int]) -> None:
    model = abstract_model({**VARIANTS["minilm"], "max_position_embeddings": context})
    assert calibration_size(model, **given) == expected


@pytest.mark.parametrize(("given", "expected"), [({}, (16, 256)), ({"seqlen": 24}, (16, 24)), ({"samples": 3}, (3, 256))])
def test_a_language_model_reads_long_ones(given: dict[str, int], expected: tuple[int, int]) -> None:
    assert calibration_size(abstract_model(tiny_config()), **given) == expected
    assert calibration_size(abstract_model({**tiny_config(), "max_position_embeddings": 8192}))[1] == 2048


def test_the_plan_is_of_the_same_text() -> None:
    config: dict[str, Any] = {**VARIANTS["minilm"], "max_position_embeddings": 512}
    plan = make_plan(config, "quik-4b", memory_bytes=10**10)
    assert (plan.samples, plan.seqlen) == (64, 128)
