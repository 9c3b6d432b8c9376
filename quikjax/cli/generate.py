"""`quikjax generate`: continue texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quikjax.cli.generation_options import DrawingOptions, RunningOptions, interrupted, with_option_groups
from quikjax.cli.options import Json, Model, check_models, read_prompt
from quikjax.errors import QuikError
from quikjax.files import read_text, typed_text, user_path

if TYPE_CHECKING:
    from quikjax.generation.settings import Beams


@with_option_groups
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue, or for a BART to read; - reads it from standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    prompt_file: Annotated[Path | None, typer.Option(help="Take every line of this file as a prompt.")] = None,
    samples: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    beams: Annotated[int, typer.Option(help="Search for the most likely text with so many beams; 1: token by token.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="With beams: above 0 favours long texts, 0 compares sums of log-probabilities.")
    ] = 1.0,
    early_stopping: Annotated[
        bool, typer.Option("--early-stopping", help="With beams: end as soon as so many texts have ended.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="With --json: the log-probability of each token.")] = False,
    *,
    drawing: DrawingOptions,
    running: RunningOptions,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The bits of a row do not depend on the rows beside it; slower.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Continue a text, greedily unless a temperature or beams are given. Only what is new is printed on stdout, as it is decoded.

    A model that reads one text and writes another (BART) gets the prompt as its encoder's input.
    """
    check_models(model)
    running.check()
    sampling = drawing.sampling()
    searched = _beams(beams, length_penalty, early_stopping)
    if searched is not None:
        searched.check(samples, sampling, stop_strings=bool(stop), logprobs=logprobs, deterministic=deterministic)
    sampling.check_room(max_new_tokens)
    texts = _texts(prompt, prompt_file)
    if (drawing.system is not None or drawing.template is not None) and not chat:
        raise QuikError("--system and --template are parts of a chat; give --chat as well")
    if logprobs and not as_json:
        raise QuikError("log-probabilities are part of the JSON object; give --json as well")
    chat_template = drawing.chat_template()
    for text in stop or ():
        typed_text(text, "a stop string")

    from quikjax.cli.printing import print_json, say, show
    from quikjax.generation import TextToText, generator_of
    from quikjax.generation.chat import render
    from quikjax.texts import tokenize

    network, tokenizer = running.load(model, plain_tokenizer=not chat)
    if tokenizer is None:
        raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
    generator = generator_of(
        network, tokenizer=tokenizer, cache=running.kv_cache, deterministic=deterministic, unrolled=running.unroll, release=True
    )
    reads = isinstance(generator, TextToText)
    if chat and reads:
        raise QuikError(f"{model} reads one text and writes another, and has no turns of a chat; leave --chat out")
    if chat:
        before = [{"role": "system", "content": drawing.system}] if drawing.system else []
        prompts = [render(tokenizer, [*before, {"role": "user", "content": text}], chat_template) for text in texts]
    elif reads:
        prompts = [[int(token) for token in tokenizer(text, verbose=False)["input_ids"]] for text in texts]
    else:
        prompts = [tokenize(tokenizer, text).tolist() for text in texts]
    # One text is shown as it is decoded; several would mix.
    alone = len(texts) * samples == 1 and not as_json
    printed = False

    def print_piece(_row: int, piece: str) -> None:
        nonlocal printed
        printed = True
        show(piece, end="")

    with interrupted(lambda: show() if printed else None):
        out = generator.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=drawing.seed,
            samples=samples,
            stop_strings=stop or (),
            logprobs=logprobs,
            on_text=print_piece if alone else None,
            step=4 if alone else 16,
            beams=searched,
        )
    assert out.texts is not None
    figures = {
        "prompt_tokens": out.prompt_tokens,
        "new_tokens": int(out.lengths.sum()),
        "prefill_tokens_per_second": out.prefill_tokens_per_second,
        "decode_tokens_per_second": out.decode_tokens_per_second,
        "compile_seconds": out.compile_seconds,
    }
    if as_json:
        rows = [
            {
                "prompt": i // samples,
                "text": text,
                "new_tokens": int(out.lengths[i]),
                "finished": out.finished[i],
                **({"score": float(out.scores[i])} if out.scores is not None else {}),
                **({"logprobs": out.logprobs[i, : out.lengths[i]].tolist()} if out.logprobs is not None else {}),
            }
            for i, text in enumerate(out.texts)
        ]
        print_json({"text": out.texts[0], **figures, "rows": rows})
    elif alone:
        show()
    else:
        for i, text in enumerate(out.texts):
            show(f"--- prompt {i // samples + 1}" + (f", sample {i % samples + 1}" if samples > 1 else ""))
            show(text)
    say(
        f"prefill {out.prompt_tokens} tokens at {out.prefill_tokens_per_second:.0f} tokens/s, "
        f"decode {int(out.lengths.sum())} at {out.decode_tokens_per_second:.1f} tokens/s, compiled in {out.compile_seconds:.1f} s"
    )


def _beams(count: int, length_penalty: float, early_stopping: bool) -> "Beams | None":
    """The search that was asked for; none with one beam, where its other settings mean nothing."""
    from quikjax.generation.settings import Beams

    if count != 1:
        return Beams(count=count, length_penalty=length_penalty, early_stopping=early_stopping)
    if length_penalty != 1.0 or early_stopping:
        raise QuikError("--length-penalty and --early-stopping are of a search; give --beams 2 or more as well")
    return None


def _texts(prompt: str | None, prompt_file: Path | None) -> list[str]:
    """The prompts, as typed or one from each line of a file."""
    if (prompt is None) == (prompt_file is None):
        raise QuikError("give one of a prompt and --prompt-file")
    if prompt_file is not None:
        # Other characters that end a line somewhere (form feeds, U+2028) are part of a prompt.
        texts = [line for line in read_text(user_path(prompt_file)).split("\n") if line]
        if not texts:
            raise QuikError(f"{prompt_file} has no prompts; give one on each line")
        return texts
    assert prompt is not None
    return [read_prompt(prompt)]
