"""Byte-level BPE (GPT-2, OPT, LLaMA 3, SmolLM): a text is cut by a rule, its bytes become letters, and merges join them."""

from collections.abc import Callable, Mapping
from typing import Any


def build_byte_level(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], split: str) -> Any:
    """A `tokenizers.Tokenizer` that cuts texts by the rule `split` of `SPLITS`; without BOS and EOS.

    Raises:
        ValueError: the merges do not fit the vocabulary.
    """
    import tokenizers
    from tokenizers import decoders, models

    try:
        # LLaMA 3 published `ignore_merges`: a whole word that is a token is taken before any merge.
        model = models.BPE(dict(vocabulary), merges, ignore_merges=SPLITS[split] is _llama3_split)
    except Exception as problem:  # tokenizers raises bare Exception
        raise ValueError(f"its tokenizer's merges do not fit its vocabulary ({problem})") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_split(*, add_prefix_space: bool = False) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)


def _smollm_split() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _regex_split(*patterns: str) -> Any:
    """Each pattern cuts what the one before it left, matches and gaps alike; then bytes become letters."""
    import tokenizers
    from tokenizers import pre_tokenizers

    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _llama3_split() -> Any:
    return _regex_split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _default_split() -> Any:
    """Llama.cpp's own rule, for files whose converter did not know the model's."""
    return _regex_split(
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )


# How text is cut, by GGUF's names for the rules (`tokenizer.ggml.pre`); several names for one rule are llama.cpp's.
SPLITS: dict[str, Callable[[], Any]] = {
    "default": _default_split,
    "gpt-2": _gpt2_split,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _llama3_split),
    "smollm": _smollm_split,
}


def adds_bos(split: str) -> bool:
    """Whether models that cut text by this rule put BOS in front of it where their file does not say: LLaMA 3 does."""
    return SPLITS.get(split) is _llama3_split
