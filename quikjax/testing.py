"""A tiny model and tokenizer, for tests and for trying things without weights. Nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from quikjax.files import user_path
from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model, dotted, nested, pure_params

END = "<|end|>"


def tiny_config(**fields: Any) -> dict[str, Any]:
    """A published configuration of a LLaMA with 3 blocks of width 64 that reads bytes; `fields` replace its own."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 256,
        **fields,
    }


def tiny_weights(seed: int = 0, **fields: Any) -> dict[str, np.ndarray]:
    """Random float32 weights for `tiny_config(**fields)`, by published name.

    Norms have a few large entries, as trained models do: some columns of every normalized activation are outliers.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, leaf in sorted(dotted(pure_params(abstract_model(tiny_config(**fields)))).items()):
        if len(leaf.shape) == 1:
            weight = 1 + 0.1 * rng.standard_normal(leaf.shape)
            weight[rng.choice(leaf.shape[0], 2, replace=False)] *= 25
        else:
            weight = rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[1])
        weights[name] = weight.astype(np.float32)
    return weights


def tiny_model(seed: int = 0, *, dtype: Any = jnp.float32, **fields: Any) -> CausalLM:
    """A random LLaMA of `tiny_config(**fields)`."""
    model = abstract_model(tiny_config(**fields), dtype)
    params = {name: jnp.asarray(weight, dtype) for name, weight in tiny_weights(seed, **fields).items()}
    return nnx.merge(nnx.split(model)[0], nested(params))


def tiny_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes and `END`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from quikjax.loading.tokenizer import import_transformers

    # Byte-level BPE without merges; its alphabet has one printable character per byte.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END])
    return import_transformers().PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END)


def write_tiny_checkpoint(directory: str | Path, seed: int = 0, *, tokenizer: bool = True, **fields: Any) -> Path:
    """A directory as Hugging Face publishes it: `config.json`, `model.safetensors`, and the tokenizer's files."""
    from safetensors.numpy import save_file

    directory = user_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny_config(**fields), indent=2), encoding="utf-8")
    save_file(tiny_weights(seed, **fields), directory / "model.safetensors")
    if tokenizer:
        tiny_tokenizer().save_pretrained(str(directory))
    return directory
