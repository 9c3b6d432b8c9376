"""Tokenizers from the files beside published weights, offline: the vocabulary's own file is the truth, whatever its label says.

`tokenizer.json` is used as `tokenizers` reads it, `tokenizer.model` as SentencePiece does, `vocab.json` with `merges.txt` as
GPT-2 does. Only other vocabularies are left to the classes of `transformers`: some versions of it rebuild a tokenizer by the name
of its class, and lose what its file says.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError
from quikjax.files import read_json, read_text
from quikjax.loading.byte_level import build_byte_level
from quikjax.loading.sentencepiece_model import read_model
from quikjax.loading.sentencepiece_tokenizer import Prefix, build_sentencepiece
from quikjax.loading.tokenizer_settings import Settings, read_settings

# Any of these makes a directory one that has a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
# Whatever belongs to one.
_BESIDE = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
# Labels of tokenizers that publish vocab.json and merges.txt and cut text as GPT-2 does.
_GPT2 = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
# Labels of tokenizers over SentencePiece that put nothing in front of a text unless told to; LLaMA's puts BOS.
_WITHOUT_BOS = ("T5", "Albert", "XLNet", "Reformer", "BigBird", "Pegasus", "Marian", "Deberta", "MT5")
_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def import_transformers() -> Any:
    """`transformers`, imported without its advice to install PyTorch, which this library does not need.

    The advice is printed once, on the first import. The variable that silences it is restored, so that everything the user's own
    code does later is reported as the user wants it.
    """
    if "transformers" not in sys.modules:
        before = os.environ.get(_ADVICE)
        os.environ[_ADVICE] = "1"
        try:
            import transformers
        finally:
            if before is None:
                del os.environ[_ADVICE]
            else:
                os.environ[_ADVICE] = before
    import transformers

    return transformers


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """The files of a Hugging Face directory that make up its tokenizer, in order of name."""
    return tuple(directory / name for name in sorted(_TOKENIZER_FILES + _BESIDE) if (directory / name).is_file())


def read_tokenizer(directory: Path, config: Mapping[str, Any] | None = None) -> Any | None:
    """The tokenizer in a Hugging Face directory, or None where there is none. Nothing is downloaded, no remote code is run.

    Args:
        directory: where its files are.
        config: the model's configuration, for a label of the tokenizer where its own files have none.

    Raises:
        QuikError: its files are there and cannot be read, or not so that its tokens are right.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    settings = read_settings(directory)
    label = settings.fields.get("tokenizer_class") or (config or {}).get("tokenizer_class")
    if (directory / "tokenizer.json").exists():
        return _from_json(directory, settings)
    if (directory / "tokenizer.model").exists():
        return _from_sentencepiece(directory, settings, label)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists() and label in _GPT2:
        return _from_merges(directory, settings)
    auto = import_transformers().AutoTokenizer
    try:
        return auto.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # whatever the many tokenizer classes raise on damaged files
        raise _unreadable(directory, problem) from None


def wrap(core: Any, special: Mapping[str, str], chat_template: str | dict[str, str] | None, **fields: Any) -> Any:
    """A `tokenizers.Tokenizer` as a `transformers.PreTrainedTokenizerFast`, with special tokens by role and a chat template."""
    try:
        wrapped = import_transformers().PreTrainedTokenizerFast(tokenizer_object=core, **special, **fields)
    except (TypeError, ValueError) as problem:
        raise QuikError(f"a setting of the tokenizer cannot be used: {str(problem).splitlines()[0]}") from None
    wrapped.chat_template = chat_template
    return wrapped


def add_borders(core: Any, *, bos: str | None, eos: str | None) -> None:
    """Let encoding put the token `bos` before and `eos` behind a text; `None` puts nothing."""
    from tokenizers import processors

    if bos is None and eos is None:
        return
    first, last = ([] if token is None else [f"{token}:{{}}"] for token in (bos, eos))
    core.post_processor = processors.TemplateProcessing(
        single=[piece.format(0) for piece in [*first, "$A:{}", *last]],
        pair=[piece.format(0) for piece in [*first, "$A:{}", *last]] + [piece.format(1) for piece in [*first, "$B:{}", *last]],
        special_tokens=[(token, core.token_to_id(token)) for token in {bos, eos} if token is not None],
    )


def _from_json(directory: Path, settings: Settings) -> Any:
    """`tokenizer.json` as it is. A special token that it does not have is none: another would take its id."""
    import tokenizers

    content = read_text(directory / "tokenizer.json")
    try:
        core = tokenizers.Tokenizer.from_str(content)
    except Exception as problem:  # tokenizers raises bare Exception
        raise _unreadable(directory, problem) from None
    # Whoever saved it may have been cutting or filling up texts just then.
    core.no_truncation()
    core.no_padding()
    special, fields = _known(core, settings, settings.special)
    wrapped = wrap(core, special, settings.chat_template, **fields)
    # The wrapper has let its special tokens part a text, also where the file does not, and may have put in a border of its own.
    wrapped._tokenizer = core
    return wrapped


