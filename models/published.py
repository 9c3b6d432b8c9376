"""Reading a published `config.json`: a family asks for every field it knows, and what nobody asked for is refused.

A configuration states the mathematics of a checkpoint. A field that is silently ignored (a scaling, a window, another norm) gives
a model that runs and is wrong, so only fields known to leave the logits alone may pass unread.
"""

from collections.abc import Mapping
from typing import Any

from quikjax.errors import QuikError

# Fields of transformers' base configuration and of publishers' tools that do not change what a forward pass computes.
_HARMLESS = frozenset(
    # Where it comes from, and what publishing tools note.
    ["_name_or_path", "_commit_hash", "name_or_path", "architectures", "auto_map", "custom_pipelines", "model_type"]
    + ["transformers_version", "transformers.js_config", "tokenizer_class", "unsloth_fixed", "unsloth_version", "is_llama_config"]
    + ["unsloth_pretrained", "model_name", "model_version", "license", "trust_remote_code", "transformers_weights"]
    + ["original_repo", "_diffusers_version", "quantization_config", "quantization"]  # these two are looked at in `finish`
    + ["base_model_tp_plan", "base_model_pp_plan", "tp_plan", "pp_plan"]
    # The storage type, and which code of PyTorch's computes it.
    + ["torch_dtype", "dtype", "use_bfloat16", "torchscript", "_attn_implementation", "_attn_implementation_autoset"]
    + ["attn_implementation", "_flash_attn_2_enabled", "use_cache", "cache_implementation", "chunk_size_feed_forward"]
    + ["_experts_implementation", "fp16", "bf16", "fp32", "use_flash_attn", "use_flash_attention", "flash_attn", "use_sdpa"]
    # The products are only cut differently.
    + ["pretraining_tp"]
    # Special tokens: the tokenizer's and the generator's.
    + [f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")]
    + [f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")]
    + ["prefix", "padding_side", "truncation_side", "ignore_index", "add_bos_token", "add_eos_token", "chat_template"]
    # How long training sequences were. What positions reach is said by max_position_embeddings and its scaling.
    + ["model_max_length", "tokenizer_model_max_length", "max_seq_len", "max_seq_length", "seq_length", "seq_len"]
    + ["max_train_seq_len", "train_seq_len"]
    # Training.
    + ["initializer_range", "init_std", "attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "layerdrop"]
    + ["resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout", "residual_dropout", "classifier_dropout"]
    + ["gradient_checkpointing", "gradient_checkpointing_kwargs", "neftune_noise_alpha", "attention_probs_dropout_prob"]
    + ["hidden_dropout_prob", "emb_dropout_prob", "label_smoothing", "z_loss"]
    # What a call returns; heads for other tasks.
    + ["output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate"]
    + ["id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "is_decoder", "tf_legacy_loss"]
    + ["num_labels", "_num_labels", "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"]
    + ["summary_proj_to_labels"]
    # Decoding defaults, which older versions kept here.
    + ["max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"]
    + ["temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"]
    + ["encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"]
    + ["forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"]
    + ["begin_suppress_tokens", "max_new_tokens", "min_new_tokens", "max_time", "num_assistant_tokens"]
)

# Types of models that give every token a vector and predict none: those of the registry's encoders.
ENCODERS = frozenset(["bert", "camembert", "distilbert", "roberta", "xlm-roberta"])
# Types of models that read one text and write another.
ENCODER_DECODERS = frozenset(["bart", "mbart"])


def quantized_by(fields: Mapping[str, Any]) -> str | None:
    """The method that weights were quantized with, as configured, or `None`: an empty section, or one of zeros, is nothing."""
    section, short = fields.get("quantization_config"), fields.get("quantization")
    if short:  # MLX writes this name, and newer versions of it both
        return "MLX" if isinstance(short, Mapping) else f'quantization: "{short}"'
    if not section:
        return None
    if not isinstance(section, Mapping):
        return f'quantization_config: "{section}"'
    method = section.get("quant_method", section.get("quant_algo"))
    loads = [section[name] for name in ("load_in_4bit", "load_in_8bit") if name in section]
    if method in (None, "bitsandbytes") and loads and not any(loads):
        return None
    if method is None and all(not value for value in section.values()):
        return None
    return f'quantization_config: "{method or "unnamed"}"'


class Fields:
    """The fields of one configuration. A `null` is the same as a field left out, as in transformers.

    Every reader raises `QuikError`, naming `family` and the field, when the field is missing without a default or has a value
    of the wrong kind. Call `finish` once all are read.
    """

    def __init__(self, fields: Mapping[str, Any], family: str, prefix: str = "") -> None:
        self.family = family
        self._prefix = prefix
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._asked: set[str] = set()

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.optional(name, default)
        if value is None:
            raise QuikError(f"the model's configuration has no field {self._prefix}{name}, which {self.family} needs")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._wrong(name, value, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.optional(name, default)
        if value is None:
            raise QuikError(f"the model's configuration has no field {self._prefix}{name}, which {self.family} needs")
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.optional(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> "Fields | None":
        """The fields of a nested object; `None` where it is left out or empty. It has its own `finish`."""
        value = self.optional(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object with fields")
        return Fields(value, self.family, f"{self._prefix}{name}.") if value else None

    def optional(self, name: str, default: Any = None) -> Any:
        """The value as it stands, or `default`."""
        self._asked.add(name)
        return self._fields.get(name, default)

    def only(self, name: str, *values: Any) -> None:
        """Refuse a field whose value, if it is there, is none of `values`: another value is mathematics we do not have."""
        value = self.optional(name, values[0])
        if value not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise QuikError(f"{self.family} with {self._prefix}{name} {value!r} is not supported, only {allowed}")

    def only_architectures(self, *names: str) -> None:
        """Refuse a model that was published as other classes than `names`: it has another head. None named is the usual one."""
        given = self.optional("architectures")
        listed = [given] if isinstance(given, str) else list(given or [])
        if listed and not any(name in names for name in listed):
            raise QuikError(f"{self.family} as {', '.join(map(str, listed))} is not supported, only as {' or '.join(names)}")

    def finish(self, *, causal: bool = True, encoder_decoder: bool = False) -> None:
        """Refuse what was not asked for and is not known to be harmless. Without `causal`, the model is an encoder.

        Raises:
            QuikError: naming those fields; or that the checkpoint is already quantized, or of another kind of model.
        """
        if not self._prefix:
            method = quantized_by(self._fields)
            if method is not None:
                raise QuikError(f"the checkpoint is already quantized ({method}); give the original, unquantized one")
            self.only("is_encoder_decoder", encoder_decoder)
            self.only("add_cross_attention", False)
            self.only("cross_attention_hidden_size", None)
            self.only("tie_encoder_decoder", False)
            self.only("pruned_heads", {})
            self.only("is_causal", causal)
            if not causal:
                self.only("is_decoder", False)
            self._refuse_windows()
        unknown = sorted(self._fields.keys() - self._asked - _HARMLESS)
        if unknown:
            names = ", ".join(self._prefix + name for name in unknown)
            raise QuikError(
                f"{self.family} does not know the configuration's {names}, which may change its mathematics: remove the field "
                "if it does not, or use a version of quikjax that knows it"
            )

    def _refuse_windows(self) -> None:
        """Every block attends to all tokens before: a window that is switched off, or as long as the context, is none."""
        self.only("use_sliding_window", False)
        kinds = self.optional("layer_types", [])
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise QuikError(f"{self.family} with layer_types other than full_attention is not supported")
        self.optional("max_window_layers")  # where windows would begin
        if "use_sliding_window" in self._fields:
            self.optional("sliding_window")  # the window that is switched off

    def _wrong(self, name: str, value: Any, expected: str) -> QuikError:
        return QuikError(f"the model's configuration has {self._prefix}{name} = {value!r}, which should be {expected}")
