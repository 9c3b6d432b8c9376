"""The README is true: its commands exist, its folders exist, its Python works as pasted."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_every_command_and_option_exists(quikjax_command: Run) -> None:
    used: dict[tuple[str, ...], set[str]] = {}
    for line in re.findall(r"^quikjax .*$", README, flags=re.M):
        words = line.split("#")[0].split()
        command = tuple(words[1:3] if words[1] == "study" else words[1:2])
        used.setdefault(command, set()).update(word for word in words if word.startswith("--"))
    assert {("quantize",), ("generate",), ("eval",), ("study", "scaling")} <= set(used)
    for command, options in used.items():
        done = quikjax_command(*command, "--help")
        assert done.returncode == 0, (command, done.stderr)
        for option in options:
            assert option in done.stdout, (command, option)


def test_make_targets_and_folders_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for folder in re.findall(r"^(?:  )?([a-z_]+)/  ", README, flags=re.M):
        assert (ROOT / folder).is_dir() or (ROOT / "quikjax" / folder).is_dir(), folder


def test_files_exist() -> None:
    for path in re.findall(r"`([\w/]+/\w+\.py)`", README):
        assert "NAME" in path or any((root / path).is_file() for root in (ROOT, ROOT / "quikjax")), path
    for path in re.findall(r"python\s+(benchmarks/\w+\.py)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.slow
def test_the_python_example_works_as_pasted(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "smol-4b-example" / "quikjax.json").is_file()
