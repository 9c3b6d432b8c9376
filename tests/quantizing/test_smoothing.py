"""Smoothing changes numbers, not the function; and what comes of the weight-only baselines."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.errors import QuikError
from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_model
from quikjax.quantizing.model import calibrate
from quikjax.quantizing.smoothing import smooth_params
from quikjax.quantizing.statistics import LayerStats, empty_stats, observe
from quikjax.quantizing.weight_only import weight_only
from quikjax.testing import tiny_model

IDS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
OPT = {
    "model_type": "opt",
    "vocab_size": 257,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 257, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 257,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "parallel_attn": True,
    "multi_query": True,
    "new_decoder_architecture": False,
    "bias": False,
    "alibi": False,
}


def random_model(fields: dict[str, Any]) -> CausalLM:
    model = abstract_model(fields)
    rng = np.random.default_rng(0)
    flat = {
        path: jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-1]) + (len(leaf.shape) == 1), jnp.float32)
        for path, leaf in dotted(pure_params(model)).items()
    }
    return checked_model(nnx.merge(nnx.split(model)[0], nested(flat)))


@partial(jax.jit, static_argnums=0)
def logits(graphdef: Any, params: Any) -> jax.Array:
    return nnx.merge(graphdef, params)(jnp.asarray(IDS))


def statistics(model: CausalLM) -> dict[str, LayerStats]:
    """Statistics of random inputs with two large columns: any numbers will do for a function that must not change."""
    found = {}
    for path, leaf in dotted(pure_params(model)).items():
        if path.startswith(".".join(model.block_path)) and leaf.ndim == 2:
            x = np.random.default_rng(leaf.shape[1]).standard_normal((1, 8, leaf.shape[1])).astype(np.float32)
            x[..., :2] *= 50
            found[path] = observe(empty_stats(leaf.shape[1]), jnp.asarray(x))
    return found


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "falcon"])
def test_a_smoothed_model_is_the_same_function(family: str) -> None:
    model = (
        tiny_model(num_hidden_layers=2)
        if family == "llama"
        else random_model({"opt": OPT, "gpt2": GPT2, "falcon": FALCON}[family])
    )
    graphdef = nnx.split(model)[0]
    params = smooth_params(model, statistics(model), 0.5)
    changed = [path for path, leaf in dotted(params).items() if not np.array_equal(leaf, dotted(pure_params(model))[path])]
    layers_per_block = {"llama": 7, "opt": 8, "gpt2": 6, "falcon": 4}[family]
    assert len(changed) == 2 * layers_per_block
    np.testing.assert_allclose(logits(graphdef, params), logits(graphdef, pure_params(model)), rtol=1e-3, atol=1e-3)


def test_smoothing_evens_out_what_layers_read() -> None:
    model = tiny_model(num_hidden_layers=1)
    graphdef = nnx.split(model)[0]
    before = calibrate(graphdef, pure_params(model), [IDS])
    params = smooth_params(model, before, 0.8)
    after = calibrate(graphdef, params, [IDS])
    path = "model.layers.0.self_attn.q_proj.weight"
    spread = [float(jnp.max(stats[path].absmax) / jnp.median(stats[path].absmax)) for stats in (before, after)]
    assert spread[1] < spread[0] / 3
    rounded, bits = weight_only("awq-w4-g128", model, before)
    plain, _ = weight_only("rtn-w4-g128", model, before)
    assert bits == 4 + 20 / 128
    H = np.asarray(before[path].hessian, np.float64)

    def loss(params: dict[str, Any]) -> float:
        gap = np.asarray(dotted(params)[path], np.float64) - np.asarray(dotted(pure_params(model))[path], np.float64)
        return float(np.sum((gap @ H) * gap))

    assert 0 < loss(rounded) < loss(plain)


def test_what_is_refused() -> None:
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(QuikError, match="alpha must be between 0 and 1"):
        smooth_params(model, {}, 1.5)
    with pytest.raises(QuikError, match="norms stand behind its layers"):
        smooth_params(random_model({**OPT, "do_layer_norm_before": False}), {}, 0.5)
    with pytest.raises(QuikError, match='did you mean "awq-w4-g128"'):
        weight_only("awq-g128", model, {})
