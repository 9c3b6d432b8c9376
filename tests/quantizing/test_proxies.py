"""Proxy outliers: which layer writes what which layer reads, per family, and how near the scores are to the truth."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.algorithms.ranks import spearman
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.quantizing.model import calibrate
from quikjax.quantizing.proxies import block_proxies, gaps, model_proxies, overlap, producers, written_layers
from quikjax.testing import tiny_config, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
OPT = SMALL | {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
FALCON = SMALL | {
    "model_type": "falcon",
    "new_decoder_architecture": True,
    "num_kv_heads": 2,
    "parallel_attn": True,
    "bias": False,
}
BERT = SMALL | {"model_type": "bert", "intermediate_size": 24}
SEVEN_B = SMALL | {"model_type": "falcon", "multi_query": True, "parallel_attn": True, "bias": False}


def random_params(config: dict[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    model = abstract_model(config)
    rng = np.random.default_rng(0)
    return model, {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in dotted(pure_params(model)).items()}


def std(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float64).std(axis=1)


def test_llama_scores_name_the_columns_that_each_unit_writes() -> None:
    model, params = random_params(tiny_config(num_hidden_layers=2))
    scores = model_proxies(model, {path: jnp.asarray(leaf) for path, leaf in params.items()})
    block = "model.layers.1."
    expected = {
        "self_attn.q_proj": std(params["model.layers.0.mlp.down_proj.weight"]),
        # 4 heads of queries share 2 of values, each of 16.
        "self_attn.o_proj": std(params[f"{block}self_attn.v_proj.weight"]).reshape(2, 1, 16).repeat(2, axis=1).reshape(-1),
        "mlp.gate_proj": std(params[f"{block}self_attn.o_proj.weight"]),
        "mlp.down_proj": std(params[f"{block}mlp.up_proj.weight"]),
    }
    for layer, score in expected.items():
        np.testing.assert_allclose(scores[f"{block}{layer}.weight"], score, rtol=1e-5)
    assert len(scores) == 7 + 4  # the first block's attention reads the embedding
    assert gaps(model) == ["attention_input of the first block: no layer stands before it"]


def test_what_attention_reads_is_what_the_repeated_value_heads_write() -> None:
    """A large unit of the value projection makes large columns exactly where the scores say."""
    params = pure_params(tiny_model(num_hidden_layers=1))
    flat = dotted(params)
    value = "model.layers.0.self_attn.v_proj.weight"
    params["model"]["layers"]["0"]["self_attn"]["v_proj"]["weight"] = flat[value].at[19].multiply(100)
    model = tiny_model(num_hidden_layers=1)
    stats = calibrate(nnx.split(model)[0], params, [jax.random.randint(jax.random.key(0), (1, 64), 0, 257)])
    path = "model.layers.0.self_attn.o_proj.weight"
    score = np.asarray(model_proxies(model, dotted(params))[path])
    assert set(np.argsort(score)[-2:]) == set(np.argsort(np.asarray(stats[path].absmax))[-2:]) == {35, 51}


def test_opt_has_none_through_its_relu() -> None:
    model, params = random_params(OPT)
    assert producers(model)["mlp_output"].why_not == "a ReLU stands between fc1 and fc2"
    assert "mlp_output: a ReLU stands between fc1 and fc2" in gaps(model)
    scores = model_proxies(model, {path: jnp.asarray(leaf) for path, leaf in params.items()})
    assert not any("fc2" in path for path in scores)
    block = "model.decoder.layers.1."
    np.testing.assert_allclose(scores[f"{block}fc1.weight"], std(params[f"{block}self_attn.out_proj.weight"]), rtol=1e-5)
    smooth = abstract_model(OPT | {"activation_function": "gelu"})
    assert producers(smooth)["mlp_output"].layers == ("fc1",)


def test_gpt2_s_attention_mixes_the_last_third_of_its_one_product() -> None:
    model, params = random_params(GPT2)
    scores = model_proxies(model, {path: jnp.asarray(leaf) for path, leaf in params.items()})
    first, second = "transformer.h.0.", "transformer.h.1."
    expected = {
        "attn.c_attn": std(params[f"{first}mlp.c_proj.weight"]),
        "attn.c_proj": std(params[f"{second}attn.c_attn.weight"])[32:],
        "mlp.c_fc": std(params[f"{second}attn.c_proj.weight"]),
        "mlp.c_proj": std(params[f"{second}mlp.c_fc.weight"]),
    }
    for layer, score in expected.items():
        np.testing.assert_allclose(scores[f"{second}{layer}.weight"], score, rtol=1e-5)
    assert "mlp_output: a ReLU stands between c_fc and c_proj" in gaps(abstract_model(GPT2 | {"activation_function": "relu"}))


@pytest.mark.parametrize("relu", [False, True])
def test_an_encoder_reads_what_the_norm_behind_a_sum_made_of_it(relu: bool) -> None:
    config = BERT | ({"hidden_act": "relu"} if relu else {})
    model, params = random_params(config)
    scores = model_proxies(model, {path: jnp.asarray(leaf) for path, leaf in params.items()})
    first, second = "encoder.layer.0.", "encoder.layer.1."
    expected = {
        "attention.self.key": std(params[f"{first}output.dense.weight"]),
        "attention.output.dense": std(params[f"{second}attention.self.value.weight"]),
        "intermediate.dense": std(params[f"{second}attention.output.dense.weight"]),
        "output.dense": std(params[f"{second}intermediate.dense.weight"]),
    }
    for layer, score in expected.items():
        if relu and layer == "output.dense":
            assert f"{second}{layer}.weight" not in scores
            assert "mlp_output: a ReLU stands between intermediate.dense and output.dense" in gaps(model)
        else:
            np.testing.assert_allclose(scores[f"{second}{layer}.weight"], score, rtol=1e-5)


@pytest.mark.parametrize("config", [FALCON, SEVEN_B])
def test_falcon_adds_up_what_two_layers_wrote(config: dict[str, Any]) -> None:
    model, params = random_params(config)
    scores = model_proxies(model, {path: jnp.asarray(leaf) for path, leaf in params.items()})
    first, second = "transformer.h.0.", "transformer.h.1."
    written = np.sqrt(sum(std(params[f"{first}{layer}.weight"]) ** 2 for layer in ("self_attention.dense", "mlp.dense_4h_to_h")))
    for layer in ("self_attention.query_key_value", "mlp.dense_h_to_4h"):
        np.testing.assert_allclose(scores[f"{second}{layer}.weight"], written, rtol=1e-5)
    heads = 4 if config is FALCON else 6  # of a group: queries, a key, a value
    groups = std(params[f"{second}self_attention.query_key_value.weight"]).reshape(-1, heads, 4)
    np.testing.assert_allclose(
        scores[f"{second}self_attention.dense.weight"], groups[:, -1:].repeat(heads - 2, axis=1).reshape(-1), rtol=1e-5
    )


def test_a_block_needs_only_what_the_block_before_wrote() -> None:
    model, params = random_params(tiny_config(num_hidden_layers=2))
    inside = {path.removeprefix("model.layers.0."): jnp.asarray(leaf) for path, leaf in params.items() if "layers.0." in path}
    assert set(written_layers(model, inside)) == {"mlp.down_proj.weight"}
    assert set(block_proxies(model, inside, None)) == {
        *(f"self_attn.{name}.weight" for name in ("o_proj",)),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


def test_overlap_and_spearman() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=50).round(1), rng.normal(size=50).round(1)
    ranks = [[float(np.mean(np.flatnonzero(np.sort(x) == value))) for value in x] for x in (one, other)]
    assert spearman(one, other) == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])
    assert spearman(one, one) == pytest.approx(1)
    assert spearman(one, np.ones(50)) == 0
    assert overlap(np.arange(10.0), -np.arange(10.0), 3) == 0
    assert overlap(np.arange(10.0), np.arange(10.0), 3) == 1
    assert overlap(one, other, 0) == 1
