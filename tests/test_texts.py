"""Texts to calibrate and evaluate on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.testing import tiny_tokenizer
from quikjax.texts import (
    calibration_text,
    calibration_windows,
    continuation,
    evaluation_text,
    tokenize,
    tokens_fingerprint,
    without_final_newline,
)


def test_pydoc_is_split_without_overlap() -> None:
    calibration, evaluation = calibration_text("pydoc"), evaluation_text("pydoc")
    assert len(calibration.content) > len(evaluation.content) > 50_000
    assert "three of four" in calibration.origin
    paragraphs = [set(text.content.split("\n\n")) for text in (calibration, evaluation)]
    assert not paragraphs[0] & paragraphs[1]


def test_files_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("some text\n", encoding="utf-8")
    assert evaluation_text(good) == ("good.txt", "some text\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    for name, message in (
        ("empty.txt", "is empty; give a file with text"),
        ("latin.txt", r"is not UTF-8 text \(byte 3\)"),
        ("absent.txt", "there is no text file"),
        (".", "is a directory"),
    ):
        with pytest.raises(QuikError, match=message):
            calibration_text(tmp_path / name)
    with pytest.raises(QuikError, match='did you mean "pydoc"'):
        calibration_text("pydocs")


def test_wikitext2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(QuikError, match=r"pip install 'quikjax\[datasets\]'"):
        evaluation_text("wikitext2")


def test_calibration_windows_are_the_first_ones() -> None:
    tokens = np.arange(100, dtype=np.int32)
    cut = calibration_windows(tokens, 3, 10)
    np.testing.assert_array_equal(cut.ravel(), tokens[:30])
    np.testing.assert_array_equal(cut[:, 0], [0, 10, 20])
    np.testing.assert_array_equal(calibration_windows(tokens, 10, 10).ravel(), tokens)
    with pytest.raises(QuikError, match="has 100 tokens, 4 x 30 = 120 are needed"):
        calibration_windows(tokens, 4, 30)
    with pytest.raises(QuikError, match="must be positive"):
        calibration_windows(tokens, 0, 30)


def test_tokens_and_their_fingerprint() -> None:
    tokens = tokenize(tiny_tokenizer(), "añ")
    assert tokens.dtype == np.int32
    assert tokens.shape == (3,)
    assert tokens_fingerprint(tokens) == tokens_fingerprint(tokens.copy())
    assert tokens_fingerprint(tokens) != tokens_fingerprint(tokens[None])


@pytest.mark.parametrize(
    ("name", "evaluation", "content", "asked"),
    [
        ("wikitext2", True, "a\n\nb", ("Salesforce/wikitext", "test")),
        ("ptb", True, "a b", ("ptb-text-only/ptb_text_only", "test")),
        ("ptb", False, "a b", ("ptb-text-only/ptb_text_only", "train")),
        ("c4", True, "a b", ("allenai/c4", "validation")),
        ("c4", False, "a b", ("allenai/c4", "train")),
    ],
)
def test_published_sets_are_joined_as_the_papers_do(
    monkeypatch: pytest.MonkeyPatch, name: str, evaluation: bool, content: str, asked: tuple[str, str]
) -> None:
    class Rows:
        def __getitem__(self, key: object) -> Any:
            return self if isinstance(key, slice) else ["a", "b"]

    seen = []

    def load_dataset(path: str, *_: str, split: str, **__: object) -> Rows:
        seen.append((path, split))
        return Rows()

    monkeypatch.setitem(__import__("sys").modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    text = (evaluation_text if evaluation else calibration_text)(name)
    assert text.content == content
    assert seen == [asked]


def test_a_set_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str, **__: object) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(__import__("sys").modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    with pytest.raises(QuikError, match=r"c4 could not be loaded \(no network\); give a text file instead"):
        evaluation_text("c4")


BOS, EOS = 256, 257


def bordered(single: str, special: tuple[str, ...] = ("<s>", "</s>")) -> Any:
    """A tokenizer of bytes that puts `single` around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(_letters())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, core.token_to_id(token)) for token in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def _letters() -> list[str]:
    """The letters of byte-level BPE, by byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize(
    ("single", "before"),
    [
        ("$A", []),
        ("<s> $A", [BOS]),
        ("$A </s>", []),
        ("<s> $A </s>", [BOS]),
        ("<s> $A </s> </s>", [BOS]),
        ("</s> $A", [EOS]),  # OPT's beginning is the token that ends its texts
        ("</s> <s> $A </s> <s>", [EOS, BOS]),
    ],
)
def test_a_prompt_is_not_a_finished_text(single: str, before: list[int]) -> None:
    tokenizer = bordered(single)
    for text in ("a", "hello", " x\n", "", "é🙂", "a" * 100):
        assert tokenize(tokenizer, text).tolist() == [*before, *text.encode()]
    # What the user typed stays: an end is one, a beginning is not doubled.
    assert tokenize(tokenizer, "a</s>").tolist() == [*before, 97, EOS]
    typed = "".join(tokenizer.convert_ids_to_tokens(before))
    assert tokenize(tokenizer, typed + "a<s>b").tolist() == [*before, 97, BOS, 98]
    if before[-1:] == [BOS]:
        assert tokenize(tokenizer, "<s>a").tolist() == [*before, 97]
        assert tokenize(tokenizer, "<s><s>a").tolist() == [*before, BOS, 97]


def test_calibration_and_evaluation_have_no_end_either() -> None:
    tokens = tokenize(bordered("<s> $A </s>"), calibration_text("pydoc").content)
    assert tokens[0] == BOS
    assert EOS not in tokens


def test_a_settings_wish_for_an_end_is_not_followed() -> None:
    tokenizer = bordered("$A")
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    assert tokenizer("hello")["input_ids"] == [BOS, *b"hello", EOS]
    assert tokenize(tokenizer, "hello").tolist() == [BOS, *b"hello"]


def spaced() -> Any:
    """A tokenizer of whole words that loses the first space of whatever it decodes, as LLaMA's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁the", "▁lazy", "▁dog", "s", "▁", ".", "▁n't"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", clean_up_tokenization_spaces=True)


