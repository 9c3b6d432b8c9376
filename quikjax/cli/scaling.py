"""`quikjax study scaling`: with a fixed number of model bits, which precision is best?"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quikjax.cli.options import Json, parse_block
from quikjax.cli.printing import duration, say, show, size
from quikjax.cli.study import DryRun, GridLines, Out, carry_out
from quikjax.errors import QuikError

if TYPE_CHECKING:
    from quikjax.models.base import CausalLM
    from quikjax.study.grid import Cell, Row


def scaling(
    models: Annotated[list[str], typer.Option(help="Models of one family, with commas between them, or given several times.")],
    out: Out,
    perplexity: Annotated[str, typer.Option(help="A UTF-8 text file, pydoc, wikitext2, ...")] = "pydoc",
    bits: Annotated[str, typer.Option(help="Precisions, 3 to 8, and 16 for the model as it is.")] = "3,4,5,6,8,16",
    types: Annotated[str, typer.Option(help="Data types: int, float, quantile, dynamic, nf.")] = "int,float,quantile,dynamic",
    blocks: Annotated[str, typer.Option(help="Weights that share one absmax; tensor for all of a layer.")] = "64,128,1024,tensor",
    proxy: Annotated[str, typer.Option(help="Shares of input columns kept in 16 bits by the producing layer's weights.")] = "0",
    exponent_bits: Annotated[int | None, typer.Option(help="Of float; left out, 2 of 3 bits and 3 of more.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int, typer.Option(help="How many windows, from the start of the text.")] = 3,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks, by comma, as `quikjax eval` takes them.")] = None,
    task_data: Annotated[Path | None, typer.Option(help="Directory with the tasks' rows.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Which precision is best at a number of model bits: each model in each data type, block and share of outliers.

    Every cell's row is kept as it is finished; the same command goes on where it was killed. --dry-run counts cells, hours, disk.
    """
    from quikjax.texts import evaluation_text

    ints = [_number(text, "--bits", int) for text in bits.split(",")]
    shares = [_number(text, "--proxy", float) for text in proxy.split(",")]
    cut = [parse_block(text.strip()) for text in blocks.split(",")]
    text = evaluation_text(perplexity)

    from quikjax.study.scaling import estimate, grid, open_family, scaling_study, short_blocks
    from quikjax.study.scaling_page import write_page

    family = open_family([name.strip() for given in models for name in given.split(",")], text, window=window, count=windows)
    command = f"quikjax study scaling --out DIR --perplexity {perplexity} --window {window} --windows {windows}"
    cells = grid(
        family,
        bits=ints,
        types=[name.strip() for name in types.split(",")],
        blocks=cut,
        proxies=shares,
        exponent_bits=exponent_bits,
        command=command,
    )
    for note in (*family.warnings, *short_blocks(family, cells)):
        say(f"note: {note}")
    zero_shot, protocol = _zero_shot(tasks, task_data, limit)
    study = scaling_study(family, cells, text, zero_shot, protocol)
    cost = estimate(family, study.cells, study.finished(out))
    say(
        f"{cost.models} models, {cost.cells} cells, {cost.missing} to run: about {duration(cost.hours * 3600)} "
        f"at 30 billion operations a second{', tasks not counted' if tasks else ''}, {size(cost.bytes)} on disk"
    )
    result = carry_out(study, out, dry_run=dry_run, as_json=as_json, progress=_Timed(out))
    if result is not None:
        files = write_page(result, out, comparable=family.comparable)
        say(f"page and charts: {', '.join(files)}")
    elif not as_json:
        show(f"{cost.models} models, {cost.hours:.2f} hours, {cost.bytes} bytes")


class _Timed(GridLines):
    """Lines on stderr, and each cell's seconds beside the rows, which hold no time so that a resumed run's are the same.

    Seconds of a clock, and of all cores together: where others use the machine too, the second says more.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._cores = 0.0

    def begin(self, cell: "Cell") -> None:
        self._cores = time.process_time()
        super().begin(cell)

    def end(self, row: "Row", done: int, total: int, seconds: float, seconds_left: float) -> None:
        from quikjax.errors import resumable
        from quikjax.study.scaling_page import SECONDS

        cores = time.process_time() - self._cores
        with resumable(f"cannot write {self._out}"), open(self._out / SECONDS, "a") as file:
            file.write(json.dumps({"key": row.key, "seconds": round(seconds, 3), "core_seconds": round(cores, 3)}) + "\n")
        super().end(row, done, total, seconds, seconds_left)


def _number(text: str, option: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise QuikError(f'{option} takes numbers with commas between them, not "{text}"') from None


def _zero_shot(tasks: str | None, data: Path | None, limit: int | None) -> tuple[Any, dict[str, Any] | None]:
    """The function that measures a model on tasks, and the fingerprint that tells these tasks from others."""
    if tasks is None:
        if data is not None or limit is not None:
            raise QuikError("--task-data and --limit go with --tasks; name the tasks too")
        return None, None
    from quikjax.evaluation.scoring import Scorer
    from quikjax.evaluation.tasks import check_numbers, find_tasks, run_tasks

    check_numbers(0, limit)
    names = [name.strip() for name in tasks.split(",")]
    found = find_tasks(names, data)

    def measure(model: "CausalLM", tokenizer: Any) -> float:
        scores = [score for score in run_tasks(Scorer(model, tokenizer), found, limit=limit) if score.metric == "acc"]
        if not scores:
            raise QuikError(f"none of the tasks {tasks} has an accuracy; name others")
        return sum(score.value for score in scores) / len(scores)

    return measure, {"names": names, "limit": limit}
