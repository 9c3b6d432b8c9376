"""`quikjax bench`: how fast a model is here, beside the unquantized one: a decoder reads and decodes, an encoder reads."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quikjax.cli.generation_options import RunningOptions, with_option_groups
from quikjax.cli.options import Model, check_models
from quikjax.errors import QuikError, did_you_mean

if TYPE_CHECKING:
    from quikjax.cli.bench_tables import Row
    from quikjax.encoding.speed import RunningEncoder
    from quikjax.generation import Generator
    from quikjax.generation.cache_error import CacheError
    from quikjax.speed_tests import EncoderTest, Test

FORMATS = ("md", "json", "jsonl", "csv")
_ERROR_TOKENS = 160  # of the demo text, on which a narrow KV cache is compared with a float32 one


@with_option_groups
def bench(
    model: Model,
    test: Annotated[
        list[str] | None,
        typer.Option(
            "--test",
            "-t",
            help="pp512, tg128, pp512+tg128, with @ 1024 a depth; of an encoder en128, texts of 128 tokens; several times. "
            "[default: these three, or en32 and en128]",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", help="Texts at a time; several times. [default: 1]")] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Measured rounds, after one that is not.")] = 5,
    against: Annotated[str | None, typer.Option(help="A second model that takes turns, such as the unquantized one.")] = None,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="md, json, jsonl or csv; all but csv have the products of an encoder with packed weights."
        ),
    ] = "md",
    *,
    running: RunningOptions,
) -> None:
    """Measure tokens per second: pp reads a prompt, tg decodes, en encodes; models take turns, compiling is apart.

    Of an encoder with packed weights each product of a block is timed as quantized and in floats.
    """
    check_models(model, against)
    running.check()
    if output not in FORMATS:
        raise QuikError(f'there is no output "{output}"; {did_you_mean(output, FORMATS)}')
    if any(b < 1 for b in batch or []):
        raise QuikError("a batch has at least 1 text")
    if rounds < 1:
        raise QuikError(f"at least 1 round is measured, not {rounds}")

    from quikjax.speed_tests import parse_test

    batches = batch or [1]
    tests: list[Any] = [parse_test(name, b) for b in batches for name in test or []]  # all of one kind, or refused below

    from quikjax.cli.bench_tables import compared, written
    from quikjax.cli.printing import show
    from quikjax.models.encoder import Encoder

    runners: dict[str, Any] = {}
    encodes: bool | None = None
    for name in dict.fromkeys([model, *([against] if against else [])]):
        network, tokenizer = running.load(name)
        if encodes not in (None, isinstance(network, Encoder)):
            raise QuikError(f"an encoder and a model that decodes have no test in common; {model} and {against} take no turns")
        encodes = isinstance(network, Encoder)
        _check(network, encodes, tests, running)
        runners[name] = _encoder(name, network) if encodes else _generator(name, network, tokenizer, running)
    rows = (_encoder_rows if encodes else _decoder_rows)(runners, tests, batches, rounds)
    show(written(compared(rows, against), output, against))


def _check(network: Any, encodes: bool, tests: "Sequence[Test | EncoderTest]", running: RunningOptions) -> None:
    """Refuse tests and options that are for models of the other kind.

    Raises:
        QuikError: naming the first of them.
    """
    from quikjax.speed_tests import EncoderTest

    name = type(network).__name__
    for test in tests:
        if encodes and not isinstance(test, EncoderTest):
            raise QuikError(f"{name} is an encoder and does not decode, as {test.name} does; give tests such as en32 and en128")
        if not encodes and isinstance(test, EncoderTest):
            raise QuikError(f"{test.name} is a test of encoders, and {name} is none; give tests such as pp512 and tg128")
    if encodes and (running.kv_cache is not None or running.unroll):
        raise QuikError(f"--kv-cache and --unroll are for models that decode, and {name} is an encoder; leave them out")


def _encoder(name: str, network: Any) -> "RunningEncoder":
    from quikjax.cli.printing import say, size
    from quikjax.encoding.speed import RunningEncoder

    encoder = RunningEncoder(network)
    say(f"{name}: parameters take {size(_bytes(encoder.params))} of memory")
    return encoder


def _generator(name: str, network: Any, tokenizer: Any, running: RunningOptions) -> "Generator":
    from quikjax.cli.printing import say, size
    from quikjax.generation import Generator

    generator = Generator(network, cache=running.kv_cache, unrolled=running.unroll, release=True)
    say(f"{name}: parameters take {size(_bytes(generator.params))} of memory, KV cache in {generator.cache}")
    if (off := _cache_error(generator, tokenizer)) is not None:
        say(
            f"{name}: against a float32 cache, keys are off by {off.keys:.2%}, values by {off.values:.2%}, "
            f"and the next token's distribution by KL {off.kl:.1e} ({off.tokens} tokens of the demo text)"
        )
    return generator


def _encoder_rows(
    encoders: "Mapping[str, RunningEncoder]", tests: "Sequence[EncoderTest]", batches: Sequence[int], rounds: int
) -> "list[Row]":
    from quikjax.cli.bench_tables import product_fields, speed_row
    from quikjax.encoding import speed
    from quikjax.speed_tests import encoder_tests

    _say_products()
    reach = min(encoder.config.context_length for encoder in encoders.values())
    tests = tests or encoder_tests(batches, reach)
    results = speed.measure(encoders, tests, rounds)
    products = {
        (name, rows): product_fields(speed.product_speeds(encoder, rows, rounds))
        for name, encoder in encoders.items()
        for rows in dict.fromkeys(test.batch * test.length for test in tests)
    }
    return [
        speed_row(name, one) | products[name, one.test.batch * one.test.length]
        for name, speeds in results.items()
        for one in speeds
    ]


def _decoder_rows(
    generators: "Mapping[str, Generator]", tests: "Sequence[Test]", batches: Sequence[int], rounds: int
) -> "list[Row]":
    import jax

    from quikjax.cli.bench_tables import bandwidth_fields, speed_row
    from quikjax.cli.printing import say
    from quikjax.generation import speed
    from quikjax.speed_tests import decoder_tests

    rate = speed.bandwidth()
    cpu = jax.default_backend() == "cpu"
    say(f"this device {'reads' if cpu else 'copies'} at {rate / 1e9:.1f} GB/s")
    _say_products()
    tests = tests or decoder_tests(batches)
    return [
        speed_row(name, one) | bandwidth_fields(speed.bytes_per_token(generators[name], one.test), one, rate)
        for name, speeds in speed.measure(generators, tests, rounds).items()
        for one in speeds
    ]


def _say_products() -> None:
    import jax

    from quikjax.cli.printing import say
    from quikjax.weights.compiled import why_no_compiled_products

    if jax.default_backend() == "cpu":
        reason = why_no_compiled_products()
        say("products are compiled for this CPU" if reason is None else f"products are XLA's: {reason}")


def _cache_error(generator: "Generator", tokenizer: Any) -> "CacheError | None":
    """The error of a narrow cache, where there is a tokenizer to read a text with and a context to read it in."""
    from quikjax.generation import cache_error
    from quikjax.texts import calibration_text, tokenize

    tokens = min(_ERROR_TOKENS, generator.context)
    if generator.cache == cache_error.EXACT or tokenizer is None or tokens <= cache_error.DECODED:
        return None
    return cache_error.cache_error(generator, tokenize(tokenizer, calibration_text("pydoc").content)[:tokens])


def _bytes(params: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
