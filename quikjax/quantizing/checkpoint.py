"""From a published checkpoint to an artifact on disk, block by block, going on where a killed run stopped.

Weights are read one block at a time and written one block at a time; memory holds one block, its Hessians and the activations
of the calibration tokens, whatever the model's depth; activations beyond a budget are on disk, and in memory one sequence at a
time.

DIR.partial      what becomes the artifact DIR
DIR.work         what a killed run needs to go on, and activations on disk; removed at the end
DIR.log.jsonl    what was done to each layer and when; it stays
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from quikjax.checkpoint import REST, Writer
from quikjax.checkpoint.manifest import to_json
from quikjax.checkpoint.output import LOG, beside, real_path, refuse_existing
from quikjax.errors import QuikError, resumable
from quikjax.files import described
from quikjax.loading import load_params, open_source, verify
from quikjax.loading.source import Source
from quikjax.models.base import Transformer
from quikjax.models.dtypes import floating_dtype
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_tokens
from quikjax.quantizing import memory
from quikjax.quantizing.activation_store import ActivationStore, Batch
from quikjax.quantizing.distillation import DistillationStep
from quikjax.quantizing.layer_log import LayerLog
from quikjax.quantizing.model import embed_batches, quantize_blocks
from quikjax.quantizing.params import LayerResult, abstract_weight
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.texts import tokens_fingerprint


@runtime_checkable
class Progress(Protocol):
    """Callbacks of a long quantization while it runs."""

    def start(self, blocks: int, finished: int) -> None:
        """Work begins: so many blocks, so many of them finished by an earlier run."""

    def layer(self, layer: LayerResult, seconds: float) -> None:
        """A layer is quantized; seconds since the one before it (calibration of its group included)."""

    def distilling(self, step: DistillationStep) -> None:
        """A block is being distilled, where the recipe says so."""

    def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
        """A block is on disk."""


class QuantizedCheckpoint(NamedTuple):
    """A finished conversion: the artifact's fingerprint, one JSON row per layer, and the time it took."""

    fingerprint: str
    layers: list[dict[str, Any]]
    seconds: float


class NoProgress:
    def start(self, blocks: int, finished: int) -> None: ...
    def layer(self, layer: LayerResult, seconds: float) -> None: ...
    def distilling(self, step: DistillationStep) -> None: ...
    def block(self, name: str, done: int, total: int, seconds_left: float) -> None: ...


