"""Fields of a configuration that change nothing, those beside them that do, and another context."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from model_variants import VARIANTS

from quikjax.errors import QuikError
from quikjax.models.dtypes import floating_dtype
from quikjax.models.registry import abstract_model
from quikjax.testing import tiny_config

ONE_EACH = {"llama": "llama-2-70b", "opt": "opt-125m", "gpt2": "gpt2", "falcon": "falcon-40b"}

NOTHING: list[dict[str, Any]] = [
    {"use_sliding_window": False},
    {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 28},
    {"layer_types": ["full_attention"] * 2},
    {"neftune_noise_alpha": 5.0},
    {"model_max_length": 512},
    {"max_seq_len": 512},
    {"seq_length": 512},
    {"quantization_config": {}},
    {"quantization_config": None, "quantization": {}},
    {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False, "quant_method": "bitsandbytes"}},
    {"is_causal": True},
    {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"padding_side": "left", "bos_token": "<s>"},
]
SOMETHING: list[tuple[dict[str, Any], str]] = [
    ({"use_sliding_window": True, "sliding_window": 512}, "use_sliding_window True"),
    ({"sliding_window": 512}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"is_causal": False}, "is_causal"),
    ({"quantization_config": {"quant_method": "awq"}}, '"awq"'),
    ({"quantization": {"bits": 4}}, "MLX"),
    ({"use_qk_norm": True}, "use_qk_norm"),
]


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize("fields", NOTHING, ids=lambda fields: "+".join(fields))
def test_what_changes_nothing_passes(family: str, fields: dict[str, Any]) -> None:
    published = VARIANTS[ONE_EACH[family]]
    assert abstract_model({**published, **fields}).config == abstract_model(published).config


@pytest.mark.parametrize("family", ONE_EACH)
@pytest.mark.parametrize(("fields", "named"), SOMETHING, ids=lambda value: "+".join(value) if isinstance(value, dict) else "")
def test_what_changes_something_is_refused_by_name(family: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(QuikError, match=named):
        abstract_model({**VARIANTS[ONE_EACH[family]], **fields})


@pytest.mark.parametrize(
    ("family", "field", "name"),
    [
        ("llama", "hidden_act", "swish"),
        ("falcon", "activation", "gelu_python"),
        ("opt", "activation_function", "relu"),
        ("gpt2", "n_ctx", 1),
    ],
)
def test_other_names_of_one_function(family: str, field: str, name: str) -> None:
    published = VARIANTS[ONE_EACH[family]]
    assert abstract_model({**published, field: name}).config == abstract_model(published).config


def test_another_context_where_positions_allow_it() -> None:
    for family, name in ONE_EACH.items():
        published = VARIANTS[name]
        declared = abstract_model(published).config
        shorter = abstract_model(published, context=7)
        assert shorter.config.context_length == 7
        shapes = [abstract_model(published, context=context) for context in (None, 7)]
        assert shapes[0].published == shapes[1].published
        longer = declared.context_length + 1
        if family in ("opt", "gpt2"):
            with pytest.raises(QuikError, match=f"context of {longer} tokens is more than the .* positions that this model has"):
                abstract_model(published, context=longer)
        else:
            assert abstract_model(published, context=longer).config.context_length == longer
    for wrong in (0, -1, True):
        with pytest.raises(QuikError, match="the context is a number of tokens, at least 1, not"):
            abstract_model(tiny_config(), context=wrong)


def test_another_context_changes_no_position() -> None:
    """Stretched positions stay stretched as published, not by the new context."""
    published = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0})
    declared, longer = abstract_model(published).config, abstract_model(published, context=999).config
    assert dataclasses.replace(longer, context_length=declared.context_length) == declared


def test_dtypes_by_name() -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert floating_dtype(name) == floating_dtype(np.dtype(floating_dtype(name)))
    for wrong, meant in (("fp32", "float32"), ("bf16", "bfloat16"), ("half", "float16"), ("flaot32", "float32")):
        with pytest.raises(QuikError, match=f'there is no dtype "{wrong}" to compute in; did you mean "{meant}"'):
            floating_dtype(wrong)
    for odd in ("int8", np.int32, np.float64, 3, None):
        with pytest.raises(QuikError, match="dtype"):
            floating_dtype(odd)
