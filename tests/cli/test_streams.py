"""What is printed arrives, whatever the locale, the numbers and the streams are; and every command ends alike."""

import ast
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quikjax.cli import options, printing, streams
from quikjax.errors import Interrupted, QuikError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TEXT = "perplexity 1.0 ± 0.5, é → 日本 🙂"

# In a process of its own: commands that print what models may say, without a model.
PRINTS = """
import sys, warnings
TEXT = @
import quikjax.cli.app as application
from quikjax.cli.printing import print_json, show, say
@application.app.command("say")
def say_(kind: str) -> None:
    if kind == "text": show(TEXT)
    if kind == "json": print_json({"text": TEXT, "perplexity": float("inf"), "stderr": float("nan"), "list": [float("-inf")]})
    if kind == "warn": warnings.warn("overflow encountered in exp", RuntimeWarning); show("done")
    if kind == "interrupt": raise KeyboardInterrupt
    if kind == "progress": say(TEXT); show("done")
    if kind == "name": show("file caf\\udce9")
from quikjax.cli import main
main()
""".replace("@", ascii(TEXT), 1)


def say(kind: str, *, close: str = "", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    command = f'exec "$0" -c "$1" say {kind} {close}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, PRINTS], capture_output=True, env={**os.environ, **environment}, check=False
    )


LOCALES = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "utf-8"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=lambda locale: " ".join(f"{name}={value}" for name, value in locale.items()))
def test_nothing_is_lost_in_any_locale(locale: dict[str, str]) -> None:
    done = say("text", **locale)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = {
        "ascii": b"perplexity 1.0 +- 0.5, \\xe9 -> \\u65e5\\u672c \\U0001f642\n",
        "latin-1": b"perplexity 1.0 \xb1 0.5, \xe9 -> \\u65e5\\u672c \\U0001f642\n",
    }
    assert done.stdout in (expected.get(locale.get("PYTHONIOENCODING", ""), TEXT.encode() + b"\n"), expected["ascii"])
    figures = json.loads(say("json", **locale).stdout)
    assert figures == {"text": TEXT, "perplexity": None, "stderr": None, "list": [None]}


def test_streams_that_are_closed_or_full() -> None:
    assert say("progress", close="2>&-").stdout == b"done\n"
    assert say("text", close=">&-").returncode == 0
    full = say("text", close=">/dev/full")
    assert full.returncode == 1
    assert TEXT in full.stderr.decode()
    assert full.stderr.decode().splitlines()[-1].startswith("error: the result could not be written to standard output (No space")


def test_a_warning_has_no_path() -> None:
    done = say("warn")
    assert (done.stdout, done.stderr) == (b"done\n", b"warning: overflow encountered in exp\n")


def test_a_files_name_that_is_no_text_is_printed_as_it_is() -> None:
    assert say("name", PYTHONIOENCODING="utf-8").stdout == b"file caf\xe9\n"


def test_every_result_goes_through_show() -> None:
    """A bare `print` on stdout would lose its result where stdout cannot be written."""
    for path in Path(printing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                to_stderr = any(keyword.arg == "file" for keyword in node.keywords)
                assert to_stderr or path.name in ("printing.py", "app.py"), f"{path.name}:{node.lineno}"


def layer_result(**fields: Any) -> Any:
    """A layer of W4A4, with these fields in place of its own."""
    from quikjax.quantizing.params import LayerResult

    own: dict[str, Any] = {
        "path": "model.layers.0.mlp.up_proj.weight",
        "format": "W4A4",
        "outputs": 8,
        "inputs": 16,
        "method": "rtn",
        "weight_bits": 4,
        "activation_bits": 4,
        "outliers": 0,
        "relative_error": 0.1,
        "snr_db": 20.0,
        "damping": None,
        "bits_per_weight": 5.0,
    }
    return LayerResult(**{**own, **fields})


def test_exact_is_exact_in_both_places(capsys: pytest.CaptureFixture[str]) -> None:
    from quikjax.cli.report import _error_cells
    from quikjax.quantizing.recipe import find_recipe

    for error, snr, shown in ((0.0, float("inf"), "exact"), (float("nan"), float("nan"), "?"), (0.1, 20.0, "20.0 dB")):
        result = layer_result(relative_error=error, snr_db=snr)
        printing.ProgressLines(find_recipe("rtn-w4a4")).layer(result, 1.0)
        assert capsys.readouterr().err.split()[4:-2] == shown.split()
        stored = None if error != error else error  # as a report keeps it

        class Report:
            @staticmethod
            def snr_db(error: float | None) -> float | None:
                return 20.0 if error else None

        assert _error_cells(Report, stored)[1] == shown  # type: ignore[arg-type]


@pytest.mark.parametrize(("recipe", "said"), [("quik-4b", True), ("quik-4b+", False)])
def test_a_damping_that_no_rule_asked_for_is_said(recipe: str, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    from quikjax.quantizing.recipe import find_recipe

    result = layer_result(method="gptq", damping=0.1)
    printing.ProgressLines(find_recipe(recipe)).layer(result, 1.0)
    assert capsys.readouterr().err.endswith("damping 0.1\n") == said


def test_interrupts_end_alike(quikjax_command: Run) -> None:
    done = say("interrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")
    from quikjax.cli.app import app

    for command in app.registered_commands:
        callback: Any = command.callback
        inner = callback.__wrapped__
        assert inner is not callback, command.name

    def interrupted() -> None:
        raise KeyboardInterrupt

    from quikjax.cli.app import interruptible

    with pytest.raises(Interrupted):
        interruptible(interrupted)()


def test_a_real_interrupt_of_quantize(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(tiny_checkpoint), "--out", str(tmp_path / "a"), "--samples", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "quikjax.cli", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            # The default length of a calibration sequence is what the context allows.
            if line.startswith("calibration"):
                assert "2 x 256 tokens" in line
            if "dB" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert rest.splitlines()[-1] == "interrupted; finished blocks are kept, run the same command again to go on"
    assert "Traceback" not in rest
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (None, "standard input, which is closed"),
        (b"caf\xe9", "the prompt on standard input is not UTF-8 text (byte 3)"),
        ("x".encode("utf-16"), "the prompt on standard input is UTF-16 text"),
        (b"", "the prompt is empty"),
        (b"\xef\xbb\xbf", "the prompt is empty"),
    ],
)
def test_a_prompt_on_standard_input_that_is_none(monkeypatch: pytest.MonkeyPatch, stdin: bytes | None, said: str) -> None:
    monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(QuikError) as caught:
        options.read_prompt("-")
    assert said in str(caught.value)


def test_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfhello"), encoding="ascii"))
    assert options.read_prompt("-") == "hello"
    assert options.read_prompt("\ufeffhello") == "hello"
    for wrong in ("caf\udce9", "\ud800"):
        with pytest.raises(QuikError, match="the prompt is not UTF-8 text"):
            options.read_prompt(wrong)


def test_a_closed_standard_input_by_command(tiny_checkpoint: Path) -> None:
    command = f'"{sys.executable}" -m quikjax.cli generate "{tiny_checkpoint}" - <&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "error: the prompt - is read from standard input, which is closed; pipe a text into it"


def test_the_encoder_gives_up_on_nothing() -> None:
    assert streams._encode(UnicodeEncodeError("ascii", "±", 0, 1, "")) == ("+-", 1)
    with pytest.raises(UnicodeDecodeError):
        streams._encode(UnicodeDecodeError("ascii", b"\xff", 0, 1, ""))