def quantize_checkpoint(
    model: str | Path | Source,
    out: str | os.PathLike[str],
    recipe: Recipe | str,
    calibration: Callable[[Any], Int32[np.ndarray, "samples length"]] | None = None,
    *,
    dtype: Any = jnp.float32,
    force: bool = False,
    restart: bool = False,
    activation_bytes: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    context: int | None = None,
) -> QuantizedCheckpoint:
    """Quantize a published checkpoint into the artifact `out`.

    Args:
        model: what `open_source` takes, or an opened source.
        out: a directory that does not exist or is empty, or an artifact with `force`.
        recipe: what to do, or a recipe's name.
        calibration: given the model's tokenizer, the calibration tokens; may be `None` for a recipe that needs none.
        dtype: of activations in calibration and of what stays unquantized.
        restart: forget what a killed run with the same `out` has finished; by default it is gone on with, if its inputs were
            the same.
        activation_bytes: of host memory for activations, as `memory.activation_bytes` counts them; left out, a quarter of the
            machine's. What takes more is on disk. The result is the same to the bit, also when a run with another budget goes on.
        provenance: more to record beside the fingerprints of source and tokens.
        context: longest calibration sequence, in place of what the model declares, which is what the artifact keeps.

    Raises:
        QuikError: anything wrong with the source, the tokens, the recipe, the budget or the disk. Finished blocks stay for
            the next run.
    """
    started = time.perf_counter()
    recipe = find_recipe(recipe)
    progress = progress or NoProgress()
    dtype, target = floating_dtype(dtype), real_path(out)
    refuse_existing(target, force=force)
    source = model if isinstance(model, Source) else open_source(model)
    abstract = abstract_model(source.config, dtype, context=context)
    check_recipe(recipe, abstract)
    verify(source, abstract)
    tokenizer = source.tokenizer()
    # Needed only at the end, but a damaged file must be said before the work.
    source.stops(tokenizer)
    generation_config = to_json(source.generation_config(), "generation's configuration")
    tokens = None
    if recipe.needs_data():
        if calibration is None:
            raise QuikError(f'recipe "{recipe.name}" needs calibration text')
        if tokenizer is None:
            raise QuikError("this checkpoint has no tokenizer, so no text can calibrate it; put its tokenizer.json beside it")
        if not callable(calibration):
            raise QuikError(f"calibration is a function from a tokenizer to tokens, not {described(calibration)}")
        tokens = checked_tokens(calibration(tokenizer), abstract.config, "the calibration text (--seqlen)")
    work = beside(target, "work")
    budget = memory.default_activation_bytes() if activation_bytes is None else activation_bytes
    spill = tokens is not None and _spills(abstract, recipe, tokens, dtype, budget)
    known = {
        **(provenance or {}),
        "source": source.fingerprint(),
        "tokens": None if tokens is None else {"sha256": tokens_fingerprint(tokens), "shape": list(tokens.shape)},
        "dtype": str(jnp.dtype(dtype)),
    }
    with Writer(
        target,
        config=source.config,
        recipe=recipe.model_dump(mode="json"),
        provenance=known,
        force=force,
        resume=not restart,
        expected_bytes=expected_bytes(abstract, recipe),
    ) as writer:
        anew = not writer.completed_parts()
        if anew:
            shutil.rmtree(work, ignore_errors=True)
        store = ActivationStore(work / "activations", spill=spill)
        log = LayerLog(writer.partial / LOG, anew=anew)
        rows = _convert_blocks(source, abstract, recipe, tokens, dtype, writer, work, store, log, progress)
        fingerprint = writer.finish(
            tokenizer=source.tokenizer_files() or tokenizer, generation_config=generation_config, report=rows
        )
    shutil.rmtree(work, ignore_errors=True)
    return QuantizedCheckpoint(fingerprint, rows, time.perf_counter() - started)


def check_recipe(recipe: Recipe, model: Transformer) -> None:
    """Hold every layer against the recipe before any work.

    Raises:
        QuikError: a recipe with rules matches no layer of this model, or wants as many outliers as a layer has columns.
    """
    paths = dotted(pure_params(model))
    if recipe.rules and not any(recipe.rule_for(path) for path in paths):
        raise QuikError(f'recipe "{recipe.name}" matches no layer of this model; its rules name other paths')
    for path, leaf in paths.items():
        rule = recipe.rule_for(path)
        if rule is None or len(leaf.shape) != 2 or model.block_of(path) is None:
            continue
        wanted = rule.wanted_outliers(leaf.shape[1], model.config.hidden_size)
        if wanted >= leaf.shape[1]:
            raise QuikError(
                f'recipe "{recipe.name}" wants {wanted} outlier columns of {path}, which has {leaf.shape[1]}, so that none '
                "is left to quantize; use fewer outliers"
            )


def expected_bytes(model: Transformer, recipe: Recipe) -> int:
    """About how much disk an artifact takes, from shapes alone; every number a little rounded up."""
    total = 0
    for path, leaf in dotted(pure_params(model)).items():
        rule = recipe.rule_for(path)
        if rule is None or len(leaf.shape) != 2:
            total += leaf.size * leaf.dtype.itemsize
            continue
        k = leaf.shape[1]
        total += abstract_weight(rule, leaf.shape, k - rule.outlier_count(k, model.config.hidden_size)).bits() // 8
    return total + (8 << 20)


