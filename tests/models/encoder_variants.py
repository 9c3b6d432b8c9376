"""Every published variant of the encoders, as a small random configuration; as `model_variants.py`, which has the decoders.

This file imports NumPy only, if anything: `make_encoder_golden.py` runs where there is PyTorch and no JAX.
"""

from typing import Any

VOCABULARY = 64
_LABELS: dict[str, Any] = {
    "id2label": {"0": "negative", "1": "neutral", "2": "positive"},
    "label2id": {"negative": 0, "neutral": 1, "positive": 2},
}
_BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.8.2",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
_ROBERTA: dict[str, Any] = {
    **_BERT,
    "model_type": "roberta",
    "architectures": ["RobertaModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
}
_DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert",
    "architectures": ["DistilBertModel"],
    "activation": "gelu",
    "attention_dropout": 0.1,
    "dim": 48,
    "dropout": 0.1,
    "hidden_dim": 80,
    "initializer_range": 0.02,
    "max_position_embeddings": 64,
    "n_heads": 4,
    "n_layers": 2,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "vocab_size": VOCABULARY,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "minilm": {**_BERT, "num_attention_heads": 12},
    "bert-multilingual": {
        **_BERT,
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "type_vocab_size": 3,
    },
    "bert-masked-lm": {**_BERT, "architectures": ["BertForMaskedLM"], "hidden_act": "gelu_new"},
    "bert-classifier": {**_BERT, **_LABELS, "architectures": ["BertForSequenceClassification"], "problem_type": None},
    "bert-cross-encoder": {
        **_BERT,
        "architectures": ["BertForSequenceClassification"],
        "hidden_act": "relu",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
    },
    "bert-tagger": {**_BERT, **_LABELS, "architectures": ["BertForTokenClassification"]},
    "roberta": _ROBERTA,
    "roberta-masked-lm": {**_ROBERTA, "architectures": ["RobertaForMaskedLM"], "hidden_act": "gelu_new"},
    "roberta-classifier": {**_ROBERTA, **_LABELS, "architectures": ["RobertaForSequenceClassification"]},
    "roberta-tagger": {**_ROBERTA, **_LABELS, "architectures": ["RobertaForTokenClassification"]},
    "xlm-roberta": {**_ROBERTA, "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "output_past": True},
    "camembert-masked-lm": {**_ROBERTA, "model_type": "camembert", "architectures": ["CamembertForMaskedLM"]},
    "distilbert": _DISTILBERT,
    "distilbert-masked-lm": {**_DISTILBERT, "architectures": ["DistilBertForMaskedLM"], "activation": "relu"},
    "distilbert-classifier": {**_DISTILBERT, **_LABELS, "architectures": ["DistilBertForSequenceClassification"]},
    "distilbert-tagger": {**_DISTILBERT, **_LABELS, "architectures": ["DistilBertForTokenClassification"]},
}
