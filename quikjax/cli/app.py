"""The command line's application: every command, one file each, under its name."""

from typing import Annotated

import typer

from quikjax.cli import demo, evaluate, export, generate, plan, quantize, report, scaling, study
from quikjax.version import __version__

app = typer.Typer(
    name="quikjax",
    help="Published language models in QUIK 4-bit format, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


app.command("plan")(plan.plan)
app.command("quantize")(quantize.quantize)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.eval_)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("demo")(demo.demo)
study.app.command("scaling")(scaling.scaling)
app.add_typer(study.app, name="study")
