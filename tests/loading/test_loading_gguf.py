"""GGUF files of the LLaMA architecture: the same model as from safetensors, whatever the block format."""

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from loading_checkpoints import CONFIG, Weights, complaint, llama_weights, refusal, write_single
from loading_ggufs import rounded, write_gguf

from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.loading.gguf_config import llama3_divisors
from quikjax.testing import forward

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return llama_weights()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_same_model_as_from_safetensors(tmp_path: Path, weights: Weights, kind: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights, kind)
    directory = write_single(tmp_path / "safetensors", CONFIG, rounded(weights, kind))
    source, expected = open_source(path), open_source(directory)
    assert set(source.names()) == set(expected.names())
    for name in expected.names():
        assert np.array_equal(source.read(name).astype(np.float32), expected.read(name)), name
        assert source.read(name).dtype == source.dtype(name)
        assert source.shape(name) == expected.shape(name)
    plain = {"F32": "float32", "F16": "float16"}
    assert source.storage("model.layers.0.mlp.up_proj.weight") == plain.get(kind, kind)
    assert source.storage("model.norm.weight") == "float32"
    ids = jnp.arange(10)[None]
    assert np.array_equal(forward(load(path)[0], ids), forward(load(directory)[0], ids))


def test_rounding_is_real(weights: Weights) -> None:
    """The equality above would hold for any format if quantizing changed nothing."""
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(rounded(weights, "Q4_0")[name] - weights[name]).max() > 0.01


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(tmp_path: Path, kind: str) -> None:
    """The package cannot write these: blocks of random codes, whose scales are finite since no exponent is all ones."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 32}
    weights = llama_weights(config)
    target = "model.layers.0.mlp.down_proj.weight"
    rest = {name: array for name, array in weights.items() if name != target}
    codes = np.random.default_rng(0).integers(0, 0x60, (256, 512 // block * size), dtype=np.uint8)
    writer_tensors = {"blk.0.ffn_down.weight": codes}
    path = write_gguf(tmp_path / "model.gguf", rest, config=config, raw={"blk.0.ffn_down.weight": kind}, tensors=writer_tensors)
    source = open_source(path)
    assert source.shape(target) == (256, 512)
    assert source.storage(target) == kind
    assert np.array_equal(source.read(target), gguf.dequantize(codes, gguf.GGMLQuantizationType[kind]))
    assert np.unique(source.read(target)).size > 100


def test_configuration_is_rebuilt(tmp_path: Path, weights: Weights) -> None:
    config = open_source(write_gguf(tmp_path / "model.gguf", weights)).config
    assert {key: config[key] for key in CONFIG} == CONFIG  # 1e-5 exactly, though the file keeps it as float32
    assert config["head_dim"] == 16
    assert not config["attention_bias"]
    assert not config["mlp_bias"]


def test_tied_embeddings_when_no_head_is_in_the_file(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    path = write_gguf(tmp_path / "model.gguf", llama_weights(config), "Q8_0")
    assert open_source(path).config["tie_word_embeddings"] is True
    assert load(path)[0](jnp.arange(4)[None]).shape == (1, 4, CONFIG["vocab_size"])


def test_biases_are_reordered_with_their_rows(tmp_path: Path) -> None:
    config = CONFIG | {"attention_bias": True}
    rng = np.random.default_rng(1)
    weights = llama_weights(config)
    for i in range(config["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            key = f"model.layers.{i}.self_attn.{name}"
            weights[f"{key}.bias"] = rng.normal(size=len(weights[f"{key}.weight"])).astype(np.float32)
    path = write_gguf(tmp_path / "model.gguf", weights, config=config)
    directory = write_single(tmp_path / "safetensors", config, weights)
    ids = jnp.arange(7)[None]
    assert np.array_equal(forward(load(path)[0], ids), forward(load(directory)[0], ids))


def test_linear_rotary_scaling(tmp_path: Path, weights: Weights) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = open_source(write_gguf(tmp_path / "new.gguf", weights, extra=extra))
    assert source.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    old = open_source(write_gguf(tmp_path / "old.gguf", weights, extra={"llama.rope.scale_linear": 4.0}))
    assert old.config["rope_scaling"] == source.config["rope_scaling"]


def test_llama3_rotary_factors_are_recognised(tmp_path: Path, weights: Weights) -> None:
    factors = llama3_divisors(CONFIG["rope_theta"], 16, _LLAMA3).astype(np.float32)
    assert factors.min() == 1
    assert factors.max() == 32
    path = write_gguf(tmp_path / "model.gguf", weights, tensors={"rope_freqs.weight": factors})
    source = open_source(path)
    assert source.config["rope_scaling"] == _LLAMA3
    assert "rope_freqs.weight" not in source.names()


def test_other_rotary_factors_arerefusal(tmp_path: Path, weights: Weights) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", weights, tensors={"rope_freqs.weight": factors})
    assert "rope_freqs.weight are not those of a LLaMA 3 model" in refusal(path)


def test_llama3_divisors_by_the_published_rule() -> None:
    """The rule as LLaMA 3.1 states it, by wavelengths and one frequency at a time."""
    theta, size = 500000.0, 128
    divisors = []
    for i in range(size // 2):
        wave = 2 * np.pi * theta ** (2 * i / size)
        if wave < 8192 / 4.0:
            divisors.append(1.0)
        elif wave > 8192 / 1.0:
            divisors.append(32.0)
        else:
            smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 32.0 + smooth))
    np.testing.assert_allclose(llama3_divisors(theta, size, _LLAMA3), divisors, rtol=1e-12)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"split.count": 3}, "one of 3 parts of a model"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.rope.scaling.type": "yarn"}, 'rotary scaling "yarn"'),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale is not known"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length"),
        ({"llama.feed_forward_length": [96, 64]}, "llama.feed_forward_length is a list"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.block_count": None}, "lacks 'block_count'"),
        ({"llama.block_count": 3}, "lacks 9 tensors"),
        ({"llama.block_count": 1}, "has no place for"),
        ({"llama.feed_forward_length": 128}, "where the configuration asks for [64, 128]"),
    ],
)
def test_metadata_that_is_not_supported_is_refused_by_name(
    tmp_path: Path, weights: Weights, extra: dict[str, Any], words: str
) -> None:
    assert words in refusal(write_gguf(tmp_path / "model.gguf", weights, extra=extra))


def test_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert 'architecture "qwen2" are not supported' in refusal(tmp_path / "model.gguf")


def test_truncation_at_many_places(tmp_path: Path, weights: Weights) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights, "Q4_0", tokenizer={"ggml.tokens": ["a", "b"]})
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {0, 1, 3, 4, 8, 23, 24, 25, len(whole) - 1, len(whole) // 2, *rng.integers(0, len(whole), 40).tolist()}
    for size in sorted(places):
        path.write_bytes(whole[:size])
        message = refusal(path)
        assert "truncated" in message or "empty" in message, size


def test_flipped_headers_are_found_or_harmless(tmp_path: Path, weights: Weights) -> None:
    """A bit of the header flipped: one sentence, or the same names and shapes. Never another error."""
    path = write_gguf(tmp_path / "model.gguf", weights, "Q8_0")
    whole = path.read_bytes()
    expected = {name: array.shape for name, array in weights.items()}
    rng = np.random.default_rng(0)
    found = 0
    for bit in rng.choice(8 * 2000, 120, replace=False).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if complaint(path) is not None:
            found += 1
        else:
            source = open_source(path)
            assert {name: source.shape(name) for name in source.names()} == expected
    assert found > 80  # what is left are values such as the context's length


def test_a_block_with_an_infinite_scale_is_named(tmp_path: Path, weights: Weights) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights, "Q8_0")
    source = open_source(path)
    name = "model.layers.1.mlp.gate_proj.weight"
    at = source._stored[name][1].offset  # type: ignore[attr-defined]
    whole = bytearray(path.read_bytes())
    whole[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(whole)
    with pytest.raises(QuikError, match=f"{name} holds .* NaN or infinite"):
        load(path)


def test_a_directory_with_one_gguf_file(tmp_path: Path, weights: Weights) -> None:
    path = write_gguf(tmp_path / "a.gguf", weights)
    assert open_source(tmp_path).fingerprint() == open_source(path).fingerprint()
    write_gguf(tmp_path / "b.gguf", weights, "Q8_0")
    assert "holds 2 GGUF files" in refusal(tmp_path)
