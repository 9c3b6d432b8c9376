"""Flax checkpoints of OPT: the tensors of the PyTorch form, read lazily, with damage found by walking the layout."""

import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from loading_checkpoints import OPT_CONFIG, Weights, complaint, flax_tree, opt_weights, refusal, write_config, write_single

from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.loading.msgpack_header import read_layout


@pytest.fixture(scope="module")
def weights() -> Weights:
    return opt_weights()


def _write(directory: Path, weights: Weights) -> Path:
    write_config(directory, OPT_CONFIG)
    (directory / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(flax_tree(weights)))
    return directory


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_tensor_is_the_pytorch_one(tmp_path: Path, weights: Weights, dtype: Any) -> None:
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    source = open_source(_write(tmp_path, weights))
    assert set(source.names()) == set(weights)
    for name, array in weights.items():
        read = source.read(name)
        assert (source.shape(name), source.dtype(name), read.dtype) == (array.shape, array.dtype, array.dtype)
        assert np.array_equal(read, array), name


def test_the_same_logits_as_from_safetensors(tmp_path: Path, weights: Weights) -> None:
    ids = jnp.arange(12).reshape(2, 6)
    flax_model, _ = load(_write(tmp_path / "flax", weights))
    torch_model, _ = load(write_single(tmp_path / "torch", OPT_CONFIG, weights))
    logits = flax_model(ids)
    assert np.array_equal(logits, torch_model(ids))
    assert float(jnp.std(logits)) > 0.1


def test_arrays_cut_into_chunks(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flax cuts what is larger than a gigabyte; here, larger than 5000 bytes."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 5000)
    directory = _write(tmp_path, weights)
    layout = read_layout(directory / "flax_model.msgpack")
    assert len(layout["model.decoder.embed_tokens.embedding"].pieces) == 7  # 32768 bytes
    source = open_source(directory)
    assert all(np.array_equal(source.read(name), array) for name, array in weights.items())


def test_shards(tmp_path: Path, weights: Weights) -> None:
    write_config(tmp_path, OPT_CONFIG)
    tree = flax_tree(weights)["model"]["decoder"]
    shards = {
        "flax_model-00001-of-00002.msgpack": {"model": {"decoder": {"layers": tree["layers"]}}},
        "flax_model-00002-of-00002.msgpack": {"model": {"decoder": {k: v for k, v in tree.items() if k != "layers"}}},
    }
    weight_map: dict[str, str] = {}
    for shard, part in shards.items():
        (tmp_path / shard).write_bytes(flax.serialization.to_bytes(part))
        weight_map |= {path.replace(".", "/"): shard for path in read_layout(tmp_path / shard)}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    source = open_source(tmp_path)
    assert all(np.array_equal(source.read(name), array) for name, array in weights.items())
    first, second = (tmp_path / shard for shard in shards)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert "the shards are swapped" in refusal(tmp_path)


def test_truncation_anywhere(tmp_path: Path, weights: Weights) -> None:
    path = _write(tmp_path, weights) / "flax_model.msgpack"
    whole = path.read_bytes()
    places = {0, 1, 2, 5, 20, 60, 100, len(whole) - 1, *np.random.default_rng(0).integers(0, len(whole), 60).tolist()}
    for size in sorted(places):
        path.write_bytes(whole[:size])
        message = refusal(tmp_path)
        assert "truncated" in message or "empty" in message, size
    path.write_bytes(whole + b"\xc0")
    assert "1 bytes follow its end" in refusal(tmp_path)


def test_flipped_structure_is_found_or_harmless(tmp_path: Path, weights: Weights) -> None:
    path = _write(tmp_path, weights) / "flax_model.msgpack"
    whole = path.read_bytes()
    found = 0
    for bit in range(0, 8 * 60, 7):  # the first keys, and the head of the first array
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if complaint(tmp_path) is not None:
            found += 1
        else:
            source = open_source(tmp_path)
            assert {name: source.shape(name) for name in source.names()} == {name: a.shape for name, a in weights.items()}
    assert found > 60


def test_other_contents(tmp_path: Path) -> None:
    write_config(tmp_path, OPT_CONFIG)
    for tree in ([1, 2], {"model": 3}, {"model": {"a": "text"}}, {"model": {"a": 1j}}):
        (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
        assert "not a readable Flax checkpoint" in refusal(tmp_path)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path, weights: Weights) -> None:
    name = "model.decoder.layers.1.fc2.weight"
    bad = weights[name].copy()
    bad[3, 4] = np.nan
    with pytest.raises(QuikError, match=f"{name} holds 1 values"):
        load(_write(tmp_path, weights | {name: bad}))


def test_a_kernel_of_the_wrong_shape(tmp_path: Path, weights: Weights) -> None:
    name = "model.decoder.layers.0.fc1.weight"
    message = refusal(_write(tmp_path, weights | {name: weights[name].T.copy()}))
    assert f"{name} is [64, 96] where the configuration asks for [96, 64]" in message


def test_other_families_are_refused(tmp_path: Path, weights: Weights) -> None:
    directory = _write(tmp_path, weights)
    (directory / "config.json").write_text(json.dumps(OPT_CONFIG | {"model_type": "falcon"}))
    assert 'Flax weights of a "falcon" model are not supported' in refusal(directory)
