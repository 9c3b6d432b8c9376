"""A GGUF file's tokenizer, rebuilt with `tokenizers` from the metadata alone. `transformers` itself would need PyTorch for it.

Two kinds exist for LLaMA: "gpt2", byte-level BPE whose way of splitting text is named by `tokenizer.ggml.pre`, and "llama",
SentencePiece BPE whose merges follow from the pieces' scores. A name that is not known is refused: a wrong split gives wrong
tokens without any other sign.
"""

import enum
from collections.abc import Callable, Mapping
from typing import Any

from quikjax.errors import QuikError, did_you_mean
from quikjax.loading.tokenizer import import_transformers

_PREFIX = "tokenizer.ggml."
_SPACE = "▁"  # how SentencePiece writes a space


class _Kind(enum.IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def rebuild_tokenizer(where: str, metadata: Mapping[str, Any]) -> Any | None:
    """The file's tokenizer as a `transformers.PreTrainedTokenizerFast`, or None where its metadata has none.

    Raises:
        QuikError: a kind or a split that is not known, or metadata that contradicts itself.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None or kind == "none":
        return None
    builders: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise QuikError(f'{where}: tokenizers of kind "{kind}" cannot be rebuilt; {did_you_mean(str(kind), builders)}')
    try:
        tokenizer = builders[kind](where, metadata)
        tokens: list[str] = metadata[f"{_PREFIX}tokens"]
        special = {
            role: tokens[metadata[f"{_PREFIX}{name}_token_id"]]
            for role, name in _ROLES.items()
            if f"{_PREFIX}{name}_token_id" in metadata
        }
    except KeyError as missing:
        raise QuikError(f"{where}: its tokenizer lacks {missing}") from None
    except IndexError:
        raise QuikError(f"{where}: a special token of its tokenizer lies outside the vocabulary") from None
    _add_special(tokenizer, tokens, metadata)
    _add_borders(tokenizer, special, metadata, default_bos=kind == "llama" or metadata.get(f"{_PREFIX}pre") == "llama-bpe")
    wrapped = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=_context(metadata), **special
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


# transformers' names and GGUF's.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _context(metadata: Mapping[str, Any]) -> int:
    return metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 30)


def _byte_level(where: str, metadata: Mapping[str, Any]) -> Any:
    """Byte-level BPE with the file's own merges."""
    import tokenizers
    from tokenizers import decoders, models

    split = metadata.get(f"{_PREFIX}pre", "default")
    if split not in _SPLITS:
        raise QuikError(
            f'{where}: text split by the rule "{split}" (tokenizer.ggml.pre) is not supported; {did_you_mean(split, _SPLITS)}'
        )
    tokens: list[str] = metadata[f"{_PREFIX}tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[f"{_PREFIX}merges"]]
    try:
        # LLaMA 3 published `ignore_merges`: a whole word that is a token is taken before any merge.
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=split == "llama-bpe")
    except Exception as problem:  # tokenizers raises bare Exception
        raise QuikError(f"{where}: its tokenizer's merges do not fit its vocabulary ({problem})") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = _SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_split() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


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


_SPLITS: dict[str, Callable[[], Any]] = {
    "default": _default_split,
    "gpt-2": _gpt2_split,
    "llama-bpe": _llama3_split,
    "smollm": _smollm_split,
}


def _sentencepiece(where: str, metadata: Mapping[str, Any]) -> Any:
    """SentencePiece BPE: spaces become "▁", one is put in front, and characters without a piece become bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    if metadata.get(f"{_PREFIX}remove_extra_whitespaces") or metadata.get(f"{_PREFIX}precompiled_charsmap"):
        raise QuikError(f"{where}: a SentencePiece tokenizer that rewrites its text (normalization) is not supported")
    tokens: list[str] = metadata[f"{_PREFIX}tokens"]
    scores: list[float] = metadata[f"{_PREFIX}scores"]
    kinds: list[int] = metadata[f"{_PREFIX}token_type"]
    if not len(tokens) == len(scores) == len(kinds):
        raise QuikError(f"{where}: its tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} types")
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _Kind.UNKNOWN), None)
    merges = merges_from_scores(tokens, scores, kinds)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_Kind.BYTE in kinds)
    )
    prefixed = metadata.get(f"{_PREFIX}add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefixed else []), normalizers.Replace(" ", _SPACE)]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """The merges that do what SentencePiece does with scores: of all neighbours that together are a piece, join the best first.

    A piece gives one merge for every cut into two pieces, so that each way of reaching it has the piece's rank; the
    better score comes first, and among equal ones the lower token.

    >>> merges_from_scores(["a", "b", "ab", "aba"], [0.0, 0.0, -1.0, -2.0], [1, 1, 1, 1])
    [('a', 'b'), ('ab', 'a')]
    """
    # Control, unknown and byte tokens never come out of a merge; unused ones fill a table up and are nobody's text.
    merged = {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (_Kind.NORMAL, _Kind.USER_DEFINED)
    }
    ranked = []
    for token, i in merged.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in merged and right in merged:
                ranked.append((-scores[i], i, -cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_special(tokenizer: Any, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Tokens that are never split: control tokens (hidden when decoding on request) and those the model's authors added."""
    import tokenizers

    kinds = metadata.get(f"{_PREFIX}token_type", [])
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _Kind.CONTROL]
    added = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _Kind.USER_DEFINED]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])


def _add_borders(tokenizer: Any, special: Mapping[str, str], metadata: Mapping[str, Any], *, default_bos: bool) -> None:
    """Let encoding put `bos` before and `eos` behind a text where the file asks for it."""
    from tokenizers import processors

    before = ["bos_token"] if metadata.get(f"{_PREFIX}add_bos_token", default_bos) and "bos_token" in special else []
    after = ["eos_token"] if metadata.get(f"{_PREFIX}add_eos_token", False) and "eos_token" in special else []
    if not before and not after:
        return
    first, last = [f"{special[role]}:{{}}" for role in before], [f"{special[role]}:{{}}" for role in after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece.format(0) for piece in [*first, "$A:{}", *last]],
        pair=[piece.format(0) for piece in [*first, "$A:{}", *last]] + [piece.format(1) for piece in [*first, "$B:{}", *last]],
        special_tokens=[(special[role], tokenizer.token_to_id(special[role])) for role in {*before, *after}],
    )
