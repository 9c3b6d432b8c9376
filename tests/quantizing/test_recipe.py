"""Recipes: what they match, how many outliers they ask for, what they refuse."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from quikjax.cli.options import choose_recipe
from quikjax.errors import QuikError
from quikjax.quantizing.recipe import RECIPES, Recipe, Rule, find_recipe

LLAMA = "model.layers.3.mlp.down_proj.weight"
CODEBOOKS = {f"{kind}{bits}" for kind in ("int", "float") for bits in range(3, 9)} | {"dynamic4", "quantile4", "nf4", "fp4"}


@pytest.mark.parametrize(
    ("path", "bits", "damping", "scaled"),
    [
        (LLAMA, 8, 0.01, True),
        ("model.layers.3.self_attn.q_proj.weight", 4, 0.01, False),
        ("model.layers.3.mlp.up_proj.weight", 4, 0.01, False),
        ("model.decoder.layers.0.fc2.weight", 4, 0.01, False),
        ("model.decoder.layers.0.self_attn.out_proj.weight", 4, 0.01, False),
        ("transformer.h.0.mlp.dense_4h_to_h.weight", 8, 0.5, True),
        ("transformer.h.0.mlp.dense_h_to_4h.weight", 4, 0.5, False),
        ("transformer.h.0.self_attention.query_key_value.weight", 4, 0.5, False),
        ("transformer.h.0.self_attention.dense.weight", 4, 0.5, False),
        ("transformer.h.0.mlp.c_proj.weight", 8, 0.01, True),
        ("encoder.layer.11.output.dense.weight", 8, 0.01, True),
        ("bert.encoder.layer.3.attention.output.dense.weight", 4, 0.01, False),
        ("bert.encoder.layer.3.attention.self.key.weight", 4, 0.01, False),
        ("roberta.encoder.layer.3.intermediate.dense.weight", 4, 0.01, False),
        ("distilbert.transformer.layer.0.ffn.lin2.weight", 8, 0.01, True),
        ("transformer.layer.0.ffn.lin1.weight", 4, 0.01, False),
        ("transformer.layer.0.attention.out_lin.weight", 4, 0.01, False),
    ],
)
def test_quik_4b_is_the_papers_choice_for_each_family(path: str, bits: int, damping: float, scaled: bool) -> None:
    rule = RECIPES["quik-4b"].rule_for(path)
    assert isinstance(rule, Rule)
    assert (rule.weight_bits, rule.activation_bits, rule.damping, rule.scale_outliers) == (bits, bits, damping, scaled)


@pytest.mark.parametrize("name", ["quik-4b+", "w4a8"])
def test_what_is_better_than_the_papers_damps_more_but_on_falcon(name: str) -> None:
    paths = {LLAMA: 0.1, "model.layers.3.self_attn.q_proj.weight": 0.1, "transformer.h.0.self_attention.dense.weight": 0.5}
    rules = {path: RECIPES[name].rule_for(path) for path in paths}
    assert {path: rule.damping for path, rule in rules.items() if rule is not None} == paths


@pytest.mark.parametrize(
    ("path", "attention"),
    [
        ("transformer.h.0.self_attention.dense.weight", True),
        ("transformer.h.0.mlp.dense_h_to_4h.weight", False),
        ("transformer.h.0.attn.c_proj.weight", True),
        ("transformer.h.0.mlp.c_proj.weight", False),
        ("encoder.layer.0.attention.self.query.weight", True),
        ("encoder.layer.0.attention.output.dense.weight", True),
        ("encoder.layer.0.intermediate.dense.weight", False),
        ("encoder.layer.0.output.dense.weight", False),
        ("transformer.layer.0.attention.out_lin.weight", True),
        ("transformer.layer.0.ffn.lin1.weight", False),
        ("transformer.layer.0.ffn.lin2.weight", False),
    ],
)
def test_recipes_that_treat_attention_and_mlp_apart_know_them(path: str, attention: bool) -> None:
    for name, in_attention in (("quik-4b-sparse-attention", True), ("quik-4b-sparse-mlp", False)):
        rule = RECIPES[name].rule_for(path)
        assert isinstance(rule, Rule)
        assert (rule.sparsity is not None) == (attention == in_attention)
    bits = RECIPES["zeroquant-w4a8"].rule_for(path)
    assert bits is not None
    assert bits.weight_bits == (8 if attention else 4)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize(
    "path",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.decoder.project_in.weight",
        "transformer.word_embeddings.weight",
        "pooler.dense.weight",
        "bert.pooler.dense.weight",
        "cls.predictions.transform.dense.weight",
        "classifier.weight",
        "classifier.dense.weight",
        "classifier.out_proj.weight",
        "lm_head.dense.weight",
        "vocab_transform.weight",
        "pre_classifier.weight",
    ],
)
def test_no_recipe_touches_embeddings_norms_heads_and_biases(name: str, path: str) -> None:
    assert RECIPES[name].rule_for(path) is None


@pytest.mark.parametrize(
    ("outliers", "scaled", "inputs", "hidden", "expected"),
    [
        ("auto", False, 4096, 4096, 256),
        ("auto", True, 28672, 8192, 896),  # LLaMA-2-70B's down_proj: 3.5 x 256
        ("auto", False, 576, 576, 36),
        ("auto", True, 1536, 576, 96),
        ("auto", False, 3072, 768, 48),  # OPT's fc2 keeps the hidden state's number
        (0.125, True, 1536, 576, 192),
        (10, False, 576, 576, 10),
        (10_000, False, 576, 576, 576),
        (0, True, 1536, 576, 0),
        (0.5, False, 64, None, 32),
    ],
)
def test_numbers_of_outliers(outliers: int | float | str, scaled: bool, inputs: int, hidden: int | None, expected: int) -> None:
    rule = Rule(match="x", outliers=outliers, scale_outliers=scaled)
    assert rule.outlier_count(inputs, hidden) == expected


def test_recipes_survive_json_and_files(tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        # As short as pydantic can write it.
        assert Recipe.model_validate_json(recipe.model_dump_json(exclude_defaults=True)) == recipe
    # What older artifacts record, so that a killed run of an older version goes on.
    assert "level_clip" not in RECIPES["zeroquant-w8a8"].model_dump_json()
    assert all(rule["level_clip"] is None for rule in RECIPES["rtn-w4a4"].model_dump(mode="json")["rules"])
    file = tmp_path / "mine.json"
    file.write_text(RECIPES["w4a8"].model_dump_json())
    assert find_recipe(str(file)) == RECIPES["w4a8"]
    file.write_text(json.dumps({"name": "mine", "rules": [{"match": "x", "bits": 3}]}))
    with pytest.raises(QuikError, match=r"mine.json is not a recipe: rules\.0\.bits"):
        find_recipe(str(file))
    with pytest.raises(QuikError, match=r"absent\.json cannot be read"):
        find_recipe(str(tmp_path / "absent.json"))


def test_what_is_refused() -> None:
    with pytest.raises(QuikError, match='no recipe "quik4b"; did you mean "quik-4b"'):
        find_recipe("quik4b")
    for wrong in (
        {"weight_bits": 3},
        {"unknown": 1},
        {"match": "("},
        {"column_block": 100},
        {"outliers": 1.5},
        {"outliers": -1},
        {"sweeps": -1},
    ):
        with pytest.raises(ValidationError):
            Rule(**{"match": "x", **wrong})
    with pytest.raises(ValidationError, match='sweeps go over the codes of method "gptq"; method "rtn" takes none'):
        Rule(match="x", method="rtn", sweeps=2)
    with pytest.raises(QuikError, match=r"not 1\.5"):
        RECIPES["quik-4b"].with_outliers(1.5)


def test_which_recipes_need_data() -> None:
    nearest = {"rtn-w4a4", "rtn-w4a4-sym", "rtn-w8a8", "rtn-w4a16-g128", "zeroquant-w8a8", "zeroquant-w4a8"}
    assert {name for name, recipe in RECIPES.items() if not recipe.needs_data()} == {"fp", *nearest, *CODEBOOKS}
    assert RECIPES["rtn-w4a4"].with_outliers(0.25).needs_data()
    assert [rule.model_dump()["outliers"] for rule in RECIPES["quik-4b"].with_outliers(0.25).rules] == [0.25] * 4


def test_groups_of_another_size() -> None:
    sized = RECIPES["gptq-w4a16-g128"].with_group_size(64)
    assert {rule.model_dump()["group_size"] for rule in sized.rules} == {64}
    assert choose_recipe("gptq-w4a16-g128", None, "64", None, None) == sized
    with pytest.raises(QuikError, match="groups cannot be of 24: GPTQ finds groups of a multiple of 16"):
        RECIPES["gptq-w4a16-g128"].with_group_size(24)
    with pytest.raises(QuikError, match='"quik-4b" has no weights in groups; --block belongs to codebooks and to groups'):
        RECIPES["quik-4b"].with_group_size(64)
    with pytest.raises(QuikError, match="has no codebooks"):
        choose_recipe("gptq-w4a16-g128", None, "tensor", None, None)
