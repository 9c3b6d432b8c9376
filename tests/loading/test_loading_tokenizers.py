"""Tokenizers rebuilt from GGUF metadata, and those of Hugging Face directories."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_checkpoints import CONFIG, llama_weights, write_single
from loading_ggufs import write_gguf

from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.loading.gguf_tokenizer import rebuild_tokenizer
from quikjax.loading.sentencepiece_tokenizer import merges_from_scores

NORMAL, UNKNOWN, CONTROL, ADDED, BYTE = 1, 2, 3, 4, 6


def _letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes as, by byte: printable ones as themselves, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def byte_level_metadata(split: str | None, words: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A byte-level tokenizer in a GGUF file: its vocabulary is the bytes, a few merges and two special tokens."""
    letters = _letters()
    merges = ["1 2", "12 3", "Ġ 1", "h e", "he l", "' s", "Ċ Ċ"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), *(words or []), "<|end|>", "<extra>"]
    types = [NORMAL] * (len(tokens) - 2) + [CONTROL, ADDED]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|end|>"),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
    if split is not None:
        metadata["tokenizer.ggml.pre"] = split
    return metadata


def _byte_level(split: str | None, words: list[str] | None = None, **more: Any) -> Any:
    """`byte_level_metadata`, rebuilt."""
    return rebuild_tokenizer("test.gguf", byte_level_metadata(split, words, **more))


def _pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


def test_how_each_rule_cuts_numbers() -> None:
    """The rules differ most where digits meet: each alone, all together, by threes."""
    assert _pieces(_byte_level("smollm"), "12345") == ["1", "2", "3", "4", "5"]
    assert _pieces(_byte_level("gpt-2"), "51234") == ["5", "123", "4"]
    assert _pieces(_byte_level("llama-bpe"), "51234") == ["5", "12", "3", "4"]  # 512 | 34
    assert _pieces(_byte_level("default"), "51234") == ["5", "12", "3", "4"]


def test_a_missing_rule_is_said_and_not_guessed() -> None:
    with pytest.raises(QuikError, match=r"by which rule text is split \(tokenizer\.ggml\.pre\).*gguf-new-metadata.*llama-bpe"):
        _byte_level(None)


@pytest.mark.parametrize("alias", ["llama3", "llama-v3", "falcon3"])
def test_other_names_of_llama3s_rule(alias: str) -> None:
    text = "he's 51234!?\n\n  xyz"
    tokenizer, expected = _byte_level(alias, words=["xyz"]), _byte_level("llama-bpe", words=["xyz"])
    assert tokenizer.encode(text) == expected.encode(text)
    assert _pieces(tokenizer, "xyz") == ["xyz"]
    assert tokenizer.encode("he")[0] == tokenizer.bos_token_id


def test_llama3_takes_a_whole_word_before_any_merge() -> None:
    """ "xyz" is a token that no merge leads to."""
    assert _pieces(_byte_level("llama-bpe", words=["xyz"]), "xyz") == ["xyz"]
    assert _pieces(_byte_level("gpt-2", words=["xyz"]), "xyz") == ["x", "y", "z"]


def test_newlines_stay_together_or_not() -> None:
    assert _pieces(_byte_level("llama-bpe"), "!\n\n") == ["!", "ĊĊ"]
    assert _pieces(_byte_level("smollm"), "\n\n") == ["ĊĊ"]


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("split", ["smollm", "gpt-2", "llama-bpe", "default"])
def test_every_text_survives(split: str, text: str) -> None:
    tokenizer = _CACHE.setdefault(split, _byte_level(split))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


_CACHE: dict[str, Any] = {}


def test_special_tokens_are_never_split_and_can_be_hidden() -> None:
    tokenizer = _byte_level("smollm")
    ids = tokenizer.encode("he<|end|>x<extra>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "<|end|>", "x", "<extra>"]
    assert tokenizer.decode(ids) == "he<|end|>x<extra>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hex<extra>"
    assert tokenizer.eos_token_id == ids[1]


def test_a_beginning_is_added_where_the_file_asks_for_it() -> None:
    end = "<|end|>"
    for split, added, expected in [
        ("smollm", None, ["he"]),
        ("smollm", True, [end, "he"]),
        ("llama-bpe", None, [end, "he"]),  # what LLaMA 3 does unless told otherwise
        ("llama-bpe", False, ["he"]),
    ]:
        more: dict[str, Any] = {} if added is None else {"add_bos_token": added}
        tokenizer = _byte_level(split, **more)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("he")) == expected
    both = _byte_level("smollm", add_bos_token=True, add_eos_token=True)
    assert both.convert_ids_to_tokens(both.encode("he")) == [end, "he", end]


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(QuikError, match=r'split by the rule "smolm".*did you mean "smollm"'):
        _byte_level("smolm")


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(QuikError, match='tokenizers of kind "bert"'):
        rebuild_tokenizer("test.gguf", {"tokenizer.ggml.model": "bert"})


