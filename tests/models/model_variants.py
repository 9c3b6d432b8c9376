"""Every published variant of every family, as a small random configuration. A family joins the common tests by its rows here.

Fields are spelled as the checkpoints they stand for publish them, harmless ones included, so that reading them is tested too.
This file and `random_weights.py` import NumPy only: `make_golden.py` runs where there is PyTorch and no JAX.
"""

from typing import Any

VOCABULARY = 64

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.33.1",
}
_OPT: dict[str, Any] = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "dropout": 0.1,
    "layerdrop": 0.0,
    "do_layer_norm_before": True,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "init_std": 0.02,
    "prefix": "</s>",
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "_remove_final_layer_norm": False,
}
_FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "apply_residual_connection_post_layernorm": False,
    "alibi": False,
    "bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "vocab_size": VOCABULARY,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
_LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama-1": {**_LLAMA, "rms_norm_eps": 1e-6, "pad_token_id": 0, "max_sequence_length": 256},
    "llama-2-70b": {**_LLAMA, "num_key_value_heads": 2, "pretraining_tp": 1, "rope_scaling": None, "attention_bias": False},
    "llama-3": {**_LLAMA, "num_key_value_heads": 1, "rope_theta": 500000.0, "rope_scaling": None, "mlp_bias": False},
    "llama-3.1": {
        **_LLAMA,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_SCALING, "rope_type": "llama3"},
        "eos_token_id": [2, 3, 4],
    },
    "llama-3.2-transformers-5": {
        **_LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA3_SCALING, "factor": 32.0, "rope_type": "llama3", "rope_theta": 10000.0},
        "dtype": "bfloat16",
    },
    "llama-wide-heads-and-biases": {**_LLAMA, "head_dim": 20, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama-linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 1024},
    "llama-linear-transformers-5": {
        **_LLAMA,
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 20000.0},
    },
    # 32 trained positions: the prompt and the generated text of the golden values go beyond them.
    "llama-dynamic": {**_LLAMA, "max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama-dynamic-transformers-5": {
        **_LLAMA,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 50000.0},
    },
    "llama-yarn": {
        **_LLAMA,
        "rope_scaling": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "finetuned": True},
    },
    "tinyllama": {**_LLAMA, "num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 1},
    "smollm2": {
        **_LLAMA,
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
}
