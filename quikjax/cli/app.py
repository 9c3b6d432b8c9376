"""The command line's application: every command, one file each, under its name."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from quikjax.cli import (
    bench,
    chat,
    classify,
    demo,
    embed,
    evaluate,
    export,
    failure,
    generate,
    plan,
    quantize,
    recipe,
    recover,
    report,
    scaling,
    study,
    train,
)
from quikjax.errors import Interrupted
from quikjax.version import __version__


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with Ctrl-C in it an `Interrupted`, which `main` knows how to end; the parser would end it in its own ways."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt as error:
            raise Interrupted(*error.args) from None

    return run


class _App(typer.Typer):
    """Commands that all end the same way on Ctrl-C."""

    def command(self, *args: Any, **options: Any) -> Any:
        register = super().command(*args, **options)
        return lambda command: register(interruptible(command))


app = _App(
    name="quikjax",
    help="Published language models in QUIK 4-bit format, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> bool:
    if wanted:
        print(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


app.command("plan")(plan.plan)
app.command("recipe")(recipe.recipe)
app.command("quantize")(quantize.quantize)
app.command("recover")(recover.recover)
app.command("train")(train.train)
app.command("accuracy")(train.accuracy)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("embed")(embed.embed)
app.command("classify")(classify.classify)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.eval_)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("demo")(demo.demo)
study.app.command("scaling")(scaling.scaling)
study.app.command("failure")(failure.failure)
app.add_typer(study.app, name="study")