def test_contradictory_metadata() -> None:
    with pytest.raises(QuikError, match="outside the vocabulary"):
        _byte_level("smollm", eos_token_id=100000)
    with pytest.raises(QuikError, match="merges do not fit"):
        _byte_level("smollm", merges=["no such"])
    with pytest.raises(QuikError, match=r"lacks 'tokenizer\.ggml\.tokens'"):
        rebuild_tokenizer("test.gguf", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"})


def test_no_tokenizer_in_the_file(tmp_path: Path) -> None:
    assert open_source(write_gguf(tmp_path / "model.gguf", llama_weights())).tokenizer() is None


# SentencePiece: "▁" is a space; scores fall with the token's number as in LLaMA.
_WORDS = ["▁", "a", "b", "c", "aa", "ab", "bc", "▁a", "▁▁", "abc", "aab", "▁ab", "▁▁▁▁", "aaaa", "ca", "▁abc"]
_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(_WORDS)]
_SCORES = [0.0] * 259 + [-float(i) for i in range(len(_WORDS))]


def _sentencepiece(**more: Any) -> Any:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": _TOKENS,
        "tokenizer.ggml.scores": _SCORES,
        "tokenizer.ggml.token_type": _TYPES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
    return rebuild_tokenizer("test.gguf", metadata)


def _by_scores(text: str) -> list[str]:
    """SentencePiece's own rule: of all neighbours that together are a piece, join the best, the leftmost among equals."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(_WORDS.index(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in _WORDS]
        if not joined:
            break
        _, i = min(joined)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [part for piece in pieces for part in ([piece] if piece in _WORDS else [f"<0x{b:02X}>" for b in piece.encode()])]


@given(st.text(alphabet="abc d\n1é🙂", max_size=30))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_joins_by_score(text: str) -> None:
    tokenizer = _CACHE.setdefault("sentencepiece", _sentencepiece())
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *(_by_scores(text) if text else [])]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_without_a_space_in_front() -> None:
    tokenizer = _sentencepiece(add_space_prefix=False, add_bos_token=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab ab")) == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"


def test_sentencepiece_that_rewrites_text_is_refused() -> None:
    with pytest.raises(QuikError, match="normalization"):
        _sentencepiece(remove_extra_whitespaces=True)
    with pytest.raises(QuikError, match="275 tokens, 3 scores"):
        _sentencepiece(scores=[0.0, 0.0, 0.0])


def test_no_merge_makes_a_control_token() -> None:
    assert merges_from_scores(["a", "b", "ab"], [0.0, 0.0, -1.0], [NORMAL, NORMAL, CONTROL]) == []


def test_the_tokenizer_of_a_directory(tmp_path: Path) -> None:
    directory = write_single(tmp_path, CONFIG, llama_weights())
    original = _byte_level("smollm")
    original.save_pretrained(directory)
    tokenizer = open_source(directory).tokenizer()
    text = "he said <|end|> 123\n\né"
    assert tokenizer is not None
    assert tokenizer.encode(text) == original.encode(text)


@pytest.mark.parametrize("content", ["", "{", '{"model": {}}'])
def test_a_damaged_tokenizer_file(tmp_path: Path, content: str) -> None:
    directory = write_single(tmp_path, CONFIG, llama_weights())
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(QuikError, match=r"the tokenizer in .* cannot be read") as caught:
        open_source(directory).tokenizer()
    assert "\n" not in str(caught.value)


def test_nothing_is_printed_and_no_setting_is_left_behind() -> None:
    """transformers advises to install PyTorch on import; the variable that silences it must not stay set."""
    program = (
        "import os; from quikjax.loading.tokenizer import import_transformers; "
        "import_transformers().PreTrainedTokenizerFast; print(os.environ.get('TRANSFORMERS_NO_ADVISORY_WARNINGS'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "None\n"
    assert "PyTorch" not in done.stderr
