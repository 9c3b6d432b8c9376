"""One sentence about the recipe that suits a device, its sizes against packed weights'."""

import pytest

from quikjax.pallas_kernels.devices import A100, CPU, H100, Device
from quikjax.planning.advice import COSINE, KL
from quikjax.planning.plan import make_plan
from quikjax.quantizing.recipe import RECIPES, Recipe, Rule
from quikjax.testing import tiny_config

GB = 10**9
CONFIG = tiny_config(hidden_size=256, intermediate_size=512)


@pytest.mark.parametrize(
    ("device", "why"), [(H100, "no INT4 tensor cores"), (A100, "used by no backend"), (CPU, "as 8-bit numbers")]
)
def test_four_bit_activations_are_advised_against_with_figures(device: Device, why: str) -> None:
    advised = make_plan(CONFIG, "quik-4b", device=device, memory_bytes=GB)
    suited = make_plan(CONFIG, "w4a8", device=device, memory_bytes=GB)
    assert advised.advice is not None
    assert suited.advice is not None
    for part in (why, str(device), f"{suited.bits_per_weight:.2f} bits per weight instead of {advised.bits_per_weight:.2f}"):
        assert part in advised.advice
    assert f"KL {KL['w4a8']} against {KL['quik-4b']}" in advised.advice
    assert suited.advice.startswith(f"w4a8 suits {device}:")
    assert why in suited.advice
    assert advised.as_json()["advice"] == advised.advice


def test_of_an_encoder_its_embeddings_are_said_and_no_language_models_figures() -> None:
    config = {
        "model_type": "bert",
        "vocab_size": 257,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    advised = make_plan(config, "quik-4b", device=CPU, memory_bytes=GB).advice
    assert advised is not None
    assert "KL" not in advised
    assert "SmolLM2" not in advised
    for recipe in ("w4a8", "quik-4b", "quik-8b"):
        assert str(COSINE[recipe]) in advised
    unmeasured = make_plan(config, "quik-4b+", device=CPU, memory_bytes=GB).advice
    assert unmeasured is not None
    assert "cosine" not in unmeasured
    assert "KL" not in unmeasured


def test_recipes_without_four_bit_activations_get_no_advice() -> None:
    for name in ("quik-8b", "fp", "gptq-w4a16"):
        assert make_plan(CONFIG, name, memory_bytes=GB).advice is None


def test_a_recipe_of_ones_own_gets_the_sizes_but_no_accuracy() -> None:
    mine = Recipe(name="mine", rules=(Rule(match=r"q_proj\.weight", level_clip="search"),))
    plan = make_plan(CONFIG, mine, memory_bytes=GB)
    assert plan.advice is not None
    assert "KL" not in plan.advice
    assert plan.layers[0].as_json()["level_clip"] == "search"
    foreign = Recipe(name="foreign", rules=(Rule(match=r"q_proj\.weight", level_clip=(17, 1), in_axes=(1,)),))
    assert make_plan(CONFIG, foreign, memory_bytes=GB).layers[0].level_clip == (17, 1)
    symmetric = make_plan(CONFIG, "rtn-w4a4-sym", memory_bytes=GB)
    assert {layer.level_clip for layer in symmetric.layers} == {"symmetric"}


def test_every_recipe_with_a_figure_exists() -> None:
    assert set(KL) | set(COSINE) <= set(RECIPES)