def _from_sentencepiece(directory: Path, settings: Settings, label: str | None) -> Any:
    """`tokenizer.model`, and what its publisher added around it. LLaMA's puts BOS in front unless told not to."""
    model = read_model(directory / "tokenizer.model")
    fields, tokens = settings.fields, model.pieces.tokens
    prefix: Prefix | None = "each"
    if not model.space_prefix or fields.get("add_prefix_space") is False:
        prefix = None
    elif fields.get("legacy") is False:
        prefix = "first"
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id, "pad_token": model.pad_id}
    special = {role: tokens[token] for role, token in named.items() if 0 <= token < len(tokens)} | settings.special
    added = [entry["content"] for entry in settings.added.values() if entry.get("special")]
    try:
        core = build_sentencepiece(
            model.pieces,
            unigram=model.unigram,
            prefix=prefix,
            collapse_spaces=model.collapse_spaces,
            charsmap=model.charsmap,
            special=[*special.values(), *settings.more_special, *added],
        )
    except Exception as problem:  # tokenizers raises bare Exception
        raise _unreadable(directory, problem) from None
    default_bos = not str(label or "Llama").startswith(_WITHOUT_BOS)
    return _completed(core, directory, settings, special, default_bos=default_bos, normalized=prefix == "first")


def _from_merges(directory: Path, settings: Settings) -> Any:
    """`vocab.json` and `merges.txt`, as OPT publishes its tokenizer."""
    from tokenizers import pre_tokenizers

    try:
        vocabulary = read_json(directory / "vocab.json")
        lines = read_text(directory / "merges.txt").split("\n")
        pairs = [line.partition(" ") for line in lines if line.strip() and not line.startswith("#version")]
        core = build_byte_level(vocabulary, [(left, right) for left, _, right in pairs], "gpt-2")
    except Exception as problem:  # whatever a damaged file leads to; tokenizers raises bare Exception
        raise _unreadable(directory, problem) from None
    if settings.fields.get("add_prefix_space"):
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    end = "<|endoftext|>"  # GPT-2's, where nothing else is said
    ends = ("bos_token", "eos_token", "unk_token") if core.token_to_id(end) is not None else ()
    return _completed(core, directory, settings, dict.fromkeys(ends, end) | settings.special, default_bos=False)


def _completed(
    core: Any,
    directory: Path,
    settings: Settings,
    special: Mapping[str, str],
    *,
    default_bos: bool,
    normalized: bool = False,
) -> Any:
    """A rebuilt tokenizer with the tokens that its publisher added, BOS and EOS around a text where wanted, wrapped.

    `normalized` says whether added tokens are looked for in the normalized text or in the one that was given.
    """
    import tokenizers

    flags = ("single_word", "lstrip", "rstrip", "special")
    roles = {*special.values(), *settings.more_special}
    described: dict[int, Mapping[str, Any]] = {
        core.token_to_id(token): {"content": token} for token in roles if core.token_to_id(token) is not None
    }
    for token, entry in sorted((described | settings.added).items()):
        options = {"special": entry["content"] in roles} | {name: value for name, value in entry.items() if name in flags}
        core.add_tokens([tokenizers.AddedToken(entry["content"], normalized=normalized, **options)])
        if core.token_to_id(entry["content"]) != token:
            raise QuikError(
                f'the tokenizer in {directory} cannot be read: its added token "{entry["content"]}" has the id {token}, but '
                f"{core.token_to_id(entry['content'])} is the next one free; its files do not belong together"
            )
    known, fields = _known(core, settings, special)
    add_borders(
        core,
        bos=known.get("bos_token") if _flag(settings, "add_bos_token", default_bos) else None,
        eos=known.get("eos_token") if _flag(settings, "add_eos_token", False) else None,
    )
    return wrap(core, known, settings.chat_template, **fields)


def _known(core: Any, settings: Settings, special: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The special tokens that the vocabulary has, and the other settings of the wrapper."""
    more = [token for token in settings.more_special if core.token_to_id(token) is not None]
    known = {role: token for role, token in special.items() if core.token_to_id(token) is not None}
    return known, settings.passed | ({"additional_special_tokens": more} if more else {})


def _flag(settings: Settings, name: str, default: bool) -> bool:
    value = settings.fields.get(name)
    return default if value is None else bool(value)


def _unreadable(directory: Path, problem: Exception) -> QuikError:
    reason = str(problem).strip().splitlines() or [type(problem).__name__]
    return QuikError(f"the tokenizer in {directory} cannot be read: {reason[0]}")
