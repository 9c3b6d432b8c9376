"""`quikjax chat`: talk with a model."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.cli.generation_options import DrawingOptions, RunningOptions, with_option_groups
from quikjax.cli.options import Model, check_models
from quikjax.errors import QuikError
from quikjax.files import typed_text

if TYPE_CHECKING:
    from quikjax.generation.chat import Answer

HELP = "/reset forgets the conversation, /system TEXT does so and sets the system message, /quit ends."


@with_option_groups
def chat(
    model: Model,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    *,
    drawing: DrawingOptions,
    running: RunningOptions,
) -> None:
    """Talk with a model in its own chat template. Answers are on stdout, everything else on stderr.

    /reset forgets the conversation, /system TEXT does so and sets the system message, /quit or the end of the input ends.
    Ctrl-C ends an answer; what was said stays.
    """
    check_models(model)
    running.check()
    sampling = drawing.sampling()
    chat_template = drawing.chat_template()

    from quikjax.cli.printing import say, show
    from quikjax.generation import Generator
    from quikjax.generation.chat import Conversation

    network, tokenizer = running.load(model)
    generator = Generator(network, tokenizer=tokenizer, cache=running.kv_cache, unrolled=running.unroll, release=True)
    conversation = Conversation(generator, template=chat_template, system=drawing.system)
    say(HELP)
    turn = 0
    while True:
        line = _line()
        if line is None or line == "/quit":
            return
        try:
            line = typed_text(line, "the line")
        except QuikError as error:
            say(f"error: {error}")
            continue
        if line == "/reset":
            conversation.reset()
            say("the conversation is forgotten")
        elif line == "/system" or line.startswith("/system "):
            conversation.reset(line.removeprefix("/system").strip())
            say("the conversation is forgotten, the system message is set")
        elif line.startswith("/"):
            say(f"there is no command {line.split()[0]}. {HELP}")
        elif line.strip():
            try:
                answer = conversation.ask(
                    line,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    # Each turn draws with a number of its own.
                    seed=(drawing.seed + turn) % 2**32,
                    on_text=lambda piece: show(piece, end=""),
                )
            except KeyboardInterrupt:
                show()
                say("(ended)")
                continue
            except QuikError as error:
                say(f"error: {error}")
                continue
            finally:
                turn += 1
            show()
            say(_footer(answer))


def _line() -> str | None:
    """The next line of the user's, `None` at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return None
    return line.rstrip("\r\n") if line else None


def _footer(answer: "Answer") -> str:
    forgotten = f", {answer.dropped} turn{'s' if answer.dropped > 1 else ''} forgotten" if answer.dropped else ""
    cut = ", cut at --max-new-tokens" if answer.finished == "length" else ""
    return (
        f"[{answer.new_tokens} tokens at {answer.tokens_per_second:.1f} tokens/s; prompt {answer.prompt_tokens}, "
        f"{answer.reused} of them kept{forgotten}{cut}]"
    )
