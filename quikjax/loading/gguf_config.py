"""GGUF metadata of the LLaMA architecture as the fields of a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from quikjax.errors import QuikError
from quikjax.loading.gguf_header import GGUFTensor

# Metadata of the architecture that is read below, or that does not change the mathematics.
_KNOWN = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
# LLaMA 3.1, 3.2 and 3.3 were all published with these; only their `factor` differs (8 and 32).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def published_config(
    where: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GGUFTensor],
    rope_factors: Float[np.ndarray, " pairs"] | None,
) -> dict[str, Any]:
    """The `config.json` of the model that the file was converted from, as far as its mathematics goes.

    Raises:
        QuikError: another architecture, a field that is missing, or one whose mathematics is not supported, by name.
    """
    # Before anything else: all parts but the first have next to no metadata.
    if metadata.get("split.count", 1) > 1:
        raise QuikError(
            f"{where}: this is one of {metadata['split.count']} parts of a model; join them with: llama-gguf-split --merge"
        )
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise QuikError(
            f'{where}: GGUF files of architecture "{architecture}" are not supported, only "llama"; use the safetensors that it '
            "was converted from"
        )
    fields = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    unknown = sorted(key for key in set(fields) - _KNOWN if key not in _NEUTRAL or fields[key] != _NEUTRAL[key])
    if unknown:
        raise QuikError(f"{where}: its metadata llama.{unknown[0]} is not known and may change the mathematics")
    if fields.get("expert_count"):
        raise QuikError(f"{where}: mixtures of experts (llama.expert_count = {fields['expert_count']}) are not supported")
    try:
        heads = _whole(where, fields, "attention.head_count")
        hidden = _whole(where, fields, "embedding_length")
        size = fields.get("attention.key_length", hidden // heads)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": _whole(where, fields, "feed_forward_length"),
            "num_hidden_layers": _whole(where, fields, "block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": _whole(where, {"attention.head_count_kv": heads, **fields}, "attention.head_count_kv"),
            "head_dim": size,
            "max_position_embeddings": fields["context_length"],
            "rms_norm_eps": _shortest(fields["attention.layer_norm_rms_epsilon"]),
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "rope_theta": _shortest(fields.get("rope.freq_base", 10000.0)),
        }
    except KeyError as missing:
        raise QuikError(f"{where}: its header lacks {missing}, without which the model cannot be rebuilt") from None
    if fields.get("attention.value_length", size) != size:
        raise QuikError(f"{where}: values of another size than keys (llama.attention.value_length) are not supported")
    if fields.get("rope.dimension_count", size) != size:
        raise QuikError(
            f"{where}: rotating only {fields['rope.dimension_count']} of a head's {size} numbers (llama.rope.dimension_count) "
            "is not supported"
        )
    scaling = _rope_scaling(where, fields, config, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    tokens = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    config |= {
        field: metadata[f"tokenizer.ggml.{name}_token_id"]
        for name, field in tokens.items()
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    return config


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `generation_config.json` that would stand beside the model: the tokens that begin a text, and all that end one.

    A file names up to three ends: of a text (`eos`), of a turn (`eot`) and of a message (`eom`).
    """
    named = {
        role: metadata[f"tokenizer.ggml.{role}_token_id"]
        for role in ("bos", "eos", "eot", "eom", "padding")
        if f"tokenizer.ggml.{role}_token_id" in metadata
    }
    ends = list(dict.fromkeys(named[role] for role in ("eos", "eot", "eom") if role in named))
    fields: dict[str, Any] = {"bos_token_id": named["bos"]} if "bos" in named else {}
    if ends:
        fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "padding" in named:
        fields["pad_token_id"] = named["padding"]
    return fields or None


# Metadata whose mathematics is not ours, and the value that means that it is switched off.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "pooling_type": 0,
    "residual_scale": 1.0,
    "use_parallel_residual": False,
}


def _whole(where: str, fields: Mapping[str, Any], key: str) -> int:
    """An integer field that must be the same in every block."""
    value = fields[key]
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise QuikError(f"{where}: blocks that differ in shape (llama.{key} is a list) are not supported")
    (one,) = values
    if not isinstance(one, int) or one < 1:
        raise QuikError(f"{where}: llama.{key} is {one!r}, where a positive integer is expected")
    return one


def _shortest(value: float) -> float:
    """The decimal number that was meant: GGUF keeps float32, so 1e-5 comes back as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    where: str, fields: Mapping[str, Any], config: Mapping[str, Any], factors: Float[np.ndarray, " pairs"] | None
) -> dict[str, Any] | None:
    kind = fields.get("rope.scaling.type", "linear" if "rope.scale_linear" in fields else "none")
    factor = _shortest(fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 1.0)))
    if _shortest(fields.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise QuikError(f"{where}: rotary scaling of the scores (llama.rope.scaling.attn_factor) is not supported")
    if kind not in ("none", "linear"):
        raise QuikError(f'{where}: rotary scaling "{kind}" (llama.rope.scaling.type) is not supported')
    linear = kind == "linear" and factor != 1.0
    if factors is None:
        return {"rope_type": "linear", "factor": factor} if linear else None
    # The file keeps only what each frequency is divided by. Find the published rule that gives exactly these divisors.
    llama3 = {"rope_type": "llama3", "factor": _shortest(float(factors.max())), **_LLAMA3}
    expected = llama3_divisors(config["rope_theta"], config["head_dim"], llama3)
    if linear or expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise QuikError(f"{where}: the rotary factors of its tensor rope_freqs.weight are not those of a LLaMA 3 model")
    return llama3


def llama3_divisors(theta: float, size: int, scaling: Mapping[str, Any]) -> Float[np.ndarray, " pairs"]:
    """Compute LLaMA 3's divisors of the `size / 2` rotary frequencies, float64.

    Waves shorter than `original / high_freq_factor` positions stay, those longer than `original / low_freq_factor` are slowed
    down by `factor`, and between the two the frequency is interpolated.
    """
    frequencies = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / scaling["factor"])
