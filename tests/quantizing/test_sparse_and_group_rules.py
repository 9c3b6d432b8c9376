"""Sparse weights and weights in groups from a published directory to disk and back: the pipeline, plan, report, export."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from quikjax import checkpoint
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.generation import Generator
from quikjax.loading import load_params, open_source
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.planning.plan import make_plan
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.recipe import RECIPES, Recipe, Rule, find_recipe
from quikjax.reports.artifact import read_report
from quikjax.testing import forward, tiny_config, write_tiny_checkpoint
from quikjax.weights.formats import dequantize_params
from quikjax.weights.groups import GroupWeight
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight

SPARSE = find_recipe("quik-4b-sparse-mlp").with_outliers(5)
STATIC = find_recipe("gptq-w4a16-g128-static")
KINDS = {"quik-4b-sparse-mlp": {QuikWeight, SparseWeight}, "gptq-w4a16-g128-static": {GroupWeight}}


@pytest.mark.parametrize("recipe", [SPARSE, pytest.param(STATIC, marks=pytest.mark.long)], ids=lambda recipe: recipe.name)
def test_from_a_published_directory_to_disk_and_back(recipe: Recipe, tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "published", num_hidden_layers=2)
    ids = np.random.default_rng(0).integers(0, 256, (2, 64)).astype(np.int32)
    out = tmp_path / "packed"
    quantize_checkpoint(source, out, recipe, lambda _: ids)
    plan, found = make_plan(tiny_config(num_hidden_layers=2), recipe, memory_bytes=10**9), read_report(out)
    assert ["no kernel multiplies them" in note for note in plan.notes] == [True] * (recipe is SPARSE)
    assert plan.notes == found.notes == tuple(found.as_json()["notes"])
    assert plan.quantized_bytes * 8 == checkpoint.sizes(out).linear_bits
    expected = {(layer.pattern, layer.outliers, layer.count) for layer in plan.layers}
    assert expected == {(kind.pattern, kind.outliers, kind.count) for kind in found.layers}
    model, _ = checkpoint.restore(out)
    params = pure_params(model)
    leaves = {path: leaf for path, leaf in dotted(params).items() if "proj" in path}
    assert {type(leaf) for leaf in leaves.values()} == KINDS[recipe.name]
    for path, leaf in leaves.items():
        if isinstance(leaf, SparseWeight):
            assert "mlp" in path
            assert leaf.base % 4 == 0
    # Dense weights of the same numbers, in another product; activations are rounded in one of the two.
    abstract = abstract_model(open_source(source).config)
    export_safetensors(out, tmp_path / "hf", dtype="float32")
    again: Any = load_params(open_source(tmp_path / "hf"), abstract, list(dotted(pure_params(abstract))), jnp.float32)
    for path, leaf in dotted(dequantize_params(params)).items():
        np.testing.assert_array_equal(leaf, dotted(again)[path])
    if recipe is STATIC:
        dense = nnx.merge(nnx.split(abstract)[0], again)
        np.testing.assert_allclose(forward(model, jnp.asarray(ids)), forward(dense, jnp.asarray(ids)), rtol=1e-4, atol=1e-4)
    # Decoded token by token from what is expanded once, and read at once.
    tokens = Generator(model).generate([ids[0, :9].tolist()], max_new_tokens=4, stop=()).tokens[0]
    logits = np.asarray(forward(model, jnp.concatenate([ids[0, :9], tokens])[None]))[0, 8:-1]
    assert (logits.max(axis=1) - logits[np.arange(4), tokens] < 1e-3).all()


def test_sparse_recipes_are_sparse_where_they_say() -> None:
    def pattern(name: str, layer: str) -> Any:
        rule = RECIPES[name].rule_for(f"model.layers.0.{layer}.weight")
        assert isinstance(rule, Rule)
        return rule.sparsity, rule.weight_bits

    for layer, bits in (("mlp.down_proj", 8), ("mlp.up_proj", 4)):
        assert pattern("quik-4b-sparse", layer) == pattern("quik-4b-sparse-mlp", layer) == ("2:4", bits)
        assert pattern("quik-4b-sparse-attention", layer) == (None, bits)
    assert pattern("quik-4b-sparse-attention", "self_attn.q_proj") == pattern("quik-4b-sparse", "self_attn.q_proj") == ("2:4", 4)
    # Attention by any family's names.
    for layer in ("self_attn.o_proj", "attn.c_attn", "attn.c_proj", "self_attention.query_key_value"):
        assert pattern("quik-4b-sparse-mlp", layer) == (None, 4)
        assert pattern("quik-4b-sparse-attention", layer) == ("2:4", 4)
    assert pattern("quik-4b-sparse-attention", "mlp.c_fc") == (None, 4)


def test_zeroquant_has_eight_bits_in_attention_and_four_in_the_mlp() -> None:
    def bits(layer: str) -> Any:
        rule = RECIPES["zeroquant-w4a8"].rule_for(f"model.layers.0.{layer}.weight")
        assert isinstance(rule, GroupRule)
        return rule.bits, rule.activation_bits

    assert bits("self_attn.v_proj") == (8, 8)
    assert bits("mlp.down_proj") == bits("mlp.gate_proj") == (4, 8)


def test_rules_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValidationError, match='sparsity is chosen by method "gptq" without sweeps'):
        Rule(match="x", sparsity="2:4", method="rtn")
    with pytest.raises(ValidationError, match="GPTQ finds groups of a multiple of 16"):
        GroupRule(match="x", group_size=10)
    with pytest.raises(ValidationError, match='method "rtn" has neither'):
        GroupRule(match="x", group_size=16, method="rtn", static_groups=True)
    with pytest.raises(QuikError, match="weights in groups, which have no outlier columns"):
        find_recipe("gptq-w4a16-g128").with_outliers(4)
