"""Hugging Face directories of safetensors: what is read equals what was written, and damage is one sentence before reading."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from loading_checkpoints import CONFIG, Weights, complaint, llama_weights, refusal, write_config, write_sharded, write_single
from safetensors.numpy import save_file

from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.loading import load_params, open_source, verify
from quikjax.loading.source import Source
from quikjax.models.registry import abstract_model, dotted, pure_params


@pytest.fixture(scope="module")
def weights() -> Weights:
    return llama_weights()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_tensor_is_what_was_written(tmp_path: Path, dtype: Any, write: Any) -> None:
    weights = llama_weights(dtype=dtype)
    source = open_source(write(tmp_path, CONFIG, weights))
    assert set(source.names()) == set(weights)
    for name, array in weights.items():
        read = source.read(name)
        assert (source.shape(name), source.dtype(name)) == (array.shape, array.dtype)
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()
    assert source.size == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert source.config == CONFIG
    assert source.tokenizer() is None


def test_loaded_parameters_are_the_weights(tmp_path: Path, weights: Weights) -> None:
    model, tokenizer = load(write_sharded(tmp_path, CONFIG, weights))
    params = dotted(pure_params(model))
    assert tokenizer is None
    assert set(params) == set(weights)
    assert all(np.array_equal(params[name], array) for name, array in weights.items())


def test_single_and_sharded_give_the_same_logits(tmp_path: Path, weights: Weights) -> None:
    ids = jnp.arange(12).reshape(2, 6)
    one, _ = load(write_single(tmp_path / "one", CONFIG, weights))
    many, _ = load(str(write_sharded(tmp_path / "many", CONFIG, weights)))
    logits = one(ids)
    assert logits.shape == (2, 6, CONFIG["vocab_size"])
    assert logits.dtype == jnp.float32
    assert np.array_equal(logits, many(ids))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_take_the_dtype_that_is_asked_for(tmp_path: Path, weights: Weights, dtype: Any) -> None:
    model, _ = load(write_single(tmp_path, CONFIG, weights), dtype=dtype)
    for name, param in dotted(pure_params(model)).items():
        assert np.array_equal(np.asarray(param), weights[name].astype(dtype)), name


def test_values_beyond_float16_are_refused_by_name(tmp_path: Path, weights: Weights) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    big = weights | {name: weights[name] * 1e6}
    directory = write_single(tmp_path, CONFIG, big)
    with pytest.raises(QuikError, match=f"{name} has values beyond the range of float16"):
        load(directory, dtype=jnp.float16)
    load(directory, dtype=jnp.bfloat16)


def test_one_block_alone(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_sharded(tmp_path, CONFIG, weights))
    read: list[str] = []
    plain = source._read

    def watched(name: str) -> np.ndarray:
        read.append(name)
        return plain(name)

    monkeypatch.setattr(source, "_read", watched)
    params = load_params(source, abstract_model(source.config), ["model.layers.1"])
    assert set(params) == {"model"}
    assert set(params["model"]["layers"]) == {"1"}
    block = dotted(params["model"]["layers"]["1"])
    assert sorted(read) == sorted(f"model.layers.1.{name}" for name in block)
    assert all(np.array_equal(array, weights[f"model.layers.1.{name}"]) for name, array in block.items())


def test_a_path_that_is_no_parameter(tmp_path: Path, weights: Weights) -> None:
    source = open_source(write_single(tmp_path, CONFIG, weights))
    with pytest.raises(QuikError, match=r'no parameters at "model\.layers\.7"'):
        load_params(source, abstract_model(source.config), ["model.layers.7"])


def test_fingerprint_follows_content_not_place(tmp_path: Path, weights: Weights) -> None:
    here = open_source(write_single(tmp_path / "here", CONFIG, weights)).fingerprint()
    assert open_source(write_single(tmp_path / "there", CONFIG, weights)).fingerprint() == here
    name = "model.norm.weight"
    other = weights | {name: np.nextafter(weights[name], np.float32(9))}
    assert open_source(write_single(tmp_path / "weights", CONFIG, other)).fingerprint() != here
    assert open_source(write_single(tmp_path / "config", CONFIG | {"rope_theta": 1e4}, weights)).fingerprint() != here


def test_computed_tensors_are_passed_over(tmp_path: Path, weights: Weights) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    model, _ = load(write_single(tmp_path, CONFIG, weights | extra))
    assert set(dotted(pure_params(model))) == set(weights)


def test_tied_head_that_equals_the_embeddings(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    weights = llama_weights(config)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    load(write_single(tmp_path / "same", config, weights | head))
    other = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    with pytest.raises(QuikError, match=r"ties the head to the embeddings, but lm_head\.weight and .* differ"):
        load(write_single(tmp_path / "other", config, weights | other))


def test_truncation_at_every_kind_of_place(tmp_path: Path, weights: Weights) -> None:
    path = write_single(tmp_path, CONFIG, weights) / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for size in places:
        path.write_bytes(whole[:size])
        assert "truncated" in refusal(tmp_path), size
    path.write_bytes(whole + b"\0")
    assert "damaged" in refusal(tmp_path)


def test_a_flipped_header_is_found_or_harmless(tmp_path: Path, weights: Weights) -> None:
    """Every bit of a stretch of the header: one sentence, or (a digit of padding, the order of names) the same tensors."""
    path = write_single(tmp_path, CONFIG, weights) / "model.safetensors"
    whole = path.read_bytes()
    harmless = 0
    for bit in range(0, 8 * 400, 27):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if complaint(tmp_path) is None:
            harmless += 1
            source = open_source(tmp_path)
            assert {name: source.shape(name) for name in weights} == {name: array.shape for name, array in weights.items()}
    assert harmless < 20  # most of a header means something


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    weights = llama_weights(dtype=ml_dtypes.bfloat16)
    weights[name][3, 5] = bad
    directory = write_sharded(tmp_path, CONFIG, weights)
    source = open_source(directory)
    with pytest.raises(QuikError, match=f"{name} holds 1 values that are NaN or infinite"):
        load(directory)
    with pytest.raises(QuikError, match=f"{name} holds 1 values"):
        verify(source, abstract_model(source.config))


def test_verify_reads_every_tensor_once_and_passes_what_is_sound(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(write_sharded(tmp_path, CONFIG, weights))
    read: list[str] = []
    original = type(source).read

    def note(self: Source, name: str) -> np.ndarray:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(type(source), "read", note)
    verify(source, abstract_model(source.config))
    assert sorted(read) == sorted(weights)


def test_reading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Peak memory of reading eight blocks is that of reading two: a few times the largest tensor, far below the whole."""
    peaks = {}
    for blocks in (2, 8):
        config = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": blocks}
        source = open_source(write_single(tmp_path / str(blocks), config, llama_weights(config)))
        model = abstract_model(source.config)
        verify(source, model)
        tracemalloc.start()
        verify(source, model)
        peaks[blocks] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    largest = 1024 * 256 * 4
    assert source.size > 20 * largest
    assert peaks[8] < 3 * largest
    assert peaks[8] < 1.2 * peaks[2]


