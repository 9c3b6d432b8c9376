"""Reading a published `config.json`: a family asks for every field it knows, and what nobody asked for is refused.

A configuration states the mathematics of a checkpoint. A field that is silently ignored (a scaling, a window, another norm) gives
a model that runs and is wrong, so only fields known to leave the logits alone may pass unread.
"""

from collections.abc import Mapping
from typing import Any

from quikjax.errors import QuikError

# Fields of transformers' base configuration and of publishers' tools that do not change what a forward pass computes.
_HARMLESS = frozenset(
    # Where it comes from.
    ["_name_or_path", "_commit_hash", "name_or_path", "architectures", "auto_map", "custom_pipelines", "model_type"]
    + ["transformers_version", "transformers.js_config", "tokenizer_class", "unsloth_fixed", "unsloth_version", "is_llama_config"]
    # The storage type, and which code of PyTorch's computes it.
    + ["torch_dtype", "dtype", "use_bfloat16", "torchscript", "_attn_implementation", "_attn_implementation_autoset"]
    + ["attn_implementation", "_flash_attn_2_enabled", "use_cache", "cache_implementation", "chunk_size_feed_forward"]
    # The products are only cut differently.
    + ["pretraining_tp"]
    # Special tokens: the tokenizer's and the generator's.
    + [f"{name}_token_id" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "decoder_start")]
    + ["prefix"]
    # Training.
    + ["initializer_range", "init_std", "attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "layerdrop"]
    + ["resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout", "residual_dropout", "classifier_dropout"]
    + ["gradient_checkpointing"]
    # What a call returns; heads for other tasks.
    + ["output_attentions", "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate"]
    + ["id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "is_decoder", "tf_legacy_loss"]
    # Decoding defaults, which older versions kept here.
    + ["max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"]
    + ["temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"]
    + ["encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"]
    + ["forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"]
    + ["begin_suppress_tokens"]
)


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

    def finish(self) -> None:
        """Refuse what was not asked for and is not known to be harmless.

        Raises:
            QuikError: naming those fields; or that the checkpoint is already quantized, or no decoder.
        """
        if not self._prefix:
            quantized = self.optional("quantization_config")
            if quantized is not None:
                method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
                raise QuikError(f'the checkpoint is already quantized (method "{method}"); give the original, unquantized one')
            self.only("is_encoder_decoder", False)
            self.only("add_cross_attention", False)
            self.only("cross_attention_hidden_size", None)
            self.only("tie_encoder_decoder", False)
            self.only("pruned_heads", {})
        unknown = sorted(self._fields.keys() - self._asked - _HARMLESS)
        if unknown:
            names = ", ".join(self._prefix + name for name in unknown)
            raise QuikError(
                f"{self.family} does not know the configuration's {names}, which may change its mathematics: remove the field "
                "if it does not, or use a version of quikjax that knows it"
            )

    def _wrong(self, name: str, value: Any, expected: str) -> QuikError:
        return QuikError(f"the model's configuration has {self._prefix}{name} = {value!r}, which should be {expected}")
