"""Evaluations on record: `DIR.evaluations.jsonl`, beside the artifact DIR, one line each.

An artifact is sealed, so its figures stand beside it. Each line names the fingerprint of the artifact it was measured on: after
the artifact is replaced, old lines no longer count.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from quikjax.checkpoint.output import real_path
from quikjax.errors import QuikError
from quikjax.files import finite, user_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One evaluation: of which artifact, under which protocol (data, windows, tasks, original), the figures, and the command."""

    fingerprint: str
    kind: Literal["perplexity", "tasks"]
    protocol: Mapping[str, Any]
    result: Mapping[str, Any]
    command: str


def evaluations_file(artifact: str | os.PathLike[str]) -> Path:
    """Where the evaluations of the artifact in directory `artifact` are on record."""
    path = real_path(artifact)
    return path.with_name(path.name + ".evaluations.jsonl")


def check_writable(path: str | os.PathLike[str]) -> None:
    """See that a file can be written, before the work whose result goes there. Nothing is changed.

    Raises:
        QuikError: it is a directory, or its place is missing or refuses.
    """
    target = user_path(path)
    place = target.parent
    if target.is_dir():
        raise QuikError(f"cannot write {target}: it is a directory; name a file")
    if not place.is_dir():
        raise QuikError(f"cannot write {target}: there is no directory {place}; make it first")
    if not os.access(target if target.exists() else place, os.W_OK):
        raise QuikError(f"cannot write {target}: permission denied; choose another place")


def add_evaluation(artifact: str | os.PathLike[str], record: EvaluationRecord) -> Path:
    """Put an evaluation on record, and return the file.

    Raises:
        QuikError: the file cannot be written.
    """
    path = evaluations_file(artifact)
    line = json.dumps(finite(dataclasses.asdict(record)), sort_keys=True, allow_nan=False) + "\n"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise QuikError(f"cannot write {path}: {error.strerror}") from None
    return path


def read_evaluations(artifact: str | os.PathLike[str], fingerprint: str) -> list[EvaluationRecord]:
    """The evaluations on record of the artifact with this fingerprint; of equal protocols, the last.

    Raises:
        QuikError: a line cannot be read.
    """
    path = evaluations_file(artifact)
    if not path.is_file():
        return []
    found: dict[str, EvaluationRecord] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = EvaluationRecord(**json.loads(line))
        except (ValueError, TypeError):
            raise QuikError(f"line {number} of {path} is no evaluation; remove it") from None
        if record.fingerprint == fingerprint:
            found[json.dumps([record.kind, record.protocol], sort_keys=True)] = record
    return list(found.values())
