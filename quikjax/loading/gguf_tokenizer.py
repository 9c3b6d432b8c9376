"""A GGUF file's tokenizer, rebuilt with `tokenizers` from the metadata alone. `transformers` itself would need PyTorch for it.

Two kinds exist for LLaMA: "gpt2", byte-level BPE whose way of splitting text is named by `tokenizer.ggml.pre`, and "llama",
SentencePiece BPE. A rule that is not named, or not known, is refused: a wrong split gives wrong tokens without any other sign.
"""

from collections.abc import Callable, Mapping
from typing import Any

from quikjax.errors import QuikError, did_you_mean
from quikjax.loading.byte_level import SPLITS, adds_bos, build_byte_level
from quikjax.loading.sentencepiece_model import Kind, Pieces
from quikjax.loading.sentencepiece_tokenizer import Prefix, build_sentencepiece
from quikjax.loading.tokenizer import add_borders, wrap

_PREFIX = "tokenizer.ggml."


def rebuild_tokenizer(where: str, metadata: Mapping[str, Any], *, plain: bool = False) -> Any | None:
    """The file's tokenizer as a `transformers.PreTrainedTokenizerFast`, or None where its metadata has none.

    With `plain`, a `PlainTokenizer` where it gives the same tokens and texts.

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
    default_bos = kind == "llama" or adds_bos(metadata[f"{_PREFIX}pre"])
    add_borders(
        tokenizer,
        bos=special.get("bos_token") if metadata.get(f"{_PREFIX}add_bos_token", default_bos) else None,
        eos=special.get("eos_token") if metadata.get(f"{_PREFIX}add_eos_token", False) else None,
    )
    return wrap(
        tokenizer,
        special,
        metadata.get("tokenizer.chat_template"),
        plain=plain,
        clean_up_tokenization_spaces=False,
        model_max_length=_context(metadata),
    )


# transformers' names and GGUF's.
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _context(metadata: Mapping[str, Any]) -> int:
    return metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 30)


def _byte_level(where: str, metadata: Mapping[str, Any]) -> Any:
    """Byte-level BPE with the file's own merges."""
    import tokenizers

    split = metadata.get(f"{_PREFIX}pre")
    if split is None:
        raise QuikError(
            f"{where}: its tokenizer does not say by which rule text is split (tokenizer.ggml.pre), as files of early 2024 and "
            "before do not; convert the model again with a current llama.cpp, or add the rule with: gguf-new-metadata "
            f"--pre-tokenizer RULE ({', '.join(SPLITS)})"
        )
    if split not in SPLITS:
        raise QuikError(
            f'{where}: text split by the rule "{split}" (tokenizer.ggml.pre) is not supported; {did_you_mean(split, SPLITS)}'
        )
    tokens: list[str] = metadata[f"{_PREFIX}tokens"]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in metadata[f"{_PREFIX}merges"])]
    try:
        tokenizer = build_byte_level({token: i for i, token in enumerate(tokens)}, merges, split)
    except ValueError as problem:
        raise QuikError(f"{where}: {problem}") from None
    # Tokens that are never split: control tokens (hidden when decoding on request) and those the model's authors added.
    kinds = metadata.get(f"{_PREFIX}token_type", [])
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == Kind.CONTROL]
    added = [token for token, kind in zip(tokens, kinds, strict=False) if kind == Kind.USER_DEFINED]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    return tokenizer


def _sentencepiece(where: str, metadata: Mapping[str, Any]) -> Any:
    """SentencePiece BPE."""
    if metadata.get(f"{_PREFIX}remove_extra_whitespaces") or metadata.get(f"{_PREFIX}precompiled_charsmap"):
        raise QuikError(f"{where}: a SentencePiece tokenizer that rewrites its text (normalization) is not supported")
    tokens: list[str] = metadata[f"{_PREFIX}tokens"]
    scores: list[float] = metadata[f"{_PREFIX}scores"]
    kinds: list[int] = metadata[f"{_PREFIX}token_type"]
    if not len(tokens) == len(scores) == len(kinds):
        raise QuikError(f"{where}: its tokenizer has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} types")
    prefix: Prefix | None = "each" if metadata.get(f"{_PREFIX}add_space_prefix", True) else None
    # A file does not tell SentencePiece's user-defined pieces from tokens that were added around it; the latter are common.
    return build_sentencepiece(Pieces(tokens, scores, kinds), prefix=prefix, user_defined_in_text=False)
