"""The log in an artifact: a line per run and per layer, whole after every accident."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quikjax.checkpoint import Reader
from quikjax.errors import QuikError
from quikjax.quantizing.checkpoint import NoProgress, quantize_checkpoint
from quikjax.quantizing.layer_log import LayerLog
from quikjax.quantizing.params import LayerResult
from quikjax.quantizing.recipe import Recipe, Rule

# Rounding to nearest, without data: quick.
RECIPE = Recipe(
    name="some",
    rules=(
        Rule(match=r"down_proj\.weight$", weight_bits=8, activation_bits=8, method="rtn", outliers=0),
        Rule(match=r"[qkvo]_proj\.weight$", method="rtn", outliers=0),
    ),
)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class AfterTwo(NoProgress):
    """When two blocks are done, do something."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def start(self, blocks: int, finished: int) -> None: ...
    def layer(self, report: LayerResult, seconds: float) -> None: ...

    def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
        if done == 2:
            self.action()


def test_a_line_for_the_run_and_for_each_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPE)
    run, *layers = records(tmp_path / "a" / "log.jsonl")
    assert (run["finished_blocks"], run["blocks"]) == (0, 3)
    assert run["run"].endswith("+00:00")
    # The report's rows, and what the report cannot hold.
    assert [{name: row[name] for name in row if name not in ("bytes", "seconds")} for row in layers] == done.layers
    parts = Reader(tmp_path / "a").parts
    for row in layers:
        part = parts[row["path"].rpartition(".self_attn")[0] or row["path"].rpartition(".mlp")[0]]
        assert row["bytes"] == sum(
            np.prod(array.shape) * (0.5 if array.dtype == "int4" else np.dtype(array.dtype).itemsize)
            for name, array in part.arrays.items()
            if name.startswith(row["path"] + ".")
        )
        assert 0 <= row["seconds"] < 60
    # The manifest knows nothing of it: without it the artifact is the same, and whole.
    (tmp_path / "a" / "log.jsonl").unlink()
    assert Reader(tmp_path / "a").manifest.fingerprint == done.fingerprint


def test_a_run_that_goes_on_appends_and_others_begin_anew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    log = tmp_path / "a.partial" / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPE, progress=AfterTwo(stop))
    assert len(records(log)) == 1 + 10
    log.write_text(log.read_text() + '{"path": "model.la')  # a power cut
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPE)
    done = records(tmp_path / "a" / "log.jsonl")
    assert [row["finished_blocks"] for row in done if "run" in row] == [0, 2]
    assert len({row["path"] for row in done if "path" in row}) == 15
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPE, force=True)
    assert len(records(tmp_path / "a" / "log.jsonl")) == 1 + 15
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "b", RECIPE, progress=AfterTwo(stop))
    quantize_checkpoint(tiny_checkpoint, tmp_path / "b", RECIPE, restart=True)
    assert len(records(tmp_path / "b" / "log.jsonl")) == 1 + 15


def test_a_full_disk_ends_the_run_so_that_it_can_go_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "a.partial" / "log.jsonl"

    def fill() -> None:
        log.unlink()
        log.symlink_to("/dev/full")

    with pytest.raises(QuikError, match=r"cannot write .*log.jsonl: No space left on device; make room and run the same"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPE, progress=AfterTwo(fill))
    assert not (tmp_path / "a").exists()
    log.unlink()
    quantize_checkpoint(tiny_checkpoint, tmp_path / "a", RECIPE)
    assert [row.get("finished_blocks") for row in records(tmp_path / "a" / "log.jsonl")] == [2, *[None] * 5]


def test_an_error_that_is_not_finite_is_null(tmp_path: Path) -> None:
    report = LayerResult(
        path="x",
        format="W4A4",
        outputs=8,
        inputs=16,
        method="rtn",
        weight_bits=4,
        activation_bits=4,
        outliers=0,
        relative_error=float("nan"),
        snr_db=float("inf"),
        damping=None,
        bits_per_weight=5.0,
    )
    log = LayerLog(tmp_path / "log", anew=True)
    log.layer(report, 1.23456)
    (row,) = records(tmp_path / "log")
    assert (row["relative_error"], row["snr_db"], row["bytes"], row["seconds"]) == (None, None, 80, 1.235)
