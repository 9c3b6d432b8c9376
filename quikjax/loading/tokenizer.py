"""Tokenizers from the files beside published weights, offline: the vocabulary's own file is the truth, whatever its label says.

`tokenizer.json` is used as `tokenizers` reads it, `tokenizer.model` as SentencePiece does, `vocab.json` with `merges.txt` as
GPT-2 does. Only other vocabularies are left to the classes of `transformers`: some versions of it rebuild a tokenizer by the name
of its class, and lose what its file says.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError
from quikjax.files import read_json, read_text
from quikjax.loading.byte_level import build_byte_level
from quikjax.loading.plain_tokenizer import PlainTokenizer, is_enough
from quikjax.loading.sentencepiece_model import read_model
from quikjax.loading.sentencepiece_tokenizer import Prefix, build_sentencepiece
from quikjax.loading.tokenizer_settings import Settings, read_settings

# The forms that a vocabulary is published in: files that are of use together only.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("sentencepiece.bpe.model",),
    ("spiece.model",),
)
# Whatever else belongs to a tokenizer.
_SETTINGS = "tokenizer_config.json"
_BESIDE = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "bpe.codes")
_FILES = frozenset(name for form in _VOCABULARIES for name in form).union(_BESIDE)
_TEMPLATES = "additional_chat_templates/*.jinja"
# Without any of these a directory has no tokenizer.
_TELLING = (*(form[0] for form in _VOCABULARIES), _SETTINGS)
# Labels of tokenizers that publish vocab.json and merges.txt and cut text as GPT-2 does.
_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
# Models that publish such files without a label, and put tokens of their own around a text.
_NOT_GPT2 = ("roberta", "xlm-roberta", "camembert")
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
    """The files of a Hugging Face directory that make up its tokenizer, in order of name; templates may lie in a folder."""
    return (*(directory / name for name in sorted(_FILES) if (directory / name).is_file()), *sorted(directory.glob(_TEMPLATES)))


def read_tokenizer(directory: Path, config: Mapping[str, Any] | None = None, *, plain: bool = False) -> Any | None:
    """The tokenizer in a Hugging Face directory, or None where there is none. Nothing is downloaded, no remote code is run.

    Args:
        directory: where its files are.
        config: the model's configuration, which says what kind of tokenizer this is where its own files do not.
        plain: a `PlainTokenizer` is enough, where it gives the same tokens and texts.

    Raises:
        QuikError: its files are there and cannot be read, or not so that its tokens are right.
    """
    if not any((directory / name).exists() for name in _TELLING):
        return None
    if not any(all((directory / name).exists() for name in form) for form in _VOCABULARIES):
        # transformers would make an empty one, by the name of its class.
        raise QuikError(
            f"the tokenizer in {directory} cannot be read: it has no vocabulary "
            f"({', '.join(' with '.join(form) for form in _VOCABULARIES)}); copy or download it again"
        )
    settings, config = read_settings(directory), config or {}
    label = settings.fields.get("tokenizer_class") or config.get("tokenizer_class")
    if (directory / "tokenizer.json").exists():
        return _from_json(directory, settings, config.get("vocab_size"), plain=plain)
    if (directory / "tokenizer.model").exists():
        return _from_sentencepiece(directory, settings, label, plain=plain)
    is_gpt2 = label in _GPT2 or (label is None and config.get("model_type") not in _NOT_GPT2)
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists() and is_gpt2:
        return _from_merges(directory, settings, plain=plain)
    return _by_class(directory, config)


def wrap(
    core: Any, special: Mapping[str, str], chat_template: str | dict[str, str] | None, *, plain: bool = False, **fields: Any
) -> Any:
    """A `tokenizers.Tokenizer` as a `transformers.PreTrainedTokenizerFast`, with special tokens by role and a chat template.

    With `plain`, a `PlainTokenizer` where it gives the same tokens and texts.
    """
    if plain and is_enough(core, special, fields):
        return PlainTokenizer(core, special)
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


def _by_class(directory: Path, config: Mapping[str, Any]) -> Any:
    """A vocabulary that `transformers` has a class for. The class follows from the model where the files name none.

    `config.json` itself need not be there: beside an artifact's tokenizer it is not.
    """
    transformers = import_transformers()
    kind, label, given = config.get("model_type"), config.get("tokenizer_class"), {}
    try:
        if kind is not None:
            given["config"] = transformers.AutoConfig.for_model(kind, **({"tokenizer_class": label} if label else {}))
        return transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **given)
    except Exception as problem:  # whatever the many tokenizer classes raise on damaged files
        if list(directory.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
            raise QuikError(
                f"the tokenizer in {directory} comes through the package `sentencepiece`; run: pip install sentencepiece"
            ) from None
        raise _unreadable(directory, problem) from None


def _from_json(directory: Path, settings: Settings, rows: int | None, *, plain: bool) -> Any:
    """`tokenizer.json` as it is, and tokens that were added beside it. A special token without an id is none: another would
    take its id.
    """
    import tokenizers

    content = read_text(directory / "tokenizer.json")
    try:
        core = tokenizers.Tokenizer.from_str(content)
        core = _with_added(core, settings, rows)
    except Exception as problem:  # tokenizers raises bare Exception
        raise _unreadable(directory, problem) from None
    # Whoever saved it may have been cutting or filling up texts just then.
    core.no_truncation()
    core.no_padding()
    special, fields = _known(core, settings, settings.special)
    wrapped = wrap(core, special, settings.chat_template, plain=plain, **fields)
    if isinstance(wrapped, PlainTokenizer):
        return wrapped
    # The wrapper has let its special tokens part a text, also where the file does not, and may have put in a border of its own.
    wrapped._tokenizer = core
    return wrapped


def _with_added(core: Any, settings: Settings, rows: int | None) -> Any:
    """`core` with the tokens that its publisher's settings add to it by id, where all ids are the next ones free and the model,
    of `rows` embeddings, knows them; else `core`.
    """
    import tokenizers

    added = {token: entry for token, entry in settings.added.items() if core.token_to_id(entry["content"]) is None}
    if not added or max(added) >= (rows or 0):
        return core
    tried = tokenizers.Tokenizer.from_str(core.to_str())
    for _, entry in sorted(added.items()):
        tried.add_tokens([_added_token(entry, ("normalized",), special=entry["content"] in settings.special.values())])
    return tried if all(tried.token_to_id(entry["content"]) == token for token, entry in added.items()) else core


def _added_token(entry: Mapping[str, Any], read: Sequence[str] = (), **fields: Any) -> Any:
    """A token from its published description, of which the flags of all tokens and those in `read` are read. `fields` are the
    flags where it has none.
    """
    import tokenizers

    flags = ("single_word", "lstrip", "rstrip", "special", *read)
    return tokenizers.AddedToken(entry["content"], **fields | {name: entry[name] for name in flags if name in entry})


def _from_sentencepiece(directory: Path, settings: Settings, label: str | None, *, plain: bool) -> Any:
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
    return _completed(core, directory, settings, special, default_bos=default_bos, normalized=prefix == "first", plain=plain)


def _from_merges(directory: Path, settings: Settings, *, plain: bool) -> Any:
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
    return _completed(core, directory, settings, dict.fromkeys(ends, end) | settings.special, default_bos=False, plain=plain)


def _completed(
    core: Any,
    directory: Path,
    settings: Settings,
    special: Mapping[str, str],
    *,
    default_bos: bool,
    normalized: bool = False,
    plain: bool,
) -> Any:
    """A rebuilt tokenizer with the tokens that its publisher added, BOS and EOS around a text where wanted, wrapped.

    `normalized` says whether added tokens are looked for in the normalized text or in the one that was given.
    """
    roles = {*special.values(), *settings.more_special}
    described: dict[int, Mapping[str, Any]] = {
        core.token_to_id(token): {"content": token} for token in roles if core.token_to_id(token) is not None
    }
    for token, entry in sorted((described | settings.added).items()):
        core.add_tokens([_added_token(entry, special=entry["content"] in roles, normalized=normalized)])
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
    return wrap(core, known, settings.chat_template, plain=plain, **fields)


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
