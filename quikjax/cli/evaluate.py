"""`quikjax eval`: perplexity, how far a model is from its original, and tasks."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quikjax.cli.options import Context, Json, Model, check_models, parse_dtype
from quikjax.cli.printing import duration, print_json, say, show, table
from quikjax.errors import QuikError

if TYPE_CHECKING:
    from quikjax.evaluation import Evaluation
    from quikjax.evaluation.layers import ErrorsByDepth


def eval_(
    model: Model,
    perplexity: Annotated[
        str | None, typer.Option(help="Perplexity on this text: a UTF-8 text file, pydoc, wikitext2, ptb or c4.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per window; left out, 2048 or the model's context.")] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows, from the start of the text; left out, all.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; left out, windows do not overlap.")] = None,
    against: Annotated[str | None, typer.Option(help="The original: KL divergence, top-1 agreement and more.")] = None,
    any_original: Annotated[
        bool, typer.Option("--any-original", help="Allow an --against that the artifact was not made from.")
    ] = False,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="With --against: relative errors layer by layer.")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, by commas: piqa,arc_easy,lambada (pip install 'quikjax[tasks]').")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(help="Directory with rows (piqa_validation.jsonl, ...) or YAML tasks; no network is needed.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task, from the first; left out, all.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Write the tasks' prompts with the tokenizer's chat template.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Put the figures on record in DIR.evaluations.jsonl, where `report` finds them.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for models that are not artifacts.")] = "float32",
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Perplexity with its standard error, how far an artifact is from its original, and tasks."""
    # Everything that can be wrong is looked at before anything is loaded.
    check_models(model, against)
    floating = parse_dtype(dtype)
    if perplexity is None and tasks is None:
        raise QuikError("there is nothing to evaluate; give --perplexity TEXT, --tasks NAMES, or both")
    if by_layer and against is None:
        raise QuikError("--by-layer compares with an original; give --against MODEL")
    if perplexity is None and against is not None:
        raise QuikError("--against compares on a text; give --perplexity TEXT")
    if tasks is None and (task_dir is not None or num_fewshot is not None or limit is not None or chat):
        raise QuikError("--task-dir, --num-fewshot, --limit and --chat are about tasks; give --tasks NAMES")

    from quikjax.checkpoint.load import load
    from quikjax.evaluation.original import check_original, check_tokenizers, is_artifact
    from quikjax.models.tokens import checked_model
    from quikjax.reports.evaluations import check_writable, evaluations_file
    from quikjax.texts import evaluation_text

    found_tasks = None
    if tasks is not None:
        from quikjax.evaluation.tasks import check_numbers, find_tasks

        check_numbers(num_fewshot, limit)
        found_tasks = find_tasks([name.strip() for name in tasks.split(",") if name.strip()], task_dir)
    text = None if perplexity is None else evaluation_text(perplexity)
    if save:
        if not is_artifact(model):
            raise QuikError(f"--save records evaluations of an artifact, and {model} is none")
        check_writable(evaluations_file(model))
    warning = None if against is None else check_original(model, against, allow_other=any_original)
    if warning is not None:
        say(f"note: {warning}")

    network, tokenizer = load(model, dtype=floating, context=context)
    network = checked_model(network)
    if tokenizer is None:
        raise QuikError(f"{model} has no tokenizer, so it cannot read text; put its tokenizer.json beside it")
    original = None
    if against is not None and text is not None:
        original, other_tokenizer = load(against, dtype=floating, context=context)
        check_tokenizers(tokenizer, other_tokenizer, text.content, model, against)

    printed: dict[str, Any] = {"model": model}
    if text is not None:
        printed |= _measure(
            model, network, tokenizer, text, window, windows, stride, against, original, warning, by_layer, save, as_json
        )
    if found_tasks is not None:
        printed |= _run_tasks(model, network, tokenizer, found_tasks, num_fewshot, limit, chat, save, as_json)
    if as_json:
        print_json(printed)


