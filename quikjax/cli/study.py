"""`quikjax study NAME`: grids of runs that end in a table, a plot and JSON. A killed study goes on where it stopped."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.cli.printing import duration, print_json, say

if TYPE_CHECKING:
    from quikjax.study.grid import Cell, Row
    from quikjax.study.results import Study

# A study is a command of this application: its options become a `Study`, which `carry_out` runs and prints.
app = typer.Typer(no_args_is_help=True)


@app.callback()
def studies() -> None:
    """Ablations and scaling laws: table, plot and JSON. A killed study goes on where it stopped."""


Out = Annotated[Path, typer.Option(help="Directory for rows, table, plot and JSON; a run that was killed goes on in it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells, which of them are done, and their commands.")]


class GridLines:
    """Progress of a grid as lines on stderr: a line when a cell begins, and one when it is done."""

    def start(self, cells: int, finished: int) -> None:
        say(f"{cells} cells" + (f", {finished} of them finished by an earlier run" if finished else ""))

    def begin(self, cell: "Cell") -> None:
        say(f"  {cell.label} ...")

    def end(self, row: "Row", done: int, total: int, seconds: float, seconds_left: float) -> None:
        figures = ", ".join(
            f"{name} {value:.5g}" for name, value in row.result.items() if isinstance(value, int | float) and value is not True
        )
        left = f", about {duration(seconds_left)} left" if done < total else ""
        say(f"  cell {done} of {total} in {duration(seconds)}: {figures}{left}")


def carry_out(study: "Study", out: Path, *, dry_run: bool, as_json: bool) -> None:
    """Run a study in `out` and print its table, or with `dry_run` only its cells.

    Raises:
        QuikError: `out` cannot be written, which is found before any work; or as `Study.run`.
    """
    from quikjax.study.results import check_directory

    if dry_run:
        done = study.finished(out)
        if as_json:
            cells = [
                {"parameters": dict(cell.parameters), "command": cell.command, "finished": finished}
                for cell, finished in zip(study.cells, done, strict=True)
            ]
            print_json({"study": study.name, "cells": cells})
            return
        for cell, finished in zip(study.cells, done, strict=True):
            print(f"{'done   ' if finished else 'missing'}  {cell.label}\n         {cell.command}")
        print(f"{len(done)} cells, {sum(done)} done")
        return
    check_directory(out)
    result = study.run(out, GridLines())
    say(f"rows, table, plot and JSON are in {out}")
    if as_json:
        print_json(result.as_json())
    else:
        print(result.markdown(), end="")
