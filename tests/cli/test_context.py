"""`--context`, and lengths that are left out, in every command that loads a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from quikjax.cli.evaluate import eval_
from quikjax.cli.generate import generate
from quikjax.cli.plan import plan
from quikjax.cli.quantize import quantize
from quikjax.cli.recover import recover
from quikjax.errors import QuikError


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on sequences longer than the model declares."""
    out = tmp_path_factory.mktemp("artifacts") / "long"
    quantize(str(tiny_checkpoint), out, recipe="rtn-w4a4", context=300)
    return out


def evaluated(model: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    capsys.readouterr()
    eval_(str(model), "pydoc", windows=1, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_a_window_left_out_is_what_the_context_allows(
    artifact: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(tiny_checkpoint, capsys)["window"] == 256
    assert evaluated(artifact, capsys, context=300)["window"] == 300
    assert evaluated(artifact, capsys, context=40)["window"] == 40
    with pytest.raises(QuikError, match="exceeds the model's context of 40"):
        evaluated(tiny_checkpoint, capsys, context=40, window=41)


def test_generating_beyond_the_declared_context(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(QuikError, match="context of 256"):
        generate(str(artifact), "x" * 256, max_new_tokens=2)
    generate(str(artifact), "x" * 256, max_new_tokens=2, context=258)
    with pytest.raises(QuikError, match="context of 257"):
        generate(str(artifact), "x" * 256, max_new_tokens=2, context=257)


def test_lengths_of_quantize_and_plan(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(QuikError, match="exceeds the model's context of 128"):
        quantize(str(tiny_checkpoint), tmp_path / "a", seqlen=129, context=128)
    assert "x 128 tokens" not in capsys.readouterr().err
    with pytest.raises(QuikError, match="the calibration text has"):
        quantize(str(tiny_checkpoint), tmp_path / "a", samples=100_000, context=128)
    assert "100000 x 128 tokens" in capsys.readouterr().err
    plan(str(tiny_checkpoint), context=1024, as_json=True, memory=1.0)
    figures = json.loads(capsys.readouterr().out)
    assert (figures["length"], figures["seqlen"]) == (1024, 1024)
    assert not (tmp_path / "a").exists()


def test_outliers_beyond_the_columns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(QuikError, match=r"wants 1750 outlier columns of model\.layers\.0\.mlp\.down_proj\.weight, which has 112"):
        quantize(str(tiny_checkpoint), tmp_path / "a", outliers="1000")


@pytest.mark.long
def test_windows_of_recover(artifact: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, original = tmp_path / "out", str(tiny_checkpoint)
    for context, length in ((None, 256), (40, 40)):
        with pytest.raises(QuikError, match=f"windows of {length}; 100016 are needed"):
            recover(str(artifact), out, original, windows=100_000, context=context)
        assert f"windows of {length} tokens" in capsys.readouterr().err
    with pytest.raises(QuikError, match="--seqlen 300 exceeds the model's context of 256"):
        recover(str(artifact), out, original, steps=1, windows=1, validation=1, seqlen=300)
    recover(str(artifact), out, original, steps=1, windows=1, validation=1, evaluate_every=1, context=300, as_json=True)
    printed = capsys.readouterr()
    assert "windows of 300 tokens" in printed.err
    assert json.loads(printed.out)["kl_before"] > 0
