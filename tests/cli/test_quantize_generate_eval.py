"""The command line as a person uses it: arguments, exit status, stdout and stderr."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def artifact(quikjax_command: Run, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "quik-4b"
    arguments = ("--samples", "4", "--seqlen", "64", "--activation-memory", "0.0003", "--json")
    done = quikjax_command("quantize", tiny_checkpoint, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["quantized_layers"] == 21
    assert 4 < figures["bits_per_weight"] < 8
    assert len(figures["layers"]) == 21
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("calibration")] == [
        "calibration  4 x 64 tokens of pydoc_data.topics (the other three of four topics)"
    ]
    assert "activations  in memory up to 0.3 MB, beyond that on disk" in lines
    assert len((out / "log.jsonl").read_text().splitlines()) == 1 + 21
    assert sum("dB" in line for line in lines) == 21
    assert any("W8A8" in line and "down_proj" in line for line in lines)
    return out


def test_generate_prints_only_the_continuation(quikjax_command: Run, quikjax_process: Run, artifact: Path) -> None:
    done = quikjax_process("generate", artifact, "hello", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    from_stdin = quikjax_command("generate", artifact, "-", "--max-new-tokens", "5", "--json", stdin="hello\n")
    figures = json.loads(from_stdin.stdout)
    assert done.stdout == figures["text"] + "\n"
    assert figures["prompt_tokens"] == 5
    assert "tokens/s" in done.stderr


def test_eval_prints_what_it_promises(quikjax_command: Run, artifact: Path, tiny_checkpoint: Path) -> None:
    arguments = ("--perplexity", "pydoc", "--window", "32", "--windows", "3")
    done = quikjax_command("eval", artifact, *arguments, "--against", tiny_checkpoint, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {"perplexity", "stderr", "tokens", "tokens_per_second", "kl", "top1_agreement"} <= set(figures)
    assert figures["tokens"] == 3 * 31
    plain = quikjax_command("eval", artifact, *arguments)
    assert plain.stdout.startswith(f"perplexity {figures['perplexity']:.4f} ± ")
    assert "3 windows of 32 tokens" in plain.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "no-such-dir", "--out", "x"], "there is no model"),
        (["quantize", "MODEL", "--out", "x", "--recipe", "quik4b"], 'did you mean "quik-4b"'),
        (["quantize", "MODEL", "--out", "x", "--outliers", "many"], "--outliers takes a count or a fraction"),
        (["quantize", "MODEL", "--out", "x", "--outliers", "3/2"], "between 0 and 1"),
        (["quantize", "MODEL", "--out", "x", "--calibration", "EMPTY"], "is empty"),
        (["quantize", "MODEL", "--out", "x", "--calibration", "SHORT"], "are needed; give more text"),
        (["quantize", "MODEL", "--out", "x", "--dtype", "float64"], 'no dtype "float64"'),
        (["quantize", "MODEL", "--out", "x", "--activation-memory", "0"], "more than 0, not 0"),
        (
            ["quantize", "MODEL", "--out", "x", "--seqlen", "64", "--activation-memory", "1e-5"],
            "take 0.111 MB at once and --activation-memory allows 0.01 MB; give --activation-memory 0.001 (GB) or more",
        ),
        (["quantize", "MODEL", "--out", "MODEL"], "exists and is not an artifact of quikjax"),
        (["generate", "ARTIFACT", ""], "the prompt is empty"),
        (["generate", "ARTIFACT", "x" * 250, "--max-new-tokens", "60"], "exceed the model's context of 256"),
        (["eval", "ARTIFACT", "--perplexity", "SHORT", "--window", "64"], "fewer than one window"),
        (["eval", "ARTIFACT", "--perplexity", "pydoc", "--window", "300", "--windows", "1"], "exceeds the model's context"),
        (["eval", "ARTIFAC", "--perplexity", "pydoc"], "there is no model"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    quikjax_command: Run, tiny_checkpoint: Path, artifact: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a few words")
    names = {"MODEL": tiny_checkpoint, "ARTIFACT": artifact, "EMPTY": tmp_path / "empty", "SHORT": tmp_path / "short"}
    given = [str(names.get(argument, tmp_path / "x" if argument == "x" else argument)) for argument in arguments]
    done = quikjax_command(*given)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [["generate", "ARTIFACT", ""], ["eval", "nowhere", "--perplexity", "pydoc"]])
def test_debug_shows_the_traceback_of_a_mistake(quikjax_command: Run, artifact: Path, arguments: list[str]) -> None:
    given = [str(artifact) if argument == "ARTIFACT" else argument for argument in arguments]
    assert "Traceback" in quikjax_command("--debug", *given).stderr


def test_help_and_usage(quikjax_command: Run) -> None:
    done = quikjax_command("--help")
    assert done.returncode == 0
    for command in ("quantize", "generate", "eval", "demo"):
        assert command in done.stdout
    assert quikjax_command("--version").stdout.strip()
    wrong = quikjax_command("quantise")
    assert wrong.returncode == 2
    assert "No such command" in wrong.stderr


def test_help_does_not_import_what_is_heavy(quikjax_command: Run) -> None:
    import sys

    script = "import sys; sys.argv = ['quikjax', '--help']\nfrom quikjax.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    script += "print([name for name in ('jax', 'flax', 'orbax', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
