"""`generate` and `chat` as a person runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quikjax import executables
from quikjax.cli import bench, chat, generate
from quikjax.errors import QuikError
from quikjax.generation import speed
from quikjax.weights.compiled import why_no_compiled_products

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.mark.long
def test_prompts_of_a_file_with_samples(quikjax_process: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    environment = {"QUIKJAX_CACHE": str(tmp_path / "executables")}
    (tmp_path / "prompts").write_text("one\na longer one\n")
    arguments = ("generate", tiny_checkpoint, "--prompt-file", tmp_path / "prompts", "--max-new-tokens", "6", "--top-k", "50")
    done = quikjax_process(*arguments, "--samples", "2", "--json", "--logprobs", "--kv-cache", "int8", env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [row["prompt"] for row in figures["rows"]] == [0, 0, 1, 1]
    assert all(len(row["logprobs"]) == row["new_tokens"] for row in figures["rows"])
    # Programs were kept, and a second start takes them from there.
    kept = {path: path.stat().st_mtime for path in Path(environment["QUIKJAX_CACHE"]).rglob("*-cache")}
    assert kept
    again = quikjax_process(*arguments, "--samples", "2", "--json", "--kv-cache", "int8", "--logprobs", env=environment)
    assert [row["text"] for row in json.loads(again.stdout)["rows"]] == [row["text"] for row in figures["rows"]]
    assert set(Path(environment["QUIKJAX_CACHE"]).rglob("*-cache")) == set(kept)


@pytest.mark.long
def test_ctrl_c_keeps_the_text_and_ends_with_130(tiny_checkpoint: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "quikjax.cli", "generate", str(tiny_checkpoint), "hello", "--max-new-tokens", "250"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in errors


def test_a_chat_from_standard_input(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "template").write_text(TEMPLATE, encoding="utf-8-sig")
    arguments = ("chat", tiny_checkpoint, "--template", tmp_path / "template", "--max-new-tokens", "5")
    talk = b"hello\r\n/nothing\ncaf\xe9\n/system be brief\nhello\n/reset\n" + b"x" * 300 + b"\n/quit\nnever read\n"
    done = subprocess.run(
        [sys.executable, "-m", "quikjax.cli", *map(str, arguments)],
        input=talk,
        capture_output=True,
        timeout=300,
        check=False,
    )
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert errors.count("tokens/s; prompt") == 2
    assert errors.count("the line is not UTF-8 text") == 1
    for said in ("no command /nothing", "the system message is set", "is forgotten", "exceed the model's context of 256"):
        assert said in errors


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (generate.generate, {}, "give one of a prompt and --prompt-file"),
        (generate.generate, {"prompt": "x", "temperature": -1.0}, "the temperature is 0"),
        (generate.generate, {"prompt": "x", "system": "y"}, "give --chat as well"),
        (generate.generate, {"prompt": "x", "logprobs": True}, "give --json as well"),
        (generate.generate, {"prompt": "x", "kv_cache": "int3"}, 'no KV cache of kind "int3"'),
        (generate.generate, {"prompt": "x", "stop": [""]}, "a stop string is empty"),
        (generate.generate, {"prompt": "x" * 250}, "exceed the model's context of 256"),
        (generate.generate, {"prompt": "x", "context": 20}, "exceed the model's context of 20"),
        (generate.generate, {"prompt_file": Path("none")}, "none cannot be read (No such file"),
        (generate.generate, {"prompt": "x", "chat": True}, "no chat template, so it is a base model"),
        (chat.chat, {}, "no chat template, so it is a base model"),
        (chat.chat, {"template": Path("none")}, "none cannot be read (No such file"),
        (bench.bench, {"test": ["xx"]}, 'there is no test "xx"'),
        (bench.bench, {"test": ["pp512"]}, "pp512 exceeds the context of 256"),
        (bench.bench, {"output": "xml"}, 'there is no output "xml"'),
        (bench.bench, {"test": ["tg4"], "rounds": 0}, "at least 1 round"),
    ],
)
def test_a_mistake_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, command: Callable[..., None], options: dict[str, Any], message: str
) -> None:
    # A command sets up the compilation cache of its process, which is not this one's.
    monkeypatch.setattr(executables, "keep_executables", lambda named=None: Path())
    monkeypatch.setattr(speed, "bandwidth", lambda: 1e9)
    with pytest.raises(QuikError, match=re.escape(message)) as error:
        command(str(tiny_checkpoint), **options)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_named_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = executables.cache_directory()
    with pytest.raises(QuikError, match="name another folder with --cache-dir or QUIKJAX_CACHE"):
        executables.keep_executables(tmp_path / "file")
    assert executables.cache_directory() == before


@pytest.mark.long
def test_bench_measures_what_it_names(quikjax_command: Run, tiny_checkpoint: Path) -> None:
    arguments = (
        "bench",
        tiny_checkpoint,
        "-t",
        "pp16",
        "-t",
        "tg8",
        "-t",
        "pp16+tg4 @ 32",
        "-r",
        "2",
        "--against",
        tiny_checkpoint,
    )
    done = quikjax_command(*arguments, "-o", "json", "-b", "2", "--kv-cache", "int8")
    assert done.returncode == 0, done.stderr
    assert "against a float32 cache, keys are off by 0." in done.stderr
    rows = json.loads(done.stdout)
    assert [row["test"] for row in rows] == ["pp16", "tg8", "pp16+tg4 @ d32"]
    for row in rows:
        assert row["batch"] == 2
        assert len(row["samples"]) == 2
        assert row["mean"] == pytest.approx(sum(row["samples"]) / 2)
        assert row["over_against"] == 1
        assert row["peak_bytes"] > 4 * (257 * 64)  # at least the table
        assert (row["bytes_per_step"] is None) == ("pp" in row["test"])
    # float32 blocks (q, o: 64 x 64; k, v: 32 x 64; three of 112 x 64; two norms), tied table, final norm; nothing in the cache.
    # Panels have 16 rows each.
    blocks = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 112 * 64 + 2 * 64)
    table = 257 if why_no_compiled_products() else 272
    assert rows[1]["bytes_per_step"] == 4 * (blocks + table * 64 + 64)


@pytest.mark.long
def test_bench_needs_no_tokenizer_and_no_long_context(quikjax_command: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.name == "config.json" or file.suffix == ".safetensors":
            shutil.copy(file, bare)
    for where, context in ((bare, "64"), (tiny_checkpoint, "32")):
        done = quikjax_command("bench", where, "-t", "tg2", "-r", "1", "--kv-cache", "int8", "--context", context, "-o", "json")
        assert done.returncode == 0, done.stderr
        assert "against a float32 cache" not in done.stderr
