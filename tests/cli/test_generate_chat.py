"""`generate` and `chat` as a person runs them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"QUIKJAX_CACHE": str(tmp_path_factory.mktemp("executables"))}


def test_prompts_of_a_file_with_samples(
    quikjax_command: Run, tiny_checkpoint: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "prompts").write_text("one\na longer one\n")
    arguments = ("generate", tiny_checkpoint, "--prompt-file", tmp_path / "prompts", "--max-new-tokens", "6", "--top-k", "50")
    done = quikjax_command(*arguments, "--samples", "2", "--json", "--logprobs", "--kv-cache", "int8", env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [row["prompt"] for row in figures["rows"]] == [0, 0, 1, 1]
    assert all(len(row["logprobs"]) == row["new_tokens"] for row in figures["rows"])
    # Programs were kept, and a second start takes them from there.
    kept = {path: path.stat().st_mtime for path in Path(environment["QUIKJAX_CACHE"]).rglob("*-cache")}
    assert kept
    again = quikjax_command(*arguments, "--samples", "2", "--json", "--kv-cache", "int8", "--logprobs", env=environment)
    assert [row["text"] for row in json.loads(again.stdout)["rows"]] == [row["text"] for row in figures["rows"]]
    assert set(Path(environment["QUIKJAX_CACHE"]).rglob("*-cache")) == set(kept)


def test_ctrl_c_keeps_the_text_and_ends_with_130(tiny_checkpoint: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "quikjax.cli", "generate", str(tiny_checkpoint), "hello", "--max-new-tokens", "250"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert (first + rest).endswith(b"\n")
    assert b"Traceback" not in errors


def test_a_chat_from_standard_input(
    quikjax_command: Run, tiny_checkpoint: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "template").write_text(TEMPLATE)
    arguments = ("chat", tiny_checkpoint, "--template", tmp_path / "template", "--max-new-tokens", "5")
    talk = "hello\n/nothing\n/system be brief\nhello\n/reset\n" + "x" * 300 + "\n/quit\nnever read\n"
    done = quikjax_command(*arguments, stdin=talk, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens/s; prompt") == 2
    for said in ("no command /nothing", "the system message is set", "is forgotten", "exceed the model's context of 256"):
        assert said in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL"], "give one of a prompt and --prompt-file"),
        (["generate", "MODEL", "x", "--temperature", "-1"], "the temperature is 0"),
        (["generate", "MODEL", "x", "--system", "y"], "give --chat as well"),
        (["generate", "MODEL", "x", "--logprobs"], "give --json as well"),
        (["generate", "MODEL", "x", "--kv-cache", "int3"], 'no KV cache of kind "int3"'),
        (["generate", "MODEL", "x", "--context", "5000"], "the context may be 2 to 256"),
        (["generate", "MODEL", "x", "--stop", ""], "a stop string is empty"),
        (["generate", "MODEL", "--prompt-file", "none"], "cannot read none"),
        (["generate", "MODEL", "x", "--chat"], "no chat template, so it is a base model"),
        (["chat", "MODEL"], "no chat template, so it is a base model"),
        (["chat", "MODEL", "--template", "none"], "cannot read the template none"),
        (["generate", "MODEL", "x", "--cache-dir", "/proc/none"], "name another folder with --cache-dir"),
    ],
)
def test_a_mistake_is_one_sentence(
    in_process: Callable[[list[str]], str], tiny_checkpoint: Path, arguments: list[str], message: str
) -> None:
    said = in_process([str(tiny_checkpoint) if argument == "MODEL" else argument for argument in arguments])
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], tmp_path: Path
) -> Callable[[list[str]], str]:
    """Run a command that fails in this process (a new one would take seconds to import JAX), and return what it says."""
    import jax

    from quikjax.cli import main

    monkeypatch.chdir(tmp_path)
    # The command sets up a compilation cache, which must not outlive the test.
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("QUIKJAX_CACHE", environment["QUIKJAX_CACHE"])

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["quikjax", *arguments])
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
        assert ended.value.code == 1
        return capsys.readouterr().err

    return run


def test_bench_measures_what_it_names(quikjax_command: Run, tiny_checkpoint: Path, environment: dict[str, str]) -> None:
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
    done = quikjax_command(*arguments, "-o", "json", "-b", "2", env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["test"] for row in rows] == ["pp16", "tg8", "pp16+tg4 @ d32"]
    for row in rows:
        assert row["batch"] == 2
        assert len(row["samples"]) == 2
        assert row["mean"] == pytest.approx(sum(row["samples"]) / 2)
        assert row["over_against"] == 1
        assert (row["bytes_per_step"] is None) == ("pp" in row["test"])
    # float32 blocks (q, o: 64 x 64; k, v: 32 x 64; three of 112 x 64; two norms), tied table, final norm; nothing in the cache.
    blocks = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 112 * 64 + 2 * 64)
    assert rows[1]["bytes_per_step"] == 4 * (blocks + 257 * 64 + 64)


def test_bench_refuses_what_it_cannot_measure(in_process: Callable[[list[str]], str], tiny_checkpoint: Path) -> None:
    for arguments, message in (
        (["-t", "xx"], 'there is no test "xx"'),
        (["-t", "pp512"], "pp512 exceeds the context of 256"),
        (["-o", "xml"], 'there is no output "xml"'),
        (["-t", "tg4", "-r", "0"], "at least 1 round"),
    ):
        assert message in in_process(["bench", str(tiny_checkpoint), *arguments]).splitlines()[-1]
