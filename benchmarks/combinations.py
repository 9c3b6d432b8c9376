"""Pruning, fewer blocks and INT4 together: every combination and order, each trained for the same few steps from one teacher.

    python benchmarks/combinations.py TEACHER --data sst2_train.tsv --validation sst2_test_labeled.tsv --measure sst2_dev.tsv \\
        --out DIR [--steps 50] [--rate 1e-4] [--longest 64]

TEACHER is a classifier in floats that `quikjax train` wrote. Each row is a student of it (`quikjax train TEACHER --teacher
TEACHER --recipe ... --prune ...`): floats or W4A4; nothing pruned, 2:4, half of every matrix, a quarter of the heads, or a
quarter of the MLP's rows; pruned first or quantized first, and masks that are chosen anew half way; all blocks, or two fewer.
Reported are the accuracy on the validation texts before training and at the best step, which they choose, and that step's on the
texts to measure.

DIR keeps each row when it is done, so that a run that was killed goes on there; the artifacts are not kept. A table is printed.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from quikjax.checkpoint.load import load
from quikjax.reports.tables import markdown_table
from quikjax.training.accuracy import accuracy
from quikjax.training.train import train
from quikjax.training.train_settings import TrainSettings

SHARES = {"unstructured": 0.5, "heads": 0.25, "intermediate": 0.25}
PRUNINGS = ("2:4", *SHARES)


class Combination(NamedTuple):
    """A student: how it is quantized, pruned, in which order, whether masks are chosen anew, and how many blocks are removed."""

    recipe: str
    prune: str | None = None
    prune_first: bool = True
    again: bool = False
    removed: int = 0

    @property
    def name(self) -> str:
        """In words, as a file may be called."""
        order = "" if self.prune is None or self.recipe == "fp" else "-prune-first" if self.prune_first else "-quantize-first"
        pruned = "" if self.prune is None else f"-{self.prune.replace(':', 'of')}"
        return f"{self.recipe}{pruned}{order}{'-again' if self.again else ''}-minus{self.removed}"


def combinations(recipe: str) -> list[Combination]:
    """All of them, floats before `recipe`, the whole model before the shortened one."""
    found = []
    for removed in (0, 2):
        found += [Combination("fp", prune, removed=removed) for prune in (None, *PRUNINGS) if prune or removed]
        found.append(Combination(recipe, removed=removed))
        found += [Combination(recipe, prune, first, removed=removed) for prune in PRUNINGS for first in (True, False)]
        found += [Combination(recipe, prune, again=True, removed=removed) for prune in ("2:4", "unstructured")]
    return found


def row(one: Combination, given: argparse.Namespace) -> dict[str, Any]:
    """Train a student, measure it, and remove it."""
    kept = given.out / f"{one.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    settings = TrainSettings(
        steps=given.steps,
        evaluate_every=given.steps,
        rate=given.rate,
        longest=given.longest,
        prune=one.prune,
        prune_share=SHARES.get(one.prune or "", 0.5),
        prune_first=one.prune_first,
        prune_every=-(-given.steps // 2) if one.again else 0,
        remove_blocks=one.removed,
    )
    teacher, tokenizer = load(given.teacher)
    artifact = given.out / one.name
    done = train(
        teacher,
        tokenizer,
        given.data,
        artifact,
        settings,
        validation=given.validation,
        recipe=one.recipe,
        teacher=teacher,
        force=True,
    )
    measured = accuracy(*load(artifact), given.measure)
    found = {
        **one._asdict(),
        "before": done.accuracy_before,
        "after": done.accuracy,
        "measured": measured.accuracy,
        "seconds": done.seconds,
    }
    kept.write_text(json.dumps(found))
    shutil.rmtree(artifact)
    print(f"{one.name}: {found['before']:.2%} -> {found['after']:.2%}, {found['measured']:.2%}", file=sys.stderr, flush=True)
    return found


def cells(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    order = "" if not found["prune"] or found["recipe"] == "fp" else "pruned" if found["prune_first"] else "quantized"
    return [
        found["recipe"],
        found["prune"] or "",
        f"{order}, masks again" if found["again"] else order,
        f"-{found['removed']}" if found["removed"] else "",
        *(f"{found[name]:.2%}" for name in ("before", "after", "measured")),
    ]


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    for name in ("data", "validation", "measure", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--recipe", default="rtn-w4a4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--longest", type=int, default=64)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    asked = {name: str(value) for name, value in vars(given).items() if name != "out"}
    protocol = given.out / "protocol.json"
    if protocol.exists() and json.loads(protocol.read_text()) != asked:
        parser.error(f"{given.out} holds rows of other settings: {protocol.read_text()}; name another --out")
    protocol.write_text(json.dumps(asked))
    head = ("recipe", "pruning", "first", "blocks", "chosen on: before", "after", "measured")
    print(markdown_table(head, [cells(row(one, given)) for one in combinations(given.recipe)]))


if __name__ == "__main__":
    main()
