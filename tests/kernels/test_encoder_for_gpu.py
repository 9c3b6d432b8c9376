"""The program that encodes texts, compiled for an H100 that is not there: what a block of BERT launches."""

import functools
from typing import Any

import absent_gpu
import hlo
import jax
import jax.numpy as jnp
import pytest
from test_gpu_scripts import module

from quikjax.encoding import text_encoder
from quikjax.pallas_kernels.devices import H100, tracing_for

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def _program(depth: int) -> hlo.Program:
    """64 tokens through a model of so many blocks in QUIK-4B format. Allocates nothing."""
    made: dict[str, Any] = {}

    def build() -> Any:
        made["model"] = module("gpu_model").build(BERT | {"num_hidden_layers": depth}, True, jnp.bfloat16)
        return made["model"].params

    with tracing_for(H100):
        params = jax.eval_shape(build)
        ids, lengths = jax.ShapeDtypeStruct((2, 32), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
        encode = functools.partial(
            text_encoder.encode_texts, made["model"].layout, lambda rest, hidden, positions: hidden[:, 0], True
        )
        return hlo.Program(absent_gpu.compile_lowered(absent_gpu.lower("h100", encode, params, ids, lengths, ids)).hlo)


@pytest.mark.long
@pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))
def test_a_block_of_bert_launches_its_products_attention_and_norms() -> None:
    """Four splits, GELU in one, and four products, the hidden state added in two; no kernel for an activation or a bias."""
    one, two = _program(1), _program(2)
    assert two.kernels() - one.kernels() == 8
    assert two.launched() - one.launched() == 8 + 1 + 2