def test_a_missing_tensor(tmp_path: Path, weights: Weights) -> None:
    gone = "model.layers.0.mlp.up_proj.weight"
    message = refusal(write_single(tmp_path, CONFIG, {name: array for name, array in weights.items() if name != gone}))
    assert f"lacks 1 tensor ({gone})" in message


def test_an_unexpected_tensor(tmp_path: Path, weights: Weights) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}
    assert "holds 1 tensor (model.layers.0.self_attn.q_norm.weight)" in refusal(write_single(tmp_path, CONFIG, weights | extra))


def test_a_wrong_shape_is_told_with_both(tmp_path: Path, weights: Weights) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    message = refusal(write_single(tmp_path, CONFIG, weights | {name: weights[name].T.copy()}))
    assert f"{name} is [96, 64] where the configuration asks for [64, 96]" in message


def test_a_missing_shard(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of 3 shards of the weights: model-00002-of-00003.safetensors" in refusal(directory)


def test_two_swapped_shards(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    first, second = (directory / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    third = first.rename(directory / "aside")
    second.rename(first)
    third.rename(second)
    message = refusal(directory)
    assert "is not in model-00001-of-00003.safetensors" in message
    assert "it is in model-00002-of-00003.safetensors: the shards are swapped" in message


def test_shards_of_another_model(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    save_file({"a": np.zeros(2, np.float32)}, directory / "model-00003-of-00003.safetensors")
    assert "(no shard has it)" in refusal(directory)


def test_a_tensor_that_stands_in_two_shards(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    last = "model-00003-of-00003.safetensors"
    twice = {name: weights[name] for name in weights if index[name] == last} | {"model.norm.weight": weights["model.norm.weight"]}
    twice["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    save_file(twice, directory / last)
    assert complaint(directory) is None  # the same values: nothing is wrong
    assert np.array_equal(open_source(directory).read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])
    twice["model.embed_tokens.weight"] = -twice["model.embed_tokens.weight"]
    save_file(twice, directory / last)
    assert "tensor model.embed_tokens.weight is in model-00001-of-00003.safetensors and, with other values, in" in refusal(
        directory
    )


@pytest.mark.parametrize("content", ["", "{", '{"weight_map": 3}', '{"weight_map": {}}', "[]", '{"weight_map": {"a": "../b"}}'])
def test_a_damaged_index(tmp_path: Path, weights: Weights, content: str) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    (directory / "model.safetensors.index.json").write_text(content)
    assert str(directory) in refusal(directory)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_configuration(tmp_path: Path, weights: Weights, content: str) -> None:
    directory = write_single(tmp_path, CONFIG, weights)
    (directory / "config.json").write_text(content)
    assert "config.json" in refusal(directory)


def test_no_configuration(tmp_path: Path, weights: Weights) -> None:
    directory = write_single(tmp_path, CONFIG, weights)
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


def test_shards_without_an_index(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    (directory / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(directory)


def test_an_already_quantized_model(tmp_path: Path, weights: Weights) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert 'already quantized (quantization_config: "gptq")' in refusal(write_single(tmp_path, config, weights))


def test_integer_weights_arerefusal(tmp_path: Path, weights: Weights) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    message = refusal(write_single(tmp_path, CONFIG, weights | {name: np.zeros(weights[name].shape, np.int8)}))
    assert f"{name} is int8" in message


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty")
    write_config(tmp_path / "bare", CONFIG)
    assert "holds no model" in refusal(tmp_path / "bare")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "quikjax.json").write_text("{}")
    assert "artifact of quikjax" in refusal(tmp_path / "own")
    (tmp_path / "file.txt").write_text("hello")
    assert "is not a model" in refusal(tmp_path / "file.txt")
