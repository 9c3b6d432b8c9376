"""Tasks over rows in local files: no network. Prompts and metrics are those of lm-eval's tasks of the same names.

A directory holds rows as the data sets are published: `piqa_validation.jsonl`, `arc_easy_test.jsonl`,
`lambada_openai_test.jsonl`, `sst2_dev.tsv`, `rte_dev.jsonl`; a file named `..._train` gives the examples of few-shot prompts.
"""

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError
from quikjax.files import read_text

Row = dict[str, Any]

# The parts of a data set that a task is measured on, the first one there is.
_PARTS = ("validation", "dev", "test", "test_labeled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTask:
    """A task whose rows are in a file.

    `fields` are those that a row must have; `wrong` names what is wrong with the row's values, or nothing; `convert` gives the
    row that `config`, lm-eval's own for this task, reads.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...]
    wrong: Callable[[Row], str | None]
    convert: Callable[[Row], Row]
    config: Mapping[str, Any]


def _accuracies(*names: str) -> list[Row]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _label(row: Row, known: tuple[Any, ...]) -> str | None:
    return None if row["label"] in known else f"label is {row['label']!r}, not one of {', '.join(map(repr, known))}"


def _arc(row: Row) -> str | None:
    choices = row["choices"]
    if not isinstance(choices, dict) or not {"text", "label"} <= set(choices) or len(choices["text"]) != len(choices["label"]):
        return 'choices is not {"text": [...], "label": [...]} of equal lengths'
    return None if row["answerKey"] in choices["label"] else f"answerKey {row['answerKey']!r} is none of its choices"


def _last_word(row: Row) -> str | None:
    return None if " " in row["text"].strip() else "text has no last word to predict"


def _same(row: Row) -> Row:
    return row


LOCAL_TASKS: dict[str, LocalTask] = {
    "piqa": LocalTask(
        files=("piqa",),
        fields=("goal", "sol1", "sol2", "label"),
        wrong=lambda row: _label(row, (0, 1)),
        convert=_same,
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "metric_list": _accuracies("acc", "acc_norm"),
        },
    ),
    "arc_easy": LocalTask(
        files=("arc_easy",),
        fields=("question", "choices", "answerKey"),
        wrong=_arc,
        convert=_same,
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
            "metric_list": _accuracies("acc", "acc_norm"),
        },
    ),
    "lambada": LocalTask(
        files=("lambada_openai", "lambada"),
        fields=("text",),
        wrong=_last_word,
        convert=_same,
        config={
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                *_accuracies("acc"),
            ],
        },
    ),
    "sst2": LocalTask(
        files=("sst2",),
        fields=("sentence", "label"),
        wrong=lambda row: _label(row, (0, 1, "0", "1")),
        convert=lambda row: {**row, "label": int(row["label"])},
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "{{sentence}}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": ["negative", "positive"],
            "metric_list": _accuracies("acc"),
        },
    ),
    "rte": LocalTask(
        files=("rte",),
        fields=("sentence_1", "sentence_2", "label"),
        wrong=lambda row: _label(row, ("entailment", "not_entailment")),
        convert=lambda row: {**row, "label": int(row["label"] != "entailment")},
        config={
            "output_type": "multiple_choice",
            "doc_to_text": "{{sentence_1}}\nQuestion: {{sentence_2}} True or False?\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": ["True", "False"],
            "metric_list": _accuracies("acc"),
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class LocalRows:
    """A task's rows, and those that few-shot prompts are made of (none: they come from the rows themselves)."""

    file: Path
    rows: list[Row]
    training: list[Row]


def find_rows(name: str, directory: Path) -> LocalRows | None:
    """The rows of the local task `name` in a directory, checked, or `None` if it has no file for it.

    Raises:
        QuikError: a row is no row of this task; the file and the line are named.
    """
    task = LOCAL_TASKS[name]
    measured = next(
        (path for part in _PARTS for stem in task.files if (path := _file(directory, f"{stem}_{part}")) is not None),
        next((path for stem in task.files if (path := _file(directory, stem)) is not None), None),
    )
    if measured is None:
        return None
    training = next((path for stem in task.files if (path := _file(directory, f"{stem}_train")) is not None), None)
    return LocalRows(measured, read_rows(measured, task), [] if training is None else read_rows(training, task))


def _file(directory: Path, stem: str) -> Path | None:
    return next((path for end in (".jsonl", ".tsv") if (path := directory / f"{stem}{end}").is_file()), None)


def read_rows(path: Path, task: LocalTask) -> list[Row]:
    """The rows of a JSONL file, or of a TSV file whose first line names its fields.

    Raises:
        QuikError: the file is not UTF-8, or empty; a line is not JSON, lacks a field, or has a value that the task has no use
        for.
    """
    text = read_text(path)
    if path.suffix == ".tsv":
        lines = text.removesuffix("\n").split("\n")
        read = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        numbered = list(enumerate(read, 2))
    else:
        numbered = [(number, _json(path, number, line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise QuikError(f"{path} has no rows")
    rows = []
    for number, row in numbered:
        missing = [field for field in task.fields if row.get(field) is None]
        if missing:
            raise QuikError(f"line {number} of {path} lacks {missing[0]}; a row needs {', '.join(task.fields)}")
        wrong = task.wrong(row)
        if wrong is not None:
            raise QuikError(f"line {number} of {path}: {wrong}")
        rows.append(task.convert({field: row[field] for field in task.fields}))
    return rows


def _json(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        raise QuikError(f"line {number} of {path} is not JSON") from None
    if not isinstance(row, dict):
        raise QuikError(f"line {number} of {path} is not a JSON object")
    return row
