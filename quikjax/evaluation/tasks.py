"""Zero- and few-shot tasks through EleutherAI's lm-evaluation-harness (`pip install 'quikjax[tasks]'`; PyTorch is not needed).

The harness makes the prompts and counts; the model answers through `Scorer`.
"""

import contextlib
import dataclasses
import difflib
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quikjax.errors import QuikError, did_you_mean
from quikjax.evaluation.local_tasks import LOCAL_TASKS, LocalRows, find_rows
from quikjax.evaluation.scoring import Scorer
from quikjax.files import user_path

# Bootstrap draws for the standard errors of figures that are no means, such as LAMBADA's perplexity.
_DRAWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One figure of one task: `value` of `metric` over `rows` rows, `fewshot` examples before each, with its standard error."""

    task: str
    metric: str
    value: float
    stderr: float | None
    rows: int
    fewshot: int
    data: str


@dataclasses.dataclass(frozen=True)
class TaskList:
    """Tasks that are there: their rows are read and checked, or their names are known to the harness."""

    local: Mapping[str, LocalRows]
    registered: Sequence[str]
    directory: Path | None


def import_harness() -> Any:
    """The package `lm_eval`.

    Raises:
        QuikError: it is not installed.
    """
    try:
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError:
        raise QuikError("tasks run through the package `lm-eval`; run: pip install 'quikjax[tasks]'") from None
    return lm_eval


def find_tasks(names: Sequence[str], directory: str | Path | None = None) -> TaskList:
    """Look for tasks by name: rows in `directory`, YAML tasks of the harness there, then what the harness knows.

    Rows are read now, so that nothing wrong with them is found after hours. `LOCAL_TASKS` are those that rows suffice for.

    Raises:
        QuikError: a task does not exist, the directory does not, a row is no row of its task, or the harness is not installed.
    """
    harness = import_harness()
    if not names:
        raise QuikError("no task is named")
    place = None if directory is None else user_path(directory)
    if place is not None and not place.is_dir():
        raise QuikError(f"there is no directory {place}")
    local: dict[str, LocalRows] = {}
    registered = []
    for name in dict.fromkeys(names):
        rows = find_rows(name, place) if place is not None and name in LOCAL_TASKS else None
        if rows is None:
            registered.append(name)
        else:
            local[name] = rows
    if registered:
        # Half a minute: the harness reads all of its thousands of descriptions.
        known = _manager(harness, place).all_tasks
        for name in registered:
            if name not in known:
                where = "" if place is None else f" with rows in {place}"
                hint = did_you_mean(name, LOCAL_TASKS) if name not in LOCAL_TASKS else f"its rows go in a file {name}_test.jsonl"
                near = _near(name, known)
                raise QuikError(f'there is no task "{name}"{where}; {near or hint}')
    return TaskList(local, tuple(registered), place)


def _near(name: str, known: Sequence[str]) -> str | None:
    """The nearest of many names as a question, if there is a near one: all of them are too many to list."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f'did you mean "{found[0]}"?' if found else None


def check_numbers(fewshot: int | None, limit: int | None) -> None:
    """See that numbers of examples and rows make sense.

    Raises:
        QuikError: one does not.
    """
    if limit is not None and limit < 1:
        raise QuikError(f"the limit must be at least 1 row, not {limit}")
    if fewshot is not None and fewshot < 0:
        raise QuikError(f"the number of examples cannot be negative, but is {fewshot}")


def run_tasks(
    scorer: Scorer, tasks: TaskList, *, fewshot: int | None = None, limit: int | None = None, chat: bool = False
) -> list[TaskScore]:
    """Measure a model on tasks.

    Args:
        scorer: the model.
        tasks: what `find_tasks` found.
        fewshot: examples before each question; left out, each task's own number (none for local ones).
        limit: rows of each task, from the first; left out, all.
        chat: write prompts with the tokenizer's chat template.

    Raises:
        QuikError: a number is out of range, or the data of a registered task cannot be had.
    """
    harness = import_harness()
    check_numbers(fewshot, limit)
    if chat and not scorer.tokenizer.chat_template:
        raise QuikError("the model's tokenizer has no chat template; evaluate without one")
    scores: list[TaskScore] = []
    runs: list[tuple[list[Any], Any]] = []
    if tasks.local:
        specifications = [_specification(name, rows) for name, rows in tasks.local.items()]
        runs.append((specifications, harness.tasks.TaskManager(include_defaults=False)))
    if tasks.registered:
        runs.append((list(tasks.registered), _manager(harness, tasks.directory)))
    for specifications, manager in runs:
        with undisturbed():
            try:
                found = harness.evaluator.simple_evaluate(
                    model=harness_model(scorer),
                    tasks=specifications,
                    task_manager=manager,
                    num_fewshot=fewshot,
                    limit=limit,
                    bootstrap_iters=_DRAWS,
                    apply_chat_template=chat,
                    log_samples=False,
                )
            except (ConnectionError, FileNotFoundError, OSError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise QuikError(f"a task's data cannot be had ({reason}); put its rows in a --task-dir") from None
        scores += _scores(found, tasks.local)
    return scores


def harness_model(scorer: Scorer) -> Any:
    """An `LM` of the harness that answers through `scorer`, for `simple_evaluate` and whatever else takes one."""
    import_harness()
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        """A quikjax model in the harness."""

        @property
        def tokenizer_name(self) -> str:
            return str(scorer.tokenizer.name_or_path).replace("/", "__")

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return scorer.rolling_loglikelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return scorer.continuations([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return scorer.chat(chat_history, answer=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return scorer.tokenizer.chat_template if chat_template else None

    return HarnessModel()


def _manager(harness: Any, directory: Path | None) -> Any:
    return harness.tasks.TaskManager(include_path=None if directory is None else str(directory))


def _specification(name: str, found: LocalRows) -> dict[str, Any]:
    """A task of the harness over rows in memory."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        parts = {"test": found.rows, **({"train": found.training} if found.training else {})}
        return {part: Dataset.from_list(rows) for part, rows in parts.items()}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "train" if found.training else "test",
        "metadata": {"version": 1.0},
        **({"training_split": "train"} if found.training else {}),
        **LOCAL_TASKS[name].config,
    }


def _scores(found: Mapping[str, Any], local: Mapping[str, LocalRows]) -> list[TaskScore]:
    scores = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=float(error) if known else None,
                    rows=int(found["n-samples"][task]["effective"]) if task in found["n-samples"] else 0,
                    fewshot=int(found["n-shot"].get(task) or 0),
                    data=local[task].file.name if task in local else "lm-eval's own",
                )
            )
    return scores


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep from the caller what the harness does to the whole process.

    It seeds Python's and NumPy's global generators, prints to stdout, warns of what is meant, and forks for its bootstrap, which
    a process with JAX in it must not.
    """
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    python, numpy = random.getstate(), np.random.get_state()
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
