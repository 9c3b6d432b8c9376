"""Every published variant of BART, as a small random configuration; as `model_variants.py`, which has the decoders.

This file imports nothing of ours: `make_bart_golden.py` runs where there is PyTorch and no JAX.
"""

from typing import Any

VOCABULARY = 64
_BART: dict[str, Any] = {
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "d_model": 48,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 80,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 2,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "length_penalty": 2.0,
    "max_position_embeddings": 64,
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "normalize_embedding": True,
    "num_hidden_layers": 2,
    "output_past": True,
    "pad_token_id": 1,
    "scale_embedding": False,
    "static_position_embeddings": False,
    "task_specific_params": {"summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12, "num_beams": 4}},
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "bart": {**_BART, "architectures": ["BartModel"], "gradient_checkpointing": False},
    "bart-summarizer": {**_BART, "forced_bos_token_id": 0, "prefix": " "},
    "bart-distilled": {
        **_BART,
        "activation_function": "gelu_new",
        "decoder_attention_heads": 6,
        "decoder_ffn_dim": 56,
        "decoder_layers": 1,
        "encoder_layers": 3,
        "extra_pos_embeddings": 2,
        "forced_bos_token_id": 5,
        "num_hidden_layers": 3,
        "scale_embedding": True,
    },
    "bart-classifier": {
        **_BART,
        "activation_function": "relu",
        "architectures": ["BartForSequenceClassification"],
        "id2label": {"0": "contradiction", "1": "neutral", "2": "entailment"},
        "label2id": {"contradiction": 0, "neutral": 1, "entailment": 2},
    },
}
