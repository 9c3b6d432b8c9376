"""Ablations on a tiny model: cells are what they say, a study goes on where it stopped, mistakes come before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from quikjax.cli import study as cli
from quikjax.errors import QuikError
from quikjax.quantizing.recipe import find_recipe
from quikjax.study.ablations import ABLATIONS, Setting, ablation_study, varied_recipe


@pytest.fixture
def setting(tiny_checkpoint: Path, tmp_path: Path) -> Setting:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + 7 * i % 26) for i in range(2000)))
    return Setting(
        model=str(tiny_checkpoint), calibration=str(text), evaluation=str(text), samples=1, seqlen=32, window=32, windows=2
    )


def test_parameters_become_recipes() -> None:
    assert varied_recipe({}) == find_recipe("quik-4b")
    assert {rule.model_dump()["outliers"] for rule in varied_recipe({"outliers": 0.125}).rules} == {0.125}
    assert varied_recipe({"recipe": "rtn-w4a4"}) == find_recipe("rtn-w4a4")
    wide = [
        (rule.weight_bits, rule.activation_bits, rule.model_dump()["clip"])
        for rule in varied_recipe({"down_proj": "W4A16", "clip": False}).rules
    ]
    assert wide == [(4, 16, False), (4, 4, False), (4, 16, False), (4, 4, False)]
    for ablation in ABLATIONS.values():
        for parameters in ablation.cells:
            if "weights_only" not in parameters:
                varied_recipe(parameters)


def test_the_command_line_names_all_of_them(setting: Setting) -> None:
    assert set(cli.ABLATIONS) == set(ABLATIONS)


def test_every_cell_of_every_ablation_has_a_command(setting: Setting) -> None:
    for name, ablation in ABLATIONS.items():
        study = ablation_study(name, setting)
        assert [dict(cell.parameters) for cell in study.cells] == list(ablation.cells)
        assert study.cells[1].command.startswith(f"quikjax study {name} ")
        assert study.cells[1].command.endswith("--cell 1")
        assert [dict(cell.parameters) for cell in ablation_study(name, setting, 1).cells] == [ablation.cells[1]]
        assert set(ablation.paper) <= {_first_label(parameters) for parameters in ablation.cells}


def _first_label(parameters: Any) -> str:
    from quikjax.study.ablations import _label

    return _label(parameters)


def test_a_study_runs_prints_and_goes_on(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding to nearest, without data, is quick; its outliers-free recipe stands for QUIK's.
    monkeypatch.setitem(
        ABLATIONS,
        "methods",
        ABLATIONS["methods"].__class__(
            title="T.", cells=[{"recipe": "rtn-w4a4"}, {"recipe": "rtn-w8a8"}, {"weights_only": "rtn-w4-g128"}]
        ),
    )
    app = typer.Typer()
    app.add_typer(cli.app, name="study")
    options = ["--out", str(tmp_path / "out"), "--samples=1", "--seqlen=32", "--window=32", "--windows=2"]
    arguments = ["study", "methods", setting.model, *options]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "3 cells, 0 done" in dry.stdout
    assert not (tmp_path / "out").exists()
    one = CliRunner().invoke(app, [*arguments, "--cell", "0", "--json"])
    assert one.exit_code == 0, one.output
    whole = CliRunner().invoke(app, arguments)
    assert whole.exit_code == 0, whole.output
    assert "1 of them finished by an earlier run" in whole.stderr
    assert whole.stdout.startswith("T.\n\n| recipe / weights_only ")
    stored = json.loads((tmp_path / "out" / "study.json").read_text())
    four, eight, weights = (row["result"] for row in stored["rows"])
    assert json.loads(one.stdout)["rows"][0]["result"] == four
    assert eight["kl"] < four["kl"]
    assert eight["bits_per_weight"] > 8 > four["bits_per_weight"] > weights["bits_per_weight"] > 4
    dry = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert [cell["finished"] for cell in json.loads(dry.stdout)["cells"]] == [True, True, True]


def test_mistakes_come_before_any_work(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(QuikError, match="study damping has cells 0 to 3, not 4"):
        ablation_study("damping", setting, 4)
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(QuikError, match="are needed; give more text"):
        ablation_study("damping", Setting(**{**setting.__dict__, "calibration": str(short)}))
    with pytest.raises(QuikError, match="fewer than one window"):
        ablation_study("damping", Setting(**{**setting.__dict__, "evaluation": str(short)}))
    (tmp_path / "file").write_text("")
    app = typer.Typer()
    app.add_typer(cli.app, name="study")
    done = CliRunner().invoke(app, ["study", "damping", setting.model, "--out", str(tmp_path / "file")])
    assert isinstance(done.exception, QuikError)
    assert "cannot write to" in str(done.exception)
