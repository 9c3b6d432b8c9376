"""`quikjax bench`: how fast a model reads and decodes here, beside the unquantized one."""

import csv
import io
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quikjax.cli.generation_options import RunningOptions, with_option_groups
from quikjax.cli.options import Model, check_models
from quikjax.errors import QuikError, did_you_mean

if TYPE_CHECKING:
    from quikjax.generation import Generator
    from quikjax.generation.cache_error import CacheError
    from quikjax.generation.speed import Speed

FORMATS = ("md", "json", "jsonl", "csv")
_ERROR_TOKENS = 160  # of the demo text, on which a narrow KV cache is compared with a float32 one


@with_option_groups
def bench(
    model: Model,
    test: Annotated[
        list[str] | None,
        typer.Option(
            "--test", "-t", help="pp512, tg128, pp512+tg128, with @ 1024 a depth; several times. [default: these three]"
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", help="Texts at a time; several times. [default: 1]")] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Measured rounds, after one that is not.")] = 5,
    against: Annotated[str | None, typer.Option(help="A second model that takes turns, such as the unquantized one.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="md, json, jsonl or csv.")] = "md",
    *,
    running: RunningOptions,
) -> None:
    """Measure tokens per second: pp reads a prompt, tg decodes; models take turns, compiling is apart."""
    check_models(model, against)
    running.check()
    if output not in FORMATS:
        raise QuikError(f'there is no output "{output}"; {did_you_mean(output, FORMATS)}')
    if any(b < 1 for b in batch or []):
        raise QuikError("a batch has at least 1 text")
    if rounds < 1:
        raise QuikError(f"at least 1 round is measured, not {rounds}")

    from quikjax.generation.speed_tests import parse_test

    tests = [parse_test(name, b) for b in batch or [1] for name in test or ["pp512", "tg128", "pp512+tg128"]]

    from quikjax.cli.printing import say, show, size, table
    from quikjax.generation import Generator, speed

    generators = {}
    for name in dict.fromkeys([model, *([against] if against else [])]):
        network, tokenizer = running.load(name)
        generators[name] = Generator(network, cache=running.kv_cache, unrolled=running.unroll, release=True)
        held = sum(leaf.nbytes for leaf in _leaves(generators[name].params))
        say(f"{name}: parameters take {size(held)} of memory, KV cache in {generators[name].cache}")
        if (off := _cache_error(generators[name], tokenizer)) is not None:
            say(
                f"{name}: against a float32 cache, keys are off by {off.keys:.2%}, values by {off.values:.2%}, "
                f"and the next token's distribution by KL {off.kl:.1e} ({off.tokens} tokens of the demo text)"
            )
    rate = speed.bandwidth()
    say(f"this device copies at {rate / 1e9:.1f} GB/s")
    results = speed.measure(generators, tests, rounds)
    rows = [
        _row(name, one) | _reading(speed.bytes_per_token(generators[name], one.test), one, rate)
        for name, speeds in results.items()
        for one in speeds
    ]
    for row in rows if against else []:
        base = next(r for r in rows if r["model"] == against and (r["test"], r["batch"]) == (row["test"], row["batch"]))
        row["over_against"] = row["mean"] / base["mean"]
    if output == "json":
        show(json.dumps(rows, indent=2))
    elif output == "jsonl":
        show("\n".join(json.dumps(row) for row in rows))
    elif output == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "samples": " ".join(map(str, row["samples"]))} for row in rows)
        show(text.getvalue(), end="")
    else:
        head = [
            "model",
            "batch",
            "test",
            "tokens/s",
            "compiled in s",
            "memory",
            "of the bandwidth",
            *([f"over {against}"] if against else []),
        ]
        show(table(head, [_cells(row) for row in rows]))


def _cache_error(generator: "Generator", tokenizer: Any) -> "CacheError | None":
    """The error of a narrow cache, where there is a tokenizer to read a text with and a context to read it in."""
    from quikjax.generation import cache_error
    from quikjax.texts import calibration_text, tokenize

    tokens = min(_ERROR_TOKENS, generator.context)
    if generator.cache == cache_error.EXACT or tokenizer is None or tokens <= cache_error.DECODED:
        return None
    return cache_error.cache_error(generator, tokenize(tokenizer, calibration_text("pydoc").content)[:tokens])


def _leaves(params: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(params)


def _row(name: str, one: "Speed") -> dict[str, Any]:
    return {
        "model": name,
        "batch": one.test.batch,
        "test": one.test.name,
        "mean": one.mean,
        "deviation": one.deviation,
        "samples": list(one.rounds),
        "compile_seconds": one.compile_seconds,
        "peak_bytes": one.peak_bytes or None,
    }


def _reading(count: int, one: Any, rate: float) -> dict[str, Any]:
    """Bytes that decoding reads, against what the device could; only a test that does nothing else says something about it."""
    if one.test.prompt:
        return {"bytes_per_step": None, "share_of_bandwidth": None}
    return {"bytes_per_step": count, "share_of_bandwidth": count * one.mean / one.test.batch / rate}


def _cells(row: dict[str, Any]) -> list[str]:
    from quikjax.cli.printing import size

    share = row["share_of_bandwidth"]
    return [
        row["model"],
        str(row["batch"]),
        row["test"],
        f"{row['mean']:.2f} ± {row['deviation']:.2f}",
        f"{row['compile_seconds']:.2f}",
        "" if row["peak_bytes"] is None else size(row["peak_bytes"]),
        "" if share is None else f"{share:.0%}",
        *([f"{row['over_against']:.2f}x"] if "over_against" in row else []),
    ]
