"""Checkpoints with random weights in a published shape, a shard a block, so that large ones too are written in little memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.testing import tiny_config, tiny_tokenizer


def write_checkpoint(directory: Path, **fields: Any) -> Path:
    """A LLaMA of `tiny_config(**fields)` in float16, as Hugging Face publishes it: config, shards with an index, a tokenizer."""
    directory.mkdir(parents=True)
    config = tiny_config(**fields)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shards: dict[str, list[str]] = {}
    leaves = dotted(pure_params(abstract_model(config)))
    for name in leaves:
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    rng = np.random.default_rng(0)
    places: dict[str, str] = {}
    for shard, names in shards.items():
        save_file({name: random_weight(rng, leaves[name].shape) for name in names}, directory / shard)
        places |= dict.fromkeys(names, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    tiny_tokenizer().save_pretrained(str(directory))
    return directory


def random_weight(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float16; norms near one, some of their columns large, as trained models have; matrices keep the scale of their input."""
    if len(shape) == 1:
        weight = 1 + 0.1 * rng.standard_normal(shape, np.float32)
        weight[rng.choice(shape[0], max(1, shape[0] // 64), replace=False)] *= 20
        return weight.astype(np.float16)
    return (rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[-1]))).astype(np.float16)
