"""`quikjax eval` in this process: its figures, what it records, and the mistakes it finds before it works."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from quikjax.checkpoint import read_manifest, save
from quikjax.cli.evaluate import eval_
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.reports.evaluations import evaluations_file, read_evaluations
from quikjax.testing import tiny_model, tiny_tokenizer, write_tiny_checkpoint

app = typer.Typer()
app.command()(eval_)
ARGUMENTS = ("--perplexity", "pydoc", "--window", "32", "--windows", "3")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, str]:
    """An artifact of another seed's weights that says it was made from the original, the original, and a stranger."""
    directory = tmp_path_factory.mktemp("eval")
    known = {"source": open_source(tiny_checkpoint).fingerprint()}
    save(directory / "artifact", tiny_model(1), tokenizer=tiny_tokenizer(), provenance=known)
    stranger = write_tiny_checkpoint(directory / "stranger", seed=2)
    return {"artifact": str(directory / "artifact"), "original": str(tiny_checkpoint), "stranger": str(stranger)}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_figures_are_printed_and_recorded(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (places["artifact"], *ARGUMENTS, "--against", places["original"], "--save")
    monkeypatch.setattr("sys.argv", ["quikjax", "eval", *arguments])
    printed = run(*arguments)
    figures = json.loads(run(*arguments, "--json"))
    assert printed.startswith(f"perplexity {figures['perplexity']:.4f} ± {figures['stderr']:.4f}")
    for shown in ("KL divergence", "99.9 %", "top-1 agreement", "ln of their ratio", "right token's probability", "| 16-31"):
        assert shown in printed
    assert figures["text"].startswith("pydoc_data.topics")
    assert (figures["bos"], figures["stride"], figures["own_original"]) == ("none", 32, True)
    fingerprint = read_manifest(places["artifact"]).fingerprint
    (record,) = read_evaluations(places["artifact"], fingerprint)
    assert record.result["kl"] == figures["kl"]
    assert record.protocol["windows"] == 3
    assert record.command.startswith("quikjax eval ")
    assert read_evaluations(places["artifact"], "another") == []
    assert len(evaluations_file(places["artifact"]).read_text().splitlines()) == 2


def test_by_layer_of_a_model_without_quantized_layers(places: dict[str, str]) -> None:
    arguments = (places["artifact"], *ARGUMENTS, "--against", places["original"], "--by-layer")
    printed = run(*arguments)
    assert "| model.layers.2" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["artifact"], "nothing to evaluate; give --perplexity"),
        (["artifact", *ARGUMENTS, "--by-layer"], "--by-layer compares with an original"),
        (["artifact", *ARGUMENTS, "--against", "stranger"], "allow any with --any-original"),
        (["original", *ARGUMENTS, "--save"], "--save records evaluations of an artifact"),
        (["artifact", *ARGUMENTS, "--stride", "33"], "stride must be between 1 and the window's 32"),
        (["artifact", "--perplexity", "pydocs"], 'did you mean "pydoc"'),
    ],
)
def test_mistakes(places: dict[str, str], arguments: list[str], message: str) -> None:
    with pytest.raises(QuikError, match=message):
        run(*(places.get(argument, argument) for argument in arguments))


def test_another_original_is_allowed_and_said(places: dict[str, str]) -> None:
    arguments = (places["artifact"], *ARGUMENTS, "--against", places["stranger"], "--any-original", "--json")
    result = CliRunner().invoke(app, list(arguments))
    assert "note: " in result.stderr
    assert json.loads(result.stdout)["own_original"] is False
