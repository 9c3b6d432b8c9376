"""Tiny random checkpoints as published, written by the tests themselves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quikjax.errors import QuikError
from quikjax.loading import match, open_source
from quikjax.models.registry import abstract_model

Weights = dict[str, np.ndarray]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128,
}

OPT_CONFIG: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 96,
    "hidden_size": 64,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "word_embed_proj_dim": 64,
}


def llama_weights(config: Mapping[str, Any] = CONFIG, seed: int = 0, dtype: Any = np.float32) -> Weights:
    """Random weights of a LLaMA under their published names, norms near one."""
    rng = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        shapes |= {
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.k_proj.weight": (narrow, hidden),
            f"{block}.self_attn.v_proj.weight": (narrow, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.post_attention_layernorm.weight": (hidden,),
            f"{block}.mlp.gate_proj.weight": (wide, hidden),
            f"{block}.mlp.up_proj.weight": (wide, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, wide),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: (rng.normal(size=shape) / 8 + (len(shape) == 1)).astype(np.float32).astype(dtype) for name, shape in shapes.items()
    }


def opt_weights(config: Mapping[str, Any] = OPT_CONFIG, seed: int = 0) -> Weights:
    """Random float32 weights of an OPT under their published names."""
    rng = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["ffn_dim"]
    dense = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden), "self_attn.v_proj": (hidden, hidden)}
    dense |= {"self_attn.out_proj": (hidden, hidden), "fc1": (wide, hidden), "fc2": (hidden, wide)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
        "model.decoder.final_layer_norm.weight": (hidden,),
        "model.decoder.final_layer_norm.bias": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        block = f"model.decoder.layers.{i}"
        for name, shape in dense.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{block}.{name}.weight": (hidden,), f"{block}.{name}.bias": (hidden,)}
    return {name: (rng.normal(size=shape) / 8).astype(np.float32) for name, shape in shapes.items()}


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))


def write_single(directory: Path, config: Mapping[str, Any], weights: Weights) -> Path:
    """`config.json` and `model.safetensors`."""
    write_config(directory, config)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_sharded(directory: Path, config: Mapping[str, Any], weights: Weights, shards: int = 3) -> Path:
    """`config.json`, an index, and the tensors dealt out over `shards` files."""
    write_config(directory, config)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i * shards // len(weights)] for i, tensor in enumerate(weights)}
    for name in names:
        save_file({tensor: weights[tensor] for tensor, shard in weight_map.items() if shard == name}, directory / name)
    index = {"metadata": {"total_size": sum(array.nbytes for array in weights.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def flax_tree(weights: Weights) -> dict[str, Any]:
    """OPT's weights as its Flax class named and laid them out, written down here apart from the library's own mapping."""
    tree: dict[str, Any] = {}
    for name, array in weights.items():
        *path, module, leaf = name.split(".")
        if leaf == "weight":
            if "embed" in module:
                leaf = "embedding"
            elif "norm" in module:
                leaf = "scale"
            else:
                leaf, array = "kernel", array.T.copy()
        node = tree
        for part in (*path, module):
            node = node.setdefault(part, {})
        node[leaf] = array
    return tree


def complaint(path: Path) -> str | None:
    """The sentence with which a checkpoint is refused before any tensor is read, or None when nothing is wrong with it."""
    try:
        source = open_source(path)
        match(source, abstract_model(source.config))
    except QuikError as problem:
        sentence = str(problem)
        if "\n" in sentence:
            raise AssertionError(f"more than one line: {sentence}") from problem
        return sentence
    return None


def refusal(path: Path) -> str:
    """`complaint` where there must be one."""
    sentence = complaint(path)
    if sentence is None:
        raise AssertionError(f"{path} was accepted")
    return sentence
