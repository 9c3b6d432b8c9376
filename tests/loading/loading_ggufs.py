"""Tiny GGUF files, written with the `gguf` package as llama.cpp's converter does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from loading_checkpoints import CONFIG, Weights

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a published tensor."""
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, block, inner = stem.split(".", 3)
        return f"blk.{block}.{_NAMES[inner]}.{leaf}"
    return f"{_NAMES[stem]}.{leaf}"


def rotary_pairs(array: np.ndarray, heads: int) -> np.ndarray:
    """The converter's reordering of query and key rows: row `half * size/2 + i` of a head becomes row `2 i + half`."""
    rows = np.arange(len(array)).reshape(heads, -1)
    half = rows.shape[1] // 2
    order = [row[part * half + i] for row in rows for i in range(half) for part in (0, 1)]
    return array[order]


def rounded(weights: Weights, kind: str) -> Weights:
    """What is left of each tensor when matrices are stored as `kind` and vectors as float32."""
    target = gguf.GGMLQuantizationType[kind]
    return {
        name: array if array.ndim == 1 else gguf.dequantize(gguf.quantize(array, target), target).reshape(array.shape)
        for name, array in weights.items()
    }


def write_gguf(
    path: Path,
    weights: Weights,
    kind: str = "F32",
    config: Mapping[str, Any] = CONFIG,
    extra: Mapping[str, Any] | None = None,
    tensors: Weights | None = None,
    raw: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """A LLaMA GGUF file: matrices as `kind`, vectors as float32; `extra` overrides metadata, `tensors` are added as they are.

    `raw` names the block format of those that hold one.
    """
    writer = gguf.GGUFWriter(path, "llama")
    metadata: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        **(extra or {}),
    }
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for key, value in (tokenizer or {}).items():
        writer.add_key_value(f"tokenizer.{key}", value, *_value_type(value))
    target = gguf.GGMLQuantizationType[kind]
    for name, array in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            array = rotary_pairs(array, config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"])
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(array, target), raw_dtype=target)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[raw[name]] if raw and name in raw else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _value_type(value: Any) -> tuple[Any, ...]:
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        return (kinds.BOOL,)
    if isinstance(value, list):
        inner = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
        return (kinds.ARRAY, inner)
    return (kinds.UINT32 if isinstance(value, int) else kinds.STRING,)
