"""The loop of every training here: steps, evaluations, the best so far, states on disk from which a killed run goes on.

What a step does and what an evaluation finds are functions of the caller; the loop knows neither models nor losses. What it
ends with depends on nothing but them, so a run that was killed any number of times ends in the same numbers.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from quikjax.errors import QuikError
from quikjax.training.state import State, Store

SAVE_SECONDS = 180.0

Figures = Mapping[str, float]


@runtime_checkable
class Progress(Protocol):
    """Progress of a training while it runs."""

    def start(self, steps: int, finished: int) -> None:
        """Work begins: so many steps, so many of them taken by an earlier run."""

    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        """A step is taken; `loss` is that of its own examples, before it."""

    def evaluated(self, step: int, figures: Figures, best: bool) -> None:
        """Figures of the validation examples after `step` steps, and whether that is the best so far."""

    def stopped(self, reason: str) -> None:
        """Training ends early; the best step so far is what is saved."""


class NoProgress:
    def start(self, steps: int, finished: int) -> None: ...
    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None: ...
    def evaluated(self, step: int, figures: Figures, best: bool) -> None: ...
    def stopped(self, reason: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Training:
    """Tasks of a training, and how often.

    Attributes:
        take: of `(index, moving, optimizer state)` comes `(moving, optimizer state, loss, finite)`; index counts from 0. Where
            loss or gradient is not finite, nothing has moved.
        judge: the figures of what has moved, by name, all the better the lower. The first decides which step is the best, the
            next ones where it is equal. It raises `QuikError` where there are none, and that ends the training.
        steps: in all; `evaluate_every`: between evaluations. The beginning and the end are always evaluated.
    """

    take: Callable[[int, Any, Any], tuple[Any, Any, Any, Any]]
    judge: Callable[[Any], Figures]
    steps: int
    evaluate_every: int


def run(training: Training, moving: Any, optimizer: Any, store: Store, progress: Progress) -> tuple[Any, dict[str, Any]]:
    """Train, from `moving` and the optimizer's state or from where `store` left off.

    Returns:
        What moved to the best figures, and notes: `evaluations` (`[step, figures]`), `best`, its step, and `stopped`, the
        reason, if training ended early.

    Raises:
        QuikError: the loss or the figures are not finite before any step was better than the beginning; the disk refuses.
    """
    state = State(0, moving, optimizer, moving, {"evaluations": [], "best": 0})
    resumed = store.load(state)
    state = state if resumed is None else resumed
    progress.start(training.steps, state.step)
    if resumed is None:
        state = _judged(state, training, progress)
        store.save(state)
    saved, clock = time.monotonic(), _Clock(training)
    while state.step < training.steps and "stopped" not in state.notes:
        moved, optimizer, loss, finite = training.take(state.step, state.moving, state.optimizer)
        if not bool(finite):
            reason = f"the loss or its gradient is not finite at step {state.step + 1}"
            state = state._replace(notes={**state.notes, "stopped": reason})
            break
        state = state._replace(step=state.step + 1, moving=moved, optimizer=optimizer)
        progress.step(state.step, training.steps, float(loss), clock.left(state.step))
        if state.step % training.evaluate_every == 0 or state.step == training.steps:
            with clock.judging():
                state = _judged(state, training, progress)
            store.save(state)
            saved = time.monotonic()
        elif time.monotonic() - saved > SAVE_SECONDS:
            store.save(state)
            saved = time.monotonic()
    if "stopped" in state.notes:
        store.save(state)
        reason = state.notes["stopped"]
        if state.notes["best"] == 0:
            raise QuikError(f"{reason}, and nothing before it was better than the beginning; train at lower rates")
        progress.stopped(f"{reason}; saving step {state.notes['best']}, the best before it")
    return state.best, state.notes


def figures_at(notes: Mapping[str, Any], step: int) -> dict[str, float]:
    """Figures of the evaluation after `step` steps."""
    return next(dict(figures) for at, figures in notes["evaluations"] if at == step)


def _judged(state: State, training: Training, progress: Progress) -> State:
    try:
        figures = dict(training.judge(state.moving))
    except QuikError as problem:
        if state.step == 0:
            raise
        return state._replace(notes={**state.notes, "stopped": f"{problem} (at step {state.step})"})
    before = state.notes["evaluations"]
    better = not before or list(figures.values()) < list(figures_at(state.notes, state.notes["best"]).values())
    notes = {**state.notes, "evaluations": [*before, [state.step, figures]]}
    if better:
        notes["best"] = state.step
    progress.evaluated(state.step, figures, better)
    return state._replace(best=state.moving if better else state.best, notes=notes)


class _Clock:
    """How long is left, from the steps of this run; compilation is in its first step only and is not counted."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._began: float | None = None
        self._judging: list[float] = []
        self._first = 0

    def left(self, step: int) -> float:
        """Seconds left after `step` steps."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, step
        taken = step - self._first
        each = (now - self._began - sum(self._judging)) / taken if taken else math.nan
        evaluations = -(-self._training.steps // self._training.evaluate_every) - step // self._training.evaluate_every
        judging = self._judging[-1] if self._judging else 0.0
        return each * (self._training.steps - step) + judging * evaluations

    def judging(self) -> "_Judging":
        return _Judging(self._judging)


@dataclasses.dataclass
class _Judging:
    laps: list[float]
    began: float = 0.0

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.laps.append(time.monotonic() - self.began)