def _measure(
    model: str,
    network: Any,
    tokenizer: Any,
    text: Any,
    window: int | None,
    windows: int | None,
    stride: int | None,
    against: str | None,
    original: Any,
    warning: str | None,
    by_layer: bool,
    save: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Perplexity on a text, with its protocol before it and its figures printed or returned."""
    from quikjax.evaluation import evaluate
    from quikjax.evaluation import windows as cut
    from quikjax.evaluation.layers import errors_by_depth
    from quikjax.evaluation.original import is_artifact
    from quikjax.texts import tokenize

    if window is None:
        window = min(2048, network.config.context_length)
    tokens = tokenize(tokenizer, text.content)
    ids = cut(tokens, window, windows, stride)
    protocol = {
        "text": text.origin,
        "window": window,
        "windows": len(ids),
        "stride": stride or window,
        "bos": "once, before the text" if tokens[0] == tokenizer.bos_token_id else "none",
        "against": against,
        "own_original": None if against is None or not is_artifact(model) else warning is None,
    }
    say(f"{len(ids)} windows of {window} tokens of {text.origin}, {_overlap(window, stride)}; BOS: {protocol['bos']}")
    result = evaluate(network, ids, original, stride=stride, on_batch=progress_lines("windows"))
    depth = None
    if by_layer and original is not None:
        say("relative errors layer by layer")
        depth = errors_by_depth(network, original, ids)
    figures = {**result.as_json(), **({} if depth is None else {"by_layer": depth.as_json()})}
    if save:
        _save(model, "perplexity", protocol, figures)
    if not as_json:
        show(_text(result, against))
        if depth is not None:
            show(_depth_text(depth))
    return {**protocol, **figures}


def _run_tasks(
    model: str,
    network: Any,
    tokenizer: Any,
    tasks: Any,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    save: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Tasks through lm-eval, their figures printed or returned."""
    from quikjax.evaluation.scoring import Scorer
    from quikjax.evaluation.tasks import run_tasks

    said = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            say(f"  {done} of {total} requests")

    names = [*tasks.local, *tasks.registered]
    say(f"tasks {', '.join(names)}" + ("" if limit is None else f", the first {limit} rows of each"))
    scores = run_tasks(Scorer(network, tokenizer, progress), tasks, fewshot=fewshot, limit=limit, chat=chat)
    rows = [dataclasses.asdict(score) for score in scores]
    if save:
        _save(model, "tasks", {"tasks": names, "fewshot": fewshot, "limit": limit, "chat": chat}, {"scores": rows})
    if not as_json:
        cells = [
            [
                score.task,
                score.metric,
                f"{score.value:.4f}",
                "" if score.stderr is None else f"{score.stderr:.4f}",
                str(score.rows),
                str(score.fewshot),
                score.data,
            ]
            for score in scores
        ]
        show(table(("task", "metric", "value", "± stderr", "rows", "examples", "data"), cells))
    return {"tasks": rows}


def _overlap(window: int, stride: int | None) -> str:
    if stride is None or stride == window:
        return "not overlapping, all but the first token of each predicted"
    return f"{stride} tokens from one to the next, the last {stride} of each predicted (of the first, all but one)"


def progress_lines(what: str) -> Callable[[int, int, float], None]:
    """Lines of progress on stderr, at most one in ten seconds."""
    began = said = time.perf_counter()

    def progress(done: int, total: int, so_far: float) -> None:
        nonlocal said
        now = time.perf_counter()
        if done < total and now - said > 10:
            said = now
            left = (now - began) / done * (total - done)
            say(f"  {done} of {total} {what}, perplexity so far {so_far:.4g}, about {duration(left)} left")

    return progress


def _save(model: str, kind: Literal["perplexity", "tasks"], protocol: dict[str, Any], figures: dict[str, Any]) -> None:
    from quikjax.checkpoint import read_manifest
    from quikjax.reports.evaluations import EvaluationRecord, add_evaluation

    # Times differ from run to run; a record is of what does not.
    kept = {name: value for name, value in figures.items() if name not in ("seconds", "tokens_per_second")}
    record = EvaluationRecord(
        fingerprint=read_manifest(model).fingerprint,
        kind=kind,
        protocol=protocol,
        result=kept,
        command=shlex.join(["quikjax", *sys.argv[1:]]),
    )
    say(f"recorded in {add_evaluation(model, record)}")


def _text(result: "Evaluation", against: str | None) -> str:
    lines = [
        f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f}  ({result.tokens} tokens, {result.tokens_per_second:.0f}/s)"
    ]
    distance = result.distance
    if distance is not None:
        shares = ", ".join(f"{share} % {value:.4f}" for share, value in distance.kl_percentiles.items())
        lines += [
            "",
            f"against {against}",
            f"  perplexity there   {distance.original_perplexity:.4f}",
            f"  ln of their ratio  {distance.ln_ppl_ratio:.5f} ± {distance.ln_ppl_ratio_stderr:.5f}",
            f"  KL divergence      {distance.kl:.5f} ± {distance.kl_stderr:.5f}",
            f"    median {distance.kl_median:.5f}, {shares}, maximum {distance.kl_max:.4f}",
            f"  top-1 agreement    {distance.top1_agreement:.2%} ± {distance.top1_stderr:.2%}",
            f"  right token's probability changes by {distance.right_change:+.3%} ± {distance.right_change_stderr:.3%}, "
            f"RMS {distance.right_rms:.3%}",
        ]
    head = ["tokens before", "tokens", "perplexity", *([] if distance is None else ["original", "ratio"])]
    rows = [
        [
            f"{row.first}" if row.first == row.last else f"{row.first}-{row.last}",
            str(row.tokens),
            f"{row.perplexity:.2f}",
            *(
                []
                if row.original_perplexity is None
                else [f"{row.original_perplexity:.2f}", f"{row.perplexity / row.original_perplexity:.3f}"]
            ),
        ]
        for row in result.positions
    ]
    return "\n".join([*lines, "", table(head, rows)])


def _depth_text(depth: "ErrorsByDepth") -> str:
    rows = [
        [
            layer.path.removesuffix(".weight"),
            *(f"{x:.4f}" for x in (layer.weights, layer.rounding, layer.inputs, layer.output_forced, layer.output_free)),
        ]
        for layer in depth.layers
    ]
    blocks = [[block.path, f"{block.hidden_forced:.4f}", f"{block.hidden_free:.4f}"] for block in depth.blocks]
    head = ("layer", "weights", "rounding", "inputs", "output, forced", "output, free")
    return "\n".join(
        [
            "",
            "Relative errors. Forced: it reads what it reads in the original; free: what the quantized model has made so far.",
            "",
            table(head, rows),
            "",
            table(("block", "hidden states, forced", "free"), blocks),
        ]
    )
