"""A grid goes on where it was killed, to the same bytes; its file is never read for other inputs, nor written by two."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.reports.charts import LineChart, Point
from quikjax.study.grid import Cell, Row, finished_cells, run_grid
from quikjax.study.results import Study, check_directory

CELLS = [Cell({"outliers": count, "clip": clip}, f"study --outliers {count}") for count in (0, 4) for clip in (False, True)]
INPUTS = {"model": "abc"}


def square(cell: Cell) -> dict[str, Any]:
    return {"kl": cell.parameters["outliers"] ** 2 + np.float32(0.5), "worse": float("inf"), "of": [np.float64("nan"), 1]}


def test_rows_are_json_and_come_in_the_cells_order(tmp_path: Path) -> None:
    rows = run_grid(CELLS, square, tmp_path / "deep" / "rows.jsonl", inputs=INPUTS)
    assert [row.parameters for row in rows] == [dict(cell.parameters) for cell in CELLS]
    assert rows[2].result == {"kl": 16.5, "worse": None, "of": [None, 1]}
    assert rows[2].command == "study --outliers 4"
    lines = (tmp_path / "deep" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row.as_json() for row in rows]


@pytest.mark.parametrize("cut", [0, 1, 40, -1, -30])
def test_a_killed_grid_goes_on_to_the_same_bytes(tmp_path: Path, cut: int) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    run_grid(CELLS, square, whole, inputs=INPUTS)
    half.write_bytes(whole.read_bytes()[:cut])
    computed = []

    def counted(cell: Cell) -> dict[str, Any]:
        computed.append(cell)
        return square(cell)

    already = sum(finished_cells(CELLS, half, INPUTS))
    run_grid(CELLS, counted, half, inputs=INPUTS)
    assert half.read_bytes() == whole.read_bytes()
    assert len(computed) == len(CELLS) - already


def test_a_process_killed_inside_a_cell_keeps_the_cells_before(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    script = f"""
import os, signal
from quikjax.study.grid import Cell, run_grid
def compute(cell):
    if cell.parameters["i"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {{"twice": 2 * cell.parameters["i"]}}
run_grid([Cell({{"i": i}}) for i in range(4)], compute, {str(path)!r}, inputs={{}})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    cells = [Cell({"i": i}) for i in range(4)]
    assert finished_cells(cells, path, {}) == [True, True, False, False]
    rows = run_grid(cells, lambda cell: {"twice": 2 * cell.parameters["i"]}, path, inputs={})
    assert [row.result["twice"] for row in rows] == [0, 2, 4, 6]


def test_other_inputs_and_other_parameters_are_other_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    run_grid(CELLS[:2], square, path, inputs=INPUTS)
    assert finished_cells(CELLS, path, INPUTS) == [True, True, False, False]
    assert finished_cells(CELLS, path, {"model": "abd"}) == [False] * 4
    assert finished_cells([Cell({"clip": False, "outliers": 0})], path, INPUTS) == [True]
    run_grid(CELLS, square, path, inputs={"model": "abd"})
    assert len(path.read_text().splitlines()) == 6


def test_an_error_in_a_cell_keeps_the_cells_before(tmp_path: Path) -> None:
    def fails(cell: Cell) -> dict[str, Any]:
        if cell == CELLS[2]:
            raise QuikError("no room")
        return square(cell)

    with pytest.raises(QuikError, match="no room"):
        run_grid(CELLS, fails, tmp_path / "rows", inputs=INPUTS)
    assert finished_cells(CELLS, tmp_path / "rows", INPUTS) == [True, True, False, False]


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with pytest.raises(QuikError, match=r"two cells have the same parameters \(outliers 0, clip false\)"):
        run_grid([CELLS[0], CELLS[0]], square, path, inputs=INPUTS)
    with pytest.raises(QuikError, match="cannot be saved as JSON"):
        run_grid([Cell({"x": object()})], square, path, inputs=INPUTS)
    path.write_text('{"key": 1}\n')
    with pytest.raises(QuikError, match=r"line 1 of .* is no row of a study"):
        run_grid(CELLS, square, path, inputs=INPUTS)
    path.unlink()
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(QuikError, match="another run is writing"):
            run_grid(CELLS, square, path, inputs=INPUTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(QuikError, match="cannot write to"):
        check_directory(tmp_path / "file" / "below")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(QuikError, match="cannot write to"):
            check_directory(tmp_path / "locked")


def test_a_study_ends_in_a_table_a_plot_and_json(tmp_path: Path) -> None:
    def table(rows: Any) -> tuple[list[str], list[list[str]]]:
        return ["outliers", "KL"], [[str(row.parameters["outliers"]), str(row.result["kl"])] for row in rows]

    def chart(rows: Sequence[Row]) -> LineChart:
        points = [Point(row.parameters["outliers"], row.result["kl"], 0.1) for row in rows]
        return LineChart(title="KL & outliers", x="outliers", y="KL", series={"a<b": points, "c": points}, rules={"paper": 3.0})

    study = Study(
        name="outliers",
        title="One title.",
        inputs=INPUTS,
        cells=CELLS[::2],
        compute=square,
        table=table,
        chart=chart,
        notes=["Why."],
    )
    assert study.finished(tmp_path) == [False, False]
    result = study.run(tmp_path)
    assert study.finished(tmp_path) == [True, True]
    assert (tmp_path / "table.md").read_text() == result.markdown()
    assert "| 4        | 16.5 |" in result.markdown()
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored["rows"][1]["command"] == "study --outliers 4"
    assert stored["notes"] == ["Why."]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    study.run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
