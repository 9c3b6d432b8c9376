"""Checkpoints that tools left a little odd: wrapped names, tensors that nobody needs, pointers, other quantizers' weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
from loading_checkpoints import (
    CONFIG,
    OPT_CONFIG,
    Weights,
    complaint,
    flax_tree,
    llama_weights,
    opt_weights,
    refusal,
    write_config,
    write_sharded,
    write_single,
)
from safetensors.numpy import save_file

from quikjax.errors import QuikError
from quikjax.loading import load_params, open_source
from quikjax.models.registry import abstract_model, dotted

TIED = CONFIG | {"tie_word_embeddings": True}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 9\n"
SMALL = np.ones(4, np.float32)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return llama_weights()


def read(directory: Path) -> dict[str, np.ndarray]:
    source = open_source(directory)
    return {path: np.asarray(leaf) for path, leaf in dotted(load_params(source, abstract_model(source.config))).items()}


def assert_read(directory: Path, expected: Weights) -> None:
    found = read(directory)
    assert sorted(found) == sorted(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def renamed(weights: Weights, rename: Callable[[str], str]) -> Weights:
    return {rename(name): array for name, array in weights.items()}


WRAPPED: dict[str, Callable[[str], str]] = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "compiled blocks": lambda name: name.replace("self_attn.", "_orig_mod.self_attn."),
    "checkpointed blocks": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "a trainer's own class": lambda name: f"model.{name}",
    "none at all": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_names_are_read(tmp_path: Path, weights: Weights, rename: Callable[[str], str], sharded: bool) -> None:
    write = write_sharded if sharded else write_single
    assert_read(write(tmp_path, CONFIG, renamed(weights, rename)), weights)


def test_wrapped_names_of_flax_are_read(tmp_path: Path) -> None:
    weights = opt_weights()
    for number, rename in enumerate((WRAPPED["module"], WRAPPED["none at all"])):
        directory = tmp_path / str(number)
        write_config(directory, OPT_CONFIG)
        tree = flax_tree(renamed(weights, rename))
        (directory / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
        assert_read(directory, weights)


def test_two_names_of_one_tensor_are_told(tmp_path: Path, weights: Weights) -> None:
    twice = weights | {"module.model.norm.weight": weights["model.norm.weight"]}
    message = refusal(write_single(tmp_path, CONFIG, twice))
    assert "one tensor under two names, model.norm.weight and module.model.norm.weight" in message


HARMLESS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "module.model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.masked_bias",
    "model.layers.0.self_attn.rope.inv_freq",
]


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("shape", ["single", "listed and held", "listed only", "held only"])
def test_what_is_computed_is_passed_over_everywhere(tmp_path: Path, weights: Weights, name: str, shape: str) -> None:
    if shape == "single":
        assert_read(write_single(tmp_path, CONFIG, weights | {name: SMALL}), weights)
        return
    directory = write_sharded(tmp_path, CONFIG, weights if shape == "listed only" else weights | {name: SMALL})
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    if shape == "listed only":
        index["weight_map"][name] = "model-00002-of-00003.safetensors"
    if shape == "held only":
        del index["weight_map"][name]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_read(directory, weights)


@pytest.mark.parametrize("shape", ["single", "listed and held", "listed only", "held only"])
def test_a_tied_head_is_passed_over_everywhere(tmp_path: Path, shape: str) -> None:
    weights = llama_weights(TIED)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    if shape == "single":
        assert_read(write_single(tmp_path, TIED, weights | head), weights)
        return
    directory = write_sharded(tmp_path, TIED, weights if shape == "listed only" else weights | head)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if shape == "listed only":
        index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    if shape == "held only":
        del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    assert_read(directory, weights)


def test_a_head_that_is_needed_is_missed(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, {name: array for name, array in weights.items() if name != "lm_head.weight"})
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    assert "lacks 1 tensor (lm_head.weight)" in refusal(directory)


def test_a_head_that_the_index_leaves_out_is_read(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    assert_read(directory, weights)


@pytest.mark.parametrize("spelling", ["./{}", "././{}", "weights/{}", "./weights/{}", ".\\weights\\{}"])
def test_shards_spelled_as_paths(tmp_path: Path, weights: Weights, spelling: str) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    if "weights" in spelling:
        (directory / "weights").mkdir()
        for shard in directory.glob("model-*.safetensors"):
            shard.rename(directory / "weights" / shard.name)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: spelling.format(shard) for name, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    assert_read(directory, weights)


@pytest.mark.parametrize("shard", ["../model-00001-of-00003.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_shards_outside_the_directory_are_refused(tmp_path: Path, weights: Weights, shard: str) -> None:
    directory = write_sharded(tmp_path / "model", CONFIG, weights)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(weights, shard)}))
    assert f"names {shard}, which is outside its directory" in refusal(directory)


def test_a_stray_file_beside_shards_is_named(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    save_file({"model.norm.weight": SMALL}, directory / "model.safetensors")
    message = refusal(directory)
    assert "(read from model.safetensors, not from the shards of model.safetensors.index.json beside it) lacks 20" in message
    (directory / "model.safetensors").unlink()
    assert complaint(directory) is None


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "model.gguf", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_that(tmp_path: Path, weights: Weights, name: str) -> None:
    if name in ("config.json", "tokenizer.json"):
        write_single(tmp_path, CONFIG, weights)
    elif name != "model.gguf":
        write_config(tmp_path, OPT_CONFIG)
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(QuikError, match=rf"{name} is a git-lfs pointer, not the file itself; fetch it with: git lfs pull"):
        open_source(tmp_path).tokenizer()


def test_a_link_to_a_file_that_is_gone_is_called_that(tmp_path: Path, weights: Weights) -> None:
    """As in a hub cache of which somebody deleted the blobs."""
    directory = write_single(tmp_path, CONFIG, weights)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("../blobs/0")
    assert "model.safetensors is a link to a file that is gone; download the model again" in refusal(directory)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors"])
def test_weights_under_another_name_are_named(tmp_path: Path, weights: Weights, name: str) -> None:
    directory = write_single(tmp_path, CONFIG, weights)
    (directory / "model.safetensors").rename(directory / name)
    assert f"neither model.safetensors nor its index, but {name}; if that is the model, rename it" in refusal(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_part_of_a_directory_is_called_that(tmp_path: Path, weights: Weights, name: str) -> None:
    with pytest.raises(QuikError, match=f"{name} is a part of a model; give the directory that it is in"):
        open_source(write_sharded(tmp_path, CONFIG, weights) / name)


def test_a_shard_that_is_a_pointer_is_called_that(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    (directory / "model-00002-of-00003.safetensors").write_bytes(LFS)
    assert "model-00002-of-00003.safetensors is a git-lfs pointer" in refusal(directory)


LAYER = "model.layers.0.mlp.up_proj"
WORDS = np.zeros((96, 8), np.int32)
QUANTIZED: dict[str, tuple[dict[str, Any], Weights]] = {
    'quantization_config: "gptq"': ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}),
    'quantization_config: "bitsandbytes"': ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, {}),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, {}),
    "MLX: it holds": ({}, {f"{LAYER}.weight": WORDS, f"{LAYER}.scales": SMALL, f"{LAYER}.biases": SMALL}),
    "GPTQ: it holds": ({}, {f"{LAYER}.qweight": WORDS, f"{LAYER}.qzeros": WORDS, f"{LAYER}.g_idx": WORDS}),
    "AWQ: it holds": ({}, {f"{LAYER}.qweight": WORDS, f"{LAYER}.qzeros": WORDS, f"{LAYER}.scales": SMALL}),
    "bitsandbytes: it holds": ({}, {f"{LAYER}.weight": WORDS, f"{LAYER}.weight.absmax": SMALL}),
    "compressed-tensors: it holds": ({}, {f"{LAYER}.weight_packed": WORDS, f"{LAYER}.weight_scale": SMALL}),
    "FP8: it holds": ({}, {f"{LAYER}.weight": WORDS, f"{LAYER}.weight_scale_inv": SMALL}),
}


@pytest.mark.parametrize("called", QUANTIZED)
def test_a_quantized_checkpoint_is_called_by_its_tool(tmp_path: Path, weights: Weights, called: str) -> None:
    fields, tensors = QUANTIZED[called]
    rest = {name: array for name, array in weights.items() if not tensors or name != f"{LAYER}.weight"}
    message = refusal(write_single(tmp_path, CONFIG | fields, rest | tensors))
    assert f"is already quantized ({called}" in message
    assert "give the original model" in message


def test_an_adapter_is_called_that(tmp_path: Path, weights: Weights) -> None:
    adapter = {f"base_model.model.{LAYER}.lora_A.weight": np.ones((4, 64), np.float32)}
    assert "an adapter's weights" in refusal(write_single(tmp_path / "merged", CONFIG, weights | adapter))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "adapter_config.json").write_text("{}")
    save_file(adapter, tmp_path / "alone" / "adapter_model.safetensors")
    assert "is an adapter (adapter_config.json), not a model" in refusal(tmp_path / "alone")


def test_a_byte_order_mark_before_a_configuration_or_an_index(tmp_path: Path, weights: Weights) -> None:
    directory = write_sharded(tmp_path, CONFIG, weights)
    for name in ("config.json", "model.safetensors.index.json"):
        (directory / name).write_bytes(b"\xef\xbb\xbf" + (directory / name).read_bytes())
    assert complaint(directory) is None
    (directory / "config.json").write_bytes(json.dumps(CONFIG | {"_name_or_path": "café"}, ensure_ascii=False).encode("latin-1"))
    assert "config.json is not UTF-8 text" in refusal(directory)
    (directory / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16"))
    assert "config.json is UTF-16 text; save it as UTF-8" in refusal(directory)