def _spills(model: Transformer, recipe: Recipe, tokens: Int32[np.ndarray, "samples length"], dtype: Any, budget: int) -> bool:
    """Tell whether activations exceed the budget, so that they are kept on disk.

    Raises:
        QuikError: not even those of one sequence are within it.
    """
    shapes = {path: leaf.shape for path, leaf in dotted(pure_params(model)).items()}
    whole = 0
    for key, block in model.blocks.items():
        groups = [[".".join((*model.block_path, key, layer, "weight")) for layer in group] for group in block.groups.values()]
        inputs = [shapes[paths[0]][1] for paths in groups if any(recipe.rule_for(path) for path in paths)]
        needed = memory.activation_bytes(model.config.state_size, inputs, tokens.size, jnp.dtype(dtype).itemsize)
        whole = max(whole, needed)
    held = memory.held_activations(whole, len(tokens), budget)
    if problem := memory.budget_problem(held, budget):
        raise QuikError(problem)
    return held < whole


def _convert_blocks(
    source: Source,
    abstract: Transformer,
    recipe: Recipe,
    tokens: Int32[np.ndarray, "samples length"] | None,
    dtype: Any,
    writer: Writer,
    work: Path,
    store: ActivationStore,
    log: LayerLog,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write every part that is not written yet, and return the report rows of all."""
    names = [".".join((*abstract.block_path, key)) for key in abstract.blocks]
    finished = writer.completed_parts()
    done = [name for name in names if name in finished]
    if done != names[: len(done)]:
        raise QuikError(f"the unfinished copy in {writer.partial} lacks a block in the middle; begin again with --restart")
    log.start(len(names), len(done))
    progress.start(len(names), len(done))

    rest = [path for path in dotted(pure_params(abstract)) if abstract.block_of(path) is None]
    params = load_params(source, abstract, rest, dtype)
    if REST not in finished:
        writer.write_part(REST, dotted(params))
    hidden: list[Batch] = []
    if tokens is not None and len(done) < len(names):
        hidden = store.get(done[-1]) if done else store.put("embedded", _embed(abstract, params, tokens))

    def load(name: str) -> dict[str, Any]:
        flat = dotted(load_params(source, abstract, [name], dtype))
        return {path.removeprefix(name + "."): leaf for path, leaf in flat.items()}

    def note(layer: LayerResult) -> None:
        seconds = clock.lap()
        log.layer(layer, seconds)
        progress.layer(layer, seconds)

    def step(step: DistillationStep) -> None:
        if step.step == step.steps:
            log.distilled(step, clock.lap())
        progress.distilling(step)

    clock = _Clock()
    began = time.perf_counter()
    blocks = quantize_blocks(abstract, load, recipe, hidden, store=store, on_layer=note, on_step=step, skip=tuple(done))
    del params, hidden
    for block in blocks:
        # What the next block needs is in the store already: it must be safe before this one counts as finished.
        _write_rows(work, block.name, [layer.as_json() for layer in block.results])
        writer.write_part(block.name, {f"{block.name}.{path}": leaf for path, leaf in block.params.items()})
        if tokens is not None:
            store.commit(block.name)
        done.append(block.name)
        fresh = len(done) - len(set(finished) & set(names))
        left = (time.perf_counter() - began) / fresh * (len(names) - len(done))
        progress.block(block.name, len(done), len(names), left)
    return [row for name in names for row in _read_rows(work, name)]


class _Clock:
    """Seconds between one lap and the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def _embed(abstract: Transformer, rest: Mapping[str, Any], tokens: Int32[np.ndarray, "samples length"]) -> Iterator[np.ndarray]:
    """The hidden states before the first block, one sequence after the other. Blocks stay abstract: none of them is read."""
    filled = nested({**dotted(pure_params(abstract)), **dotted(rest)})
    model = nnx.merge(nnx.split(abstract)[0], filled)
    return embed_batches(model, (row[None] for row in tokens))


def _write_rows(work: Path, name: str, rows: list[dict[str, Any]]) -> None:
    directory = work / "report"
    with resumable(f"cannot write {work}"):
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / f"{name}.json", "w", encoding="utf-8") as file:
            json.dump(rows, file)
            file.flush()
            os.fsync(file.fileno())


def _read_rows(work: Path, name: str) -> list[dict[str, Any]]:
    try:
        return list(json.loads((work / "report" / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise QuikError(f"the report of {name} in {work} cannot be read; begin again with --restart") from None
