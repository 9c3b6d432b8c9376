"""Print for people: progress as plain lines on stderr, tables on stdout."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quikjax.errors import QuikError
from quikjax.files import finite
from quikjax.reports.tables import markdown_table as table
from quikjax.reports.tables import with_clip

if TYPE_CHECKING:
    from quikjax.quantizing.distillation import DistillationStep
    from quikjax.quantizing.params import LayerResult
    from quikjax.quantizing.recipe import Recipe

__all__ = [
    "ProgressLines",
    "TrainingLines",
    "decibels",
    "duration",
    "megabytes",
    "print_json",
    "say",
    "show",
    "size",
    "table",
    "with_clip",
]


def say(line: str = "") -> None:
    """One line of progress. It is no reason to stop if nobody can read it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def show(text: str = "", end: str = "\n") -> None:
    """Results on stdout. Where it cannot be written (a full disk), they are on stderr, so that the work was not for nothing.

    Raises:
        QuikError: stdout could not be written.
        BrokenPipeError: whoever read it has gone.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # What Python still holds for stdout would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        say(text)
        raise QuikError(f"the result could not be written to standard output ({error.strerror}); it is above") from None


def duration(seconds: int | float) -> str:
    """Seconds for people.

    >>> duration(5.26), duration(75), duration(7322)
    ('5.3 s', '1 min 15 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def megabytes(size: int | float) -> str:
    """Bytes in MB (10^6).

    >>> megabytes(92_871_040)
    '92.9 MB'
    """
    return f"{size / 1e6:.1f} MB"


class ProgressLines:
    """Progress of a conversion as lines: one per layer, and what is left after each block.

    `recipe` tells which dampings were asked for; of one that GPTQ had to take in its place a layer's line says so.
    """

    def __init__(self, recipe: "Recipe", *, layers: bool = True) -> None:
        self._layers = layers
        self._dampings = {None, *(rule.damping for rule in recipe.rules)}
        self._blocks = 0
        self._said = time.perf_counter()

    def start(self, blocks: int, finished: int) -> None:
        if finished:
            say(f"going on after {finished} of {blocks} blocks that an earlier run finished")
        if self._layers:
            say(f"{'layer':<44} {'bits':<10} {'outliers':>8} {'rel. error':>10} {'SNR':>8} {'time':>8}")

    def layer(self, layer: "LayerResult", seconds: float) -> None:
        if self._layers:
            width = with_clip(layer.format, layer.level_clip)
            damping = "" if layer.damping in self._dampings else f"  damping {layer.damping:g}"
            say(
                f"{layer.path.removesuffix('.weight'):<44} {width:<10} {layer.outliers:>8} {layer.relative_error:>10.4f} "
                f"{decibels(layer.snr_db, layer.relative_error):>8} {seconds:>6.1f} s{damping}"
            )

    def distilling(self, step: "DistillationStep") -> None:
        now = time.perf_counter()
        if step.step and (step.step == step.steps or now - self._said > 30):
            self._said = now
            ended = f", {step.best:.4f} is kept" if step.step == step.steps else ""
            say(f"  {step.block}: {step.loss:.4f} of its error after {step.step} of {step.steps} steps of distillation{ended}")

    def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
        # Blocks of a second or less would only scroll.
        now = time.perf_counter()
        if done < total and (now - self._said > 2 or self._layers):
            self._said = now
            say(f"  block {done} of {total} saved, about {duration(seconds_left)} left")


class TrainingLines:
    """Progress of a training: on a terminal one live line, in a pipe a line now and then, and one for each evaluation.

    `loss` is what its loss is called, `figures` spells what an evaluation has found, `examples` are what it is found on.
    """

    def __init__(self, loss: str, figures: Callable[[Mapping[str, float]], str], examples: str, every: float = 30.0) -> None:
        self._loss, self._figures, self._examples = loss, figures, examples
        self._live = sys.stderr.isatty()
        self._every = every
        self._said = time.monotonic()
        self._losses: list[float] = []

    def start(self, steps: int, finished: int) -> None:
        if finished:
            say(f"going on after {finished} of {steps} steps that an earlier run took")

    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        self._losses.append(loss)
        now = time.monotonic()
        if not self._live and now - self._said < self._every and step < steps:
            return
        self._said = now
        left = "" if math.isnan(seconds_left) else f", about {duration(seconds_left)} left"
        mean = sum(self._losses[-10:]) / len(self._losses[-10:])
        line = f"step {step} of {steps}  {self._loss} {mean:.4f} over the last {len(self._losses[-10:])} steps{left}"
        if self._live:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            say(line)

    def evaluated(self, step: int, figures: Mapping[str, float], best: bool) -> None:
        self._clear()
        say(f"after {step} steps: {self._figures(figures)} on {self._examples}{' (the best)' if best else ''}")

    def stopped(self, reason: str) -> None:
        self._clear()
        say(f"stopped: {reason}")

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, in ASCII. Numbers that are not finite are null: JSON has none."""
    show(json.dumps(finite(value), allow_nan=False, indent=2))


def decibels(snr_db: float | None, relative_error: float | None) -> str:
    """A layer's signal-to-noise for people, wherever it is printed.

    >>> decibels(24.13, 0.06), decibels(float("inf"), 0.0), decibels(None, 0.0), decibels(float("nan"), float("nan"))
    ('24.1 dB', 'exact', 'exact', '?')
    """
    if relative_error == 0:
        return "exact"
    return "?" if snr_db is None or not math.isfinite(snr_db) else f"{snr_db:.1f} dB"


def size(count: int | float) -> str:
    """Bytes for people, in powers of ten.

    >>> size(1_500), size(92_871_040), size(2.5e9)
    ('1.5 kB', '92.9 MB', '2.50 GB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
