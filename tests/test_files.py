"""Paths, texts and numbers as people and their tools write them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.files import decode, finite, read_json, read_text, user_path
from quikjax.quantizing.recipe import RECIPES, find_recipe
from quikjax.texts import calibration_text, evaluation_text

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_part_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(BOM + b"some text")
    assert evaluation_text(tmp_path / "text.txt").content == calibration_text(tmp_path / "text.txt").content == "some text"
    (tmp_path / "recipe.json").write_bytes(BOM + RECIPES["w4a8"].model_dump_json().encode())
    assert find_recipe(tmp_path / "recipe.json") == RECIPES["w4a8"]
    (tmp_path / "config.json").write_bytes(BOM + b'{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
    # Only the mark at the very beginning is one.
    assert decode(BOM + "a\ufeffb".encode(), "x") == "a\ufeffb"


@pytest.mark.parametrize("read", [evaluation_text, calibration_text, find_recipe, read_json, read_text])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "café"}'.encode("latin-1"), r"is not UTF-8 text \(byte 13\); save it as UTF-8"),
        ('{"name": "x"}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ('{"name": "x"}'.encode("utf-32"), "is UTF-32 text; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
    ],
)
def test_another_encoding_is_one_sentence_everywhere(tmp_path: Path, read: Any, content: bytes, said: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(QuikError, match=rf"file\.json {said}"):
        read(path)


def test_a_recipe_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(RECIPES["fp"].model_copy(update={"name": "è"}).model_dump_json(), encoding="utf-8")
    program = f"from quikjax.quantizing.recipe import find_recipe; print(ascii(find_recipe({str(path)!r}).name))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "'\\xe8'\n"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == user_path(Path("~/x")) == tmp_path / "x"
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    for wrong, said in (
        ("", "'' is not a path"),
        ("a\0b", "is not a path"),
        ("x" * 300, r"xxx\.\.\.' is not a path"),
        (3, "not 3 .int."),
        (None, "not None"),
        ([], "a list"),
    ):
        with pytest.raises(QuikError, match=said):
            user_path(wrong)


def test_numbers_that_are_not_finite_are_null() -> None:
    value = {"a": [np.float32("nan"), np.int64(3), (1.5, float("-inf"))], 1: np.bool_(True)}
    assert finite(value) == {"a": [None, 3, [1.5, None]], "1": True}


def test_lines_end_alike_whatever_system_wrote_them(tmp_path: Path) -> None:
    for name, content in (("unix", b"= A = \n\nb\n"), ("windows", b"= A = \r\n\r\nb\r\n"), ("mac", b"= A = \r\rb\r")):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == "= A = \n\nb\n"
