"""Tiny models and a tokenizer, for tests and for trying things without weights. Nothing is downloaded.

`tiny_model` is random. `chain_model` is made by hand: it says a fixed successor of each token, so its right output is known.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from quikjax.files import user_path
from quikjax.models.base import CausalLM, Transformer
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_model

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
    return checked_model(nnx.merge(nnx.split(model)[0], nested(params)))


@nnx.jit
def forward(model: Transformer, *inputs: Any) -> Array:
    """`model(*inputs)` as one program. Called plainly, a model compiles each of its operations by itself, a hundred programs."""
    return model(*inputs)


def chain_config(successors: Sequence[int], **fields: Any) -> dict[str, Any]:
    """The published configuration of `chain_model(successors)`: no end token, a context of 64; `fields` replace its own."""
    width = len(successors) + len(successors) % 2  # rotary positions want an even head
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(successors),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **fields,
    }


def chain_weights(successors: Sequence[int]) -> dict[str, np.ndarray]:
    """The float32 weights of `chain_model(successors)`, by published name.

    The embedding of token `t` is the unit vector `t`. Every matrix of the one block is zero, so the block adds nothing, and the
    head gives a unit vector `t` one positive logit, at `successors[t]`.

    Raises:
        ValueError: a successor is outside the vocabulary, which has as many tokens as there are successors.
    """
    if not all(0 <= token < len(successors) for token in successors):
        raise ValueError(f"successors must be tokens of a vocabulary of {len(successors)}")
    shapes = {name: leaf.shape for name, leaf in dotted(pure_params(abstract_model(chain_config(successors)))).items()}
    weights = {name: np.full(shape, len(shape) == 1, np.float32) for name, shape in shapes.items()}
    tokens = np.arange(len(successors))
    weights["model.embed_tokens.weight"][tokens, tokens] = 1
    weights["lm_head.weight"][np.asarray(successors), tokens] = 1
    return weights


def chain_model(successors: Sequence[int], *, dtype: Any = jnp.float32, **fields: Any) -> CausalLM:
    """A LLaMA that continues a text by `successors[last token]`, whatever stands before it.

    Its own output follows by counting: after `t` come `successors[t]`, `successors[successors[t]]` and so on. `fields` replace
    those of `chain_config`, such as `eos_token_id`.
    """
    model = abstract_model(chain_config(successors, **fields), dtype)
    params = {name: jnp.asarray(weight, dtype) for name, weight in chain_weights(successors).items()}
    return checked_model(nnx.merge(nnx.split(model)[0], nested(params)))


def write_chain_checkpoint(directory: str | Path, successors: Sequence[int], **fields: Any) -> Path:
    """`chain_model(successors, **fields)` as Hugging Face publishes a model: `config.json`, `model.safetensors`; no tokenizer."""
    return _write_checkpoint(directory, chain_config(successors, **fields), chain_weights(successors))


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
    directory = _write_checkpoint(directory, tiny_config(**fields), tiny_weights(seed, **fields))
    if tokenizer:
        tiny_tokenizer().save_pretrained(str(directory))
    return directory


def _write_checkpoint(directory: str | Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    directory = user_path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
