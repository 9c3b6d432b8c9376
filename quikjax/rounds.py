"""Models measured in rounds: in each of them every model has its turn, so that what slows the machine down slows all alike."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from quikjax.errors import QuikError

T = TypeVar("T")  # a kind of test


@dataclasses.dataclass(frozen=True)
class Speed(Generic[T]):
    """A test's tokens per second in each round, the seconds its programs took to compile before, and their peak memory in bytes
    (parameters and cache included, by the compiler's account; 0: it keeps none)."""

    test: T
    rounds: tuple[float, ...]
    compile_seconds: float
    peak_bytes: int

    @property
    def mean(self) -> float:
        """Mean over the rounds."""
        return statistics.fmean(self.rounds)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the rounds, 0 for a single one."""
        return statistics.stdev(self.rounds) if len(self.rounds) > 1 else 0.0


class Prepared(NamedTuple):
    """A model made ready for a test and warmed up: `run` runs it once and returns its seconds; the rest as in `Speed`."""

    run: Callable[[], float]
    compile_seconds: float
    peak_bytes: int


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round: in a round each has its turn, so that what slows this machine down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def speeds(
    tests: Sequence[T], prepare: Mapping[str, Callable[[T], Prepared]], tokens: Callable[[T], int], rounds: int
) -> dict[str, list[Speed[T]]]:
    """Every model in every test, in the order of the tests: all are made ready, then run in turn, `rounds` times.

    Args:
        tests: of any kind.
        prepare: for each model by name, what makes it ready for a test and runs it once to warm up.
        tokens: how many tokens a run of a test counts for.
        rounds: measured runs of each.

    Raises:
        QuikError: `rounds` is not positive.
    """
    if rounds < 1:
        raise QuikError(f"at least 1 round is measured, not {rounds}")
    results: dict[str, list[Speed[T]]] = {name: [] for name in prepare}
    for test in tests:
        ready = {name: make(test) for name, make in prepare.items()}
        for name, seconds in in_turn({name: one.run for name, one in ready.items()}, rounds).items():
            each = tuple(tokens(test) / one for one in seconds)
            results[name].append(Speed(test, each, ready[name].compile_seconds, ready[name].peak_bytes))
    return results


def peak_bytes(program: Any) -> int:
    """Bytes of a compiled program's arguments, results and temporary arrays together; 0 where the compiler does not say."""
    sizes = program.memory_analysis()
    if sizes is None:
        return 0
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    return int(held)