def test_a_continuation_is_what_the_prompt_lacks() -> None:
    tokenizer = spaced()
    the = tokenize(tokenizer, "the")
    assert the.tolist() == [2]
    assert continuation(tokenizer, the, [3, 4]) == " lazy dog"
    assert continuation(tokenizer, the, np.asarray([5, 3])) == "s lazy"
    assert continuation(tokenizer, the, []) == ""
    assert continuation(tokenizer, [], [3, 4]) == "lazy dog"
    assert continuation(tokenizer, [2, 6], [4]) == " dog"
    # Special tokens are not text, and nothing is tidied up where prompt and continuation meet.
    assert continuation(tokenizer, the, [3, 1]) == " lazy"
    assert continuation(tokenizer, [2, 6], [7, 8]) == ". n't"


@pytest.mark.parametrize("text", ["a🙂b", "🙂🙂", "日本語", "é", "x y"])
def test_characters_that_tokens_part(text: str) -> None:
    """Wherever the bytes of a text are parted, prompt and continuation make up the text."""
    tokenizer, ids = tiny_tokenizer(), list(text.encode())
    for at in range(len(ids) + 1):
        whole = ids[:at]
        while whole and bytes(whole).decode(errors="ignore").encode() != bytes(whole):
            whole = whole[:-1]
        expected = bytes(ids[len(whole) :]).decode()
        order = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
        assert continuation(tokenizer, order[:at], order[at:]) == expected


def test_a_line_from_standard_input_has_no_newline() -> None:
    lines = {"x\n": "x", "x\r\n": "x", "x": "x", "x\n\n": "x\n", "\n": "", "a\nb \n": "a\nb ", "x\r": "x\r"}
    assert {given: without_final_newline(given) for given in lines} == lines
