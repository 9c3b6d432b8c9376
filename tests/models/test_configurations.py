"""What a published configuration may and may not say, and what the models make of real ones."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_variants import VARIANTS
from random_weights import random_weights

from quikjax.errors import QuikError
from quikjax.models.base import Positions, Transformer, default_positions
from quikjax.models.falcon import alibi_slopes
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.rope import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope, rotate

ONE_EACH = {"llama": "llama-2-70b", "opt": "opt-125m", "gpt2": "gpt2", "falcon": "falcon-40b"}


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_a_block_that_multiplies_is_in_exactly_one_group(name: str) -> None:
    model = abstract_model(VARIANTS[name])
    flat = dotted(pure_params(model))
    for key, block in model.blocks.items():
        prefix = ".".join((*model.block_path, key)) + "."
        matrices = [path.removeprefix(prefix) for path, leaf in flat.items() if path.startswith(prefix) and leaf.ndim == 2]
        grouped = [f"{layer}.weight" for layers in block.groups.values() for layer in layers]
        assert sorted(grouped) == sorted(matrices)


@pytest.mark.parametrize(
    "name",
    [
        *("llama-2-70b", "gpt2"),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("opt-125m", "opt-350m", "falcon-7b", "falcon-40b", "falcon-rw-1b")
        ),
    ],
)
def test_layers_of_a_group_read_what_the_block_was_given_for_it(name: str) -> None:
    model = abstract_model(VARIANTS[name])
    block = model.blocks["0"]
    graphdef, state = nnx.split(block)
    shapes = {path: leaf.shape for path, leaf in dotted(nnx.to_pure_dict(state)).items()}
    params = random_weights(shapes, 0)
    ids = jnp.zeros((1, 3), jnp.int32)
    hidden = jax.random.normal(jax.random.key(0), (1, 3, model.config.hidden_size))

    @partial(jax.jit, static_argnums=1)
    def run(params: dict[str, Any], silenced: str | None) -> jax.Array:
        seen: list[str] = []

        def observe(group: str, x: jax.Array) -> jax.Array:
            seen.append(group)
            return jnp.zeros_like(x) if group == silenced else x

        out = nnx.merge(graphdef, nested(params))(hidden, Positions(default_positions(ids)), None, observe)[0]
        assert [name for name in seen if name not in ("query", "key")] == list(block.groups)
        assert [name for name in seen if name in ("query", "key")] == ["query", "key"]
        return out

    for group, layers in block.groups.items():
        for layer in layers:
            path = f"{layer}.weight"
            doubled = {**params, path: 2 * params[path]}
            # A matrix that reads zeros does not matter, so the block did go on with what it was given, in this layer.
            np.testing.assert_array_equal(run(doubled, group), run(params, group))
            assert np.abs(run(doubled, None) - run(params, None)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "kind"), [("falcon-7b", "RefinedWebModel"), ("falcon-40b", "RefinedWeb"), ("falcon-rw-1b", "RefinedWebModel")]
)
def test_falcon_is_read_as_it_was_first_published(name: str, kind: str) -> None:
    fields = dict(VARIANTS[name])
    first = {**without(fields, "new_decoder_architecture"), "model_type": kind, "architectures": ["RWForCausalLM"]}
    heads = first.pop("num_kv_heads", None)
    if name == "falcon-40b":
        first["n_head_kv"] = heads
    first["n_head"], first["n_layer"] = first.pop("num_attention_heads"), first.pop("num_hidden_layers")
    assert abstract_model(first).config == abstract_model(fields).config


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize("field", ["sliding_window", "logit_scale", "use_alibi_and_rope", "residual_multiplier"])
def test_an_unknown_field_is_refused_by_name(family: str, field: str) -> None:
    with pytest.raises(QuikError, match=rf"does not know .*{field}"):
        abstract_model({**VARIANTS[ONE_EACH[family]], field: 4096})


@pytest.mark.parametrize("family", ONE_EACH)
def test_a_null_and_a_harmless_field_pass(family: str) -> None:
    fields = VARIANTS[ONE_EACH[family]]
    extra = {"sliding_window": None, "unk_token_id": 0, "attention_dropout": 0.1, "pretraining_tp": 1, "id2label": {"0": "A"}}
    assert abstract_model({**fields, **extra}).config == abstract_model(fields).config


@pytest.mark.parametrize("family", ONE_EACH)
def test_a_quantized_checkpoint_is_refused(family: str) -> None:
    with pytest.raises(QuikError, match=r'already quantized .*"gptq"'):
        abstract_model({**VARIANTS[ONE_EACH[family]], "quantization_config": {"quant_method": "gptq", "bits": 4}})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama-2-70b", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ("llama-2-70b", {"rope_interleaved": True}, "rope_interleaved True is not supported"),
        ("llama-2-70b", {"num_key_value_heads": 3}, "not a multiple of its num_key_value_heads 3"),
        ("llama-2-70b", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple"),
        ("llama-2-70b", {"hidden_size": "48"}, "hidden_size = '48', which should be a positive whole number"),
        ("llama-2-70b", {"num_hidden_layers": 0}, "num_hidden_layers = 0, which should be"),
        ("llama-2-70b", {"tie_word_embeddings": "no"}, "should be true or false"),
        ("llama-2-70b", {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0, which should be a positive number"),
        ("llama-2-70b", {"head_dim": 11}, "cannot be rotated"),
        ("llama-2-70b", {"is_encoder_decoder": True}, "is_encoder_decoder True is not supported"),
        ("llama-2-70b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama-2-70b", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, '"longrope" is not supported'),
        ("llama-2-70b", {"rope_scaling": {"type": "linaer", "factor": 2.0}}, 'did you mean "linear"'),
        ("llama-2-70b", {"rope_scaling": {"type": "linear"}}, "no field rope_scaling.factor"),
        ("llama-2-70b", {"rope_scaling": {"type": "linear", "factor": 2.0, "power": 3}}, "rope_scaling.power"),
        ("llama-2-70b", {"rope_scaling": "linear"}, "should be an object"),
        ("opt-125m", {"activation_function": "swish"}, "activation_function 'swish' is not supported, only 'relu' or 'gelu'"),
        ("opt-125m", {"scale_embeddings": True}, "scale_embeddings True is not supported"),
        ("opt-125m", {"num_attention_heads": 5}, "hidden_size 48 is not a multiple"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu' is not supported, only 'gelu_new' or"),
        ("gpt2", {"n_head": 5}, "GPT-2's n_embd 48 is not a multiple of its n_head 5"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT-2 as GPT2DoubleHeadsModel is not supported, only as GPT2LM"),
        ("falcon-7b", {"activation": "relu"}, "activation 'relu' is not supported"),
        ("falcon-7b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 is not supported"),
        ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3 is not supported"),
        ("falcon-40b", {"parallel_attn": False}, "always parallel"),
        ("falcon-40b", {"num_kv_heads": 3}, "not a multiple of its num_kv_heads 3"),
        ("falcon-11b", {"ff_factor": 3}, "ff_factor 3 is not supported, only 4.0"),
    ],
)
def test_mathematics_we_do_not_have_is_refused_in_one_sentence(name: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(QuikError) as error:
        abstract_model({**VARIANTS[name], **change})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


GPT2_NAMES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_named(family: str, field: str) -> None:
    field = GPT2_NAMES.get(field, field) if family == "gpt2" else field
    with pytest.raises(QuikError, match=f"no field {field}"):
        abstract_model(without(VARIANTS[ONE_EACH[family]], field))


def count(model: Transformer) -> int:
    return sum(math.prod(leaf.shape) for leaf in dotted(pure_params(model)).values())


LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}
OPT_350M = {
    "model_type": "opt",
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
GPT2 = {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "multi_query": True,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "vocab_size": 65024,
}
FALCON_180B = {
    "model_type": "falcon",
    "hidden_size": 14848,
    "new_decoder_architecture": True,
    "num_attention_heads": 232,
    "num_hidden_layers": 80,
    "num_kv_heads": 8,
    "vocab_size": 65024,
}

# Its index counts the tied head once more. Blocks (fused projection, dense, MLP, two norms), embedding, final norm:
FALCON_180B_SIZE = 80 * (14848 * (232 + 2 * 8) * 64 + 9 * 14848**2 + 4 * 14848) + 65024 * 14848 + 2 * 14848


@pytest.mark.parametrize(
    ("fields", "parameters", "width", "context"),
    [
        (LLAMA_2_7B, 6_738_415_616, 4096, 4096),
        (OPT_350M, 331_196_416, 1024, 2048),
        (GPT2, 124_439_808, 768, 1024),
        (FALCON_7B, 6_921_720_704, 4544, 2048),
        (FALCON_180B, FALCON_180B_SIZE, 14848, 2048),
    ],
    ids=["LLaMA-2-7B", "OPT-350m", "GPT-2", "Falcon-7B", "Falcon-180B"],
)
def test_published_models_have_their_published_size(fields: dict[str, Any], parameters: int, width: int, context: int) -> None:
    model = abstract_model(fields)
    assert count(model) == parameters
    assert (model.config.hidden_size, model.config.context_length) == (width, context)


def test_opt_answers_to_the_names_with_and_without_the_leading_model() -> None:
    model = type(abstract_model(OPT_350M))
    path = "model.decoder.layers.3.fc1.weight"
    assert model.published_names(path) == (path, "decoder.layers.3.fc1.weight")
    assert model.published_names("lm_head.weight") == ("lm_head.weight",)


@pytest.mark.parametrize("name", ["opt-125m", "gpt2"])
def test_a_position_that_was_never_learned_is_not_a_number(name: str) -> None:
    model = abstract_model(VARIANTS[name])
    limit = model.config.context_length
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), pure_params(model))
    whole = nnx.merge(nnx.split(model)[0], params)
    hidden = whole.embed(jnp.zeros((1, 2), jnp.int32), jnp.asarray([[limit - 1, limit]], jnp.int32))
    assert jnp.isfinite(hidden[0, 0]).all()
    assert jnp.isnan(hidden[0, 1]).all()


@pytest.mark.parametrize(
    ("change", "rope", "context"),
    [
        ({}, Rope(10000.0), 256),
        ({"rope_theta": 500000}, Rope(500000.0), 256),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}, "rope_theta": 1.0}, Rope(20000.0), 256),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LinearRope(10000.0, 4.0), 256),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 1024}, LinearRope(10000.0, 4.0), 1024),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, DynamicRope(10000.0, 2.0, 256), 512),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            Llama3Rope(10000.0, 8.0, 1.0, 4.0, 256),
            256,
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.5, "rope_theta": 1e4}},
            YarnRope(10000.0, 16.0, 256, scale=1.5),
            4096,
        ),
    ],
)
def test_rotary_fields_are_read_in_the_old_form_and_the_new(change: dict[str, Any], rope: Rope, context: int) -> None:
    config: Any = abstract_model({**VARIANTS["llama-1"], "max_sequence_length": None, **change}).config
    assert config.rope == rope
    assert type(config.rope) is type(rope)
    assert config.context_length == context


def test_dynamic_rotation_is_plain_within_the_trained_context_and_rows_do_not_share_it() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 3, 16))
    near, far = jnp.arange(8, dtype=jnp.int32), jnp.arange(100, 108, dtype=jnp.int32)
    both = rotate(x, jnp.stack([near, far]), DynamicRope(10000.0, 4.0, 32))
    np.testing.assert_allclose(both[:1], rotate(x[:1], near[None], Rope(10000.0)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(both[1:], rotate(x[1:], far[None], DynamicRope(10000.0, 4.0, 32)))
    assert np.abs(both[1:] - rotate(x[1:], far[None], Rope(10000.0))).max() > 0.1


def test_alibi_slopes_of_powers_of_two_and_between() -> None:
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    # Six heads: those of four, then every second of eight.
    np.testing.assert_allclose(alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
