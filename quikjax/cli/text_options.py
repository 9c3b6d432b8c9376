"""Texts on the command line, and the options of the commands that encode them."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.errors import QuikError

if TYPE_CHECKING:
    from quikjax.encoding.text_encoder import Text, Work

Texts = Annotated[list[str], typer.Argument(help="Texts; a file's name stands for its lines, - for the lines of standard input.")]
Pairs = Annotated[bool, typer.Option("--pairs", help="Each text is two, with a tab between them, read as a pair.")]
Length = Annotated[int | None, typer.Option(help="Cut texts to so many tokens; left out, what the model reads.")]
BatchSize = Annotated[int, typer.Option(help="Texts that go through the model together.")]


def read_texts(given: list[str], pairs: bool) -> "list[Text]":
    """The texts that arguments stand for: lines of files (empty ones left out), lines of standard input, or themselves.

    Raises:
        QuikError: a file is missing, is empty, cannot be read or is not UTF-8; an argument is empty; a pair is none.
    """
    from quikjax.files import read_text, user_path

    texts: list[str] = []
    for argument in given:
        if argument == "-":
            from quikjax.files import decode

            if sys.stdin is None:
                raise QuikError("the texts - are read from standard input, which is closed; pipe some lines into it")
            content, where = decode(sys.stdin.buffer.read(), "the text on standard input"), "standard input"
        elif _is_file(argument):
            content, where = read_text(user_path(argument)), argument
        elif _looks_like_a_file(argument):
            raise QuikError(f'there is no file "{argument}"; if that is the text itself, pipe it in and give -')
        elif argument.strip():
            texts.append(argument)
            continue
        else:
            raise QuikError("a text is empty; give some words")
        lines = [line for line in content.splitlines() if line.strip()]
        if not lines:
            raise QuikError(f"{where} has no texts; give one on each line")
        texts += lines
    if not pairs:
        return list(texts)
    found: list[Text] = []
    for text in texts:
        parts = text.split("\t")
        if len(parts) != 2:
            raise QuikError(f'--pairs expects two texts with one tab between them, not "{text[:60]}"')
        found.append((parts[0], parts[1]))
    return found


def _is_file(argument: str) -> bool:
    from quikjax.files import user_path

    try:
        return user_path(argument).is_file()
    except (QuikError, OSError):
        return False  # too long for a name: a text


def _looks_like_a_file(argument: str) -> bool:
    """Whether a person who typed this meant a file: encoding a misspelled name would say nothing of the mistake.

    >>> _looks_like_a_file("data/sentences.txt"), _looks_like_a_file("I read notes.txt"), _looks_like_a_file("Yes.")
    (True, False, False)
    """
    return argument.endswith((".txt", ".tsv", ".csv", ".jsonl", ".json", ".md")) and not any(map(str.isspace, argument))


def say_work(texts: int, work: "Work", length: int) -> None:
    """One line of progress on what encoding took, and one where texts were cut."""
    from quikjax.cli.printing import say

    rate = f"{texts / work.seconds:.0f} texts/s" if work.seconds else ""
    say(
        f"{texts} text{'s' if texts > 1 else ''}, {work.tokens} tokens, padded to {' and '.join(map(str, work.buckets))}: "
        f"{work.seconds:.2f} s ({rate}), compiled in {work.compile_seconds:.1f} s"
    )
    if work.cut:
        say(f"note: {work.cut} of them were longer than {length} tokens, and were cut there")
