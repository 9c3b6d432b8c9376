"""The program that encodes texts, compiled for an H100 that is not there: what a block of BERT launches."""

import functools
from typing import Any

import absent_gpu
import hlo
import jax
import jax.numpy as jnp
import pytest
from test_gpu_scripts import module

from quikjax.encoding import speed, text_encoder
from quikjax.models.bert import BertBlock
from quikjax.models.stacked import Layout
from quikjax.pallas_kernels.devices import H100, tracing_for
from quikjax.weights.tiled import TiledMember, TiledWeight

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def _abstract(depth: int) -> tuple[Layout, Any]:
    """A model of so many blocks in QUIK-4B format as an H100 runs it: its layout, and its parameters' shapes."""
    made: dict[str, Any] = {}

    def build() -> Any:
        made["model"] = module("gpu_model").build(BERT | {"num_hidden_layers": depth}, True, jnp.bfloat16)
        return made["model"].params

    with tracing_for(H100):
        params = jax.eval_shape(build)
    return made["model"].layout, params


def _program(depth: int) -> hlo.Program:
    """64 tokens through a model of so many blocks in QUIK-4B format. Allocates nothing."""
    layout, params = _abstract(depth)
    with tracing_for(H100):
        ids, lengths = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
        encode = functools.partial(text_encoder.encode_texts, layout, lambda rest, hidden, positions: hidden[:, 0], True)
        return hlo.Program(absent_gpu.compile_lowered(absent_gpu.lower("h100", encode, params, ids, lengths, ids)).hlo)


@pytest.mark.long
@pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))
def test_a_block_of_bert_launches_its_products_attention_and_norms() -> None:
    """Four splits, GELU in one, and four products, the hidden state added in two; no kernel for an activation or a bias."""
    one, two = _program(1), _program(2)
    assert two.kernels() - one.kernels() == 8
    assert two.launched() - one.launched() == 8 + 1 + 2


def test_products_are_timed_in_the_form_that_a_gpu_runs() -> None:
    """Blocks apart, queries, keys and values joined; every layer's result is there."""
    layout, params = _abstract(2)
    assert layout.unrolled
    for group, names in BertBlock.groups.items():
        blocks: Any = speed.running_layers(layout, params["runs"]["0"], names)
        assert len(blocks) == 2
        assert [type(layer["weight"]) for layer in blocks[0]] == [TiledWeight] + [TiledMember] * (len(names) - 1)
        x = jax.ShapeDtypeStruct((64, 512 if group == "mlp_output" else 128), jnp.bfloat16)
        with tracing_for(H100):
            same, results = jax.eval_shape(speed._one_by_one, x, blocks)
        assert (same.shape, same.dtype) == (x.shape, x.dtype)
        assert [y.shape for y in results] == [(64, 512 if group == "mlp_input" else 128)] * len(names)
