"""`quikjax study NAME`: grids of runs that end in a table, a plot and JSON. A killed study goes on where it stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.cli.options import Json
from quikjax.cli.printing import duration, print_json, say, show

if TYPE_CHECKING:
    from quikjax.study.grid import Cell, Progress, Row
    from quikjax.study.results import Study, StudyResult

# A study is a command of this application: its options become a `Study`, which `carry_out` runs and prints.
app = typer.Typer(no_args_is_help=True)


@app.callback()
def studies() -> None:
    """Ablations, scaling laws, failure analysis: table, plot and JSON. A killed study goes on where it stopped."""


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


def carry_out(
    study: "Study", out: Path, *, dry_run: bool, as_json: bool, progress: "Progress | None" = None
) -> "StudyResult | None":
    """Run a study in `out`, print its table and return it, or with `dry_run` print only its cells.

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
            return None
        for cell, finished in zip(study.cells, done, strict=True):
            show(f"{'done   ' if finished else 'missing'}  {cell.label}\n         {cell.command}")
        show(f"{len(done)} cells, {sum(done)} done")
        return None
    check_directory(out)
    result = study.run(out, progress or GridLines())
    say(f"rows, table, plot and JSON are in {out}")
    if as_json:
        print_json(result.as_json())
    else:
        show(result.markdown().rstrip())
    return result


# Names and first lines of the ablations; the cells are in `quikjax.study.ablations`, which is heavy to import.
ABLATIONS = {
    "outliers": "How many outlier columns.",
    "down-proj": "How many bits for down_proj, weights and activations.",
    "threshold": "The threshold below which a layer has no outliers.",
    "outlier-text": "Outliers from one text, judged on another.",
    "calibration-size": "How much calibration text.",
    "damping": "GPTQ's damping.",
    "hessians": "Hessians through quantized blocks, or of the original.",
    "order": "The order in which GPTQ rounds columns.",
    "methods": "QUIK beside what is known.",
}


def _ablation(name: str) -> Callable[..., None]:
    def study(
        model: Annotated[str, typer.Argument(help="A published model, unquantized.")] = "smollm2-135m",
        out: Annotated[
            Path | None,
            typer.Option(help="Directory for rows, table, plot and JSON; left out, studies/NAME. A killed run goes on."),
        ] = None,
        calibration: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, wikitext2, ptb or c4.")] = "pydoc",
        evaluation: Annotated[str, typer.Option(help="The text to measure on, named as --calibration.")] = "pydoc",
        samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 16,
        seqlen: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 2048,
        window: Annotated[int, typer.Option(help="Tokens per evaluation window.")] = 2048,
        windows: Annotated[int, typer.Option(help="Evaluation windows.")] = 3,
        cell: Annotated[int | None, typer.Option(help="Only the cell of this number.")] = None,
        dry_run: DryRun = False,
        as_json: Json = False,
    ) -> None:
        from quikjax.study.ablations import Setting, ablation_study, default_directory
        from quikjax.study.results import check_directory

        target = default_directory(name) if out is None else out
        if not dry_run:
            check_directory(target)
        setting = Setting(
            model=model,
            calibration=calibration,
            evaluation=evaluation,
            samples=samples,
            seqlen=seqlen,
            window=window,
            windows=windows,
        )
        carry_out(ablation_study(name, setting, cell), target, dry_run=dry_run, as_json=as_json)

    study.__doc__ = ABLATIONS[name]
    return study


for _name in ABLATIONS:
    app.command(_name)(_ablation(_name))
