"""Studies and their results: rows, a table, a plot and one JSON object, in a directory of its own.

DIR/rows.jsonl   one line per finished cell, written as it is finished (`grid`)
DIR/table.md     the table, and the further ones of studies that have them
DIR/plot.svg     the plot, where the study has one
DIR/NAME.svg     further plots, where it has them
DIR/study.json   all of it, with the command of every cell
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quikjax.checkpoint import atomic
from quikjax.errors import QuikError, resumable
from quikjax.files import user_path
from quikjax.reports.charts import LineChart, line_chart
from quikjax.reports.tables import markdown_table
from quikjax.study.grid import Cell, Progress, Row, finished_cells, run_grid

ROWS, TABLE, PLOT, RESULT = "rows.jsonl", "table.md", "plot.svg", "study.json"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table below a study's own, with a sentence of what it shows."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The sentence and the table."""
        return f"{self.title}\n\n{markdown_table(self.head, self.lines)}"

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"title": self.title, "head": list(self.head), "table": [list(line) for line in self.lines]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study, ready to run.

    `title` is one sentence above its table. `inputs` and `compute` are those of `run_grid`. `table` gives a head and rows of text
    from the finished rows, `chart` a chart or `None`; `notes` are sentences below the table: what to compare it with, and why it
    may differ. `further` gives tables that stand below them, and `charts` more charts, by the names of their files.
    """

    name: str
    title: str
    inputs: Mapping[str, Any]
    cells: Sequence[Cell]
    compute: Callable[[Cell], Mapping[str, Any]]
    table: Callable[[Sequence[Row]], tuple[Sequence[str], Sequence[Sequence[str]]]]
    chart: Callable[[Sequence[Row]], LineChart | None] = lambda _rows: None
    notes: Sequence[str] = ()
    further: Callable[[Sequence[Row]], Sequence[Table]] = lambda _rows: ()
    charts: Callable[[Sequence[Row]], Mapping[str, LineChart]] = lambda _rows: {}

    def finished(self, directory: str | os.PathLike[str]) -> list[bool]:
        """Which cells an earlier run in `directory` has finished."""
        return finished_cells(self.cells, user_path(directory) / ROWS, self.inputs)

    def run(self, directory: str | os.PathLike[str], progress: Progress | None = None) -> "StudyResult":
        """Compute what is missing and write table, plot and JSON to `directory`.

        Raises:
            QuikError: as `run_grid`; finished cells stay.
        """
        target = user_path(directory)
        rows = run_grid(self.cells, self.compute, target / ROWS, inputs=self.inputs, progress=progress)
        head, lines = self.table(rows)
        result = StudyResult(
            self.name,
            self.title,
            tuple(head),
            tuple(map(tuple, lines)),
            tuple(self.notes),
            self.inputs,
            rows,
            tuple(self.further(rows)),
        )
        chart = self.chart(rows)
        charts = {f"{name}.svg": drawn for name, drawn in self.charts(rows).items()} | ({} if chart is None else {PLOT: chart})
        with resumable(f"cannot write {target}"):
            atomic.write_text(target / TABLE, result.markdown())
            for name, drawn in charts.items():
                atomic.write_text(target / name, line_chart(drawn, standalone=True))
            atomic.write_text(target / RESULT, json.dumps(result.as_json(), allow_nan=False, indent=1) + "\n")
        return result


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    name: str
    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    inputs: Mapping[str, Any]
    rows: Sequence[Row]
    further: tuple[Table, ...] = ()

    def markdown(self) -> str:
        """Title, table and notes, and the further tables."""
        below = [*self.notes, *(table.markdown() for table in self.further)]
        return "\n".join([self.title, "", markdown_table(self.head, self.lines), *(f"\n{part}" for part in below)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "study": self.name,
            "title": self.title,
            "inputs": dict(self.inputs),
            "head": list(self.head),
            "table": [list(line) for line in self.lines],
            "notes": list(self.notes),
            "further": [table.as_json() for table in self.further],
            "rows": [row.as_json() for row in self.rows],
        }


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Say at once, before hours of work, that results cannot be written to `directory`; it is made if it is not there.

    Raises:
        QuikError: it is a file, or cannot be made or written.
    """
    target = user_path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuikError(f"cannot write to {target}: {error.strerror}; give another directory") from None
    if not os.access(target, os.W_OK | os.X_OK):
        raise QuikError(f"cannot write to {target}; give another directory")
