"""Texts to calibrate and evaluate on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.testing import tiny_tokenizer
from quikjax.texts import calibration_text, calibration_windows, evaluation_text, tokenize, tokens_fingerprint


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
