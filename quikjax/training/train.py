"""Training of classifiers on labelled texts: in floats, or quantization-aware with distillation, with or without pruning; to
disk, resumably.

The student computes with straight-through quantizers in float32, on dynamic 4-bit activations as it will run; the loss is that of
INT4 training (Wu et al., arXiv 2301.12017): soft cross-entropy against a teacher, plus mean squared errors of hidden states and
of attention scores, plus, where wanted, cross-entropy against labels. What is kept is the best of the evaluated steps, step 0
among them, judged on examples that are not trained on through the integer path that the artifact runs.

OUT.work     what a killed run needs to go on (`quikjax.training.state`); removed at the end
"""

import hashlib
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from quikjax.algorithms.pruning import kept_layers
from quikjax.checkpoint import REST, Writer, split_parts
from quikjax.checkpoint.output import beside, real_path
from quikjax.errors import QuikError
from quikjax.files import user_path
from quikjax.models.registry import dotted, nested
from quikjax.quantizing.checkpoint import refuse_existing
from quikjax.quantizing.model import quantize_model
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.training import blocks, loop, masks
from quikjax.training.accuracy import measured
from quikjax.training.blocks import Skeleton, Tree
from quikjax.training.examples import (
    Examples,
    class_names,
    numbers_of,
    padded,
    plan_batches,
    read_labelled,
    tokenized,
)
from quikjax.training.loop import NoProgress, Progress
from quikjax.training.moving import Moving
from quikjax.training.state import Store
from quikjax.training.steps import dropout_key, make_step, next_average
from quikjax.training.student import Beginning, as_classifier, beginning, with_blocks
from quikjax.training.train_settings import TrainSettings, optimizer
from quikjax.version import __version__
from quikjax.weights import latent

# Examples that calibrate a recipe that wants statistics, in batches of one length.
_CALIBRATION = 64
_EVALUATION_ROWS = 32


class Trained(NamedTuple):
    """A finished training: the artifact's fingerprint, accuracy on the validation examples before and after, the step whose
    parameters were saved, and all evaluations: `[step, error, loss]`."""

    fingerprint: str
    accuracy_before: float
    accuracy: float
    step: int
    evaluations: list[list[float]]
    seconds: float


class Student(NamedTuple):
    """A student in training: its configuration and parameters as quantized at step 0, and taken apart."""

    fields: dict[str, Any]
    params: dict[str, Any]
    skeleton: Skeleton
    still: Tree


# What moves in a student, its masks, and the average of what has moved, where one is kept.
Moved = tuple[dict[str, Moving], masks.Masks, dict[str, Moving] | None]


class Teacher(NamedTuple):
    """A teacher, taken apart; nothing of it moves. `matching`: its block that each of the student's is compared with."""

    skeleton: Skeleton
    still: Tree
    moving: dict[str, Moving]
    matching: tuple[int, ...]


def train(
    model: Any,
    tokenizer: Any,
    data: str | Path,
    out: str | Path,
    settings: TrainSettings | None = None,
    *,
    validation: str | Path,
    recipe: Recipe | str = "fp",
    teacher: Any = None,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train a classifier of texts, and save it as the artifact `out`.

    Args:
        model: what the student begins as: one of our encoders with its weights, dense. Without a classifier it is given one.
        tokenizer: its tokenizer.
        data, validation: files of labelled texts (`examples.read_labelled`): to train on, and to choose the best step on.
        out: a directory that does not exist, or an artifact with `force`.
        recipe: how the student's layers are quantized while it is trained; `fp` leaves them in floats.
        teacher: a dense classifier of the same classes to learn from; without one, only labels teach.
        restart: forget what a killed run with the same `out` has done; by default it is gone on with, to the same bytes.

    Raises:
        QuikError: anything wrong with the models, the data or the disk; the loss is not finite before any evaluation was better
            than the beginning. What is done so far stays for the next run.
    """
    started = time.perf_counter()
    settings, progress = settings or TrainSettings(), progress or NoProgress()
    recipe = find_recipe(recipe)
    if recipe.distillation is not None:
        raise QuikError(
            f'recipe "{recipe.name}" distils blocks while it quantizes them; here the whole student is trained, so take a recipe '
            "without distillation"
        )
    target = real_path(out)
    refuse_existing(target, force=force)
    if tokenizer is None:
        raise QuikError("the model has no tokenizer, so it cannot read texts")
    settings = _with_teaching(settings, teacher)
    rows, held_out = read_labelled(data), read_labelled(validation)
    start = as_classifier(beginning(model), class_names(rows.labels), settings.seed)
    guide = None if teacher is None else beginning(teacher)
    if guide is not None:
        _check_teacher(start, guide, settings)
    config = start.model.config
    names, count = getattr(config, "labels", ()), getattr(config, "label_count", 0)
    longest = min(settings.longest, config.context_length)
    lessons = tokenized(rows.texts, numbers_of(rows.labels, names, count, data), tokenizer, longest)
    exam = tokenized(held_out.texts, numbers_of(held_out.labels, names, count, validation), tokenizer, longest)
    for examples in (lessons, exam):
        _check_tokens(examples, config.vocab_size)
    plan = plan_batches([len(ids) for ids in lessons.ids], settings.batch, settings.steps, settings.seed)
    kept = kept_blocks(start, settings)
    known = {
        "student": _fingerprint(start),
        "teacher": None if guide is None else _fingerprint(guide),
        "data": {"sha256": _sha256(data), "examples": len(rows.labels)},
        "validation": {"sha256": _sha256(validation), "examples": len(held_out.labels)},
        **settings.model_dump(mode="json"),
    }
    inputs = {"quikjax": __version__, "recipe": recipe.model_dump(mode="json"), **known}
    store = Store(beside(target, "work"), inputs, restart=restart)
    try:
        student, moving = take_student(with_blocks(start, kept), recipe, settings, lessons)
        taught = None if guide is None else take_teacher(guide, kept)
        best, notes = _train(student, taught, moving, plan, lessons, exam, settings, store, progress)
        fingerprint = _write(target, student, recipe, tokenizer, best, notes, known, force)
        store.remove()
    finally:
        store.close()
    evaluations = [[step, figures["error"], figures["loss"]] for step, figures in notes["evaluations"]]
    error = loop.figures_at(notes, notes["best"])["error"]
    return Trained(fingerprint, 1 - evaluations[0][1], 1 - error, notes["best"], evaluations, time.perf_counter() - started)


def _with_teaching(settings: TrainSettings, teacher: Any) -> TrainSettings:
    """Without a teacher its losses are off, and labels teach."""
    if teacher is not None:
        return settings
    alone = {"soft_weight": 0.0, "hidden_weight": 0.0, "attention_weight": 0.0, "label_weight": settings.label_weight or 1.0}
    return settings.model_copy(update=alone)


def _check_teacher(start: Beginning, guide: Beginning, settings: TrainSettings) -> None:
    mine, theirs = start.model.config, guide.model.config
    labels = (getattr(mine, "label_count", 0), getattr(theirs, "label_count", 0))
    if labels[0] != labels[1]:
        raise QuikError(
            f"the teacher has {labels[1] or 'no'} classes, the student {labels[0]}; give a teacher trained for this task "
            "(quikjax train MODEL --data ... makes one)"
        )
    named = (getattr(mine, "labels", ()), getattr(theirs, "labels", ()))
    if all(named) and named[0] != named[1]:
        raise QuikError(
            f"the teacher's classes are {', '.join(named[1])}, the student's {', '.join(named[0])}, in this order; give a "
            "teacher of the same classes"
        )
    if mine.vocab_size != theirs.vocab_size:
        raise QuikError(
            f"the teacher has a vocabulary of {theirs.vocab_size} tokens, the student of {mine.vocab_size}; both read the "
            "student's tokens, so give a teacher with the same tokenizer"
        )
    if settings.hidden_weight and mine.hidden_size != theirs.hidden_size:
        raise QuikError(
            f"the teacher's hidden states have {theirs.hidden_size} numbers, the student's {mine.hidden_size}: the loss of "
            "hidden states needs equal widths; set --hidden-weight 0"
        )
    if settings.attention_weight and mine.heads != theirs.heads:
        raise QuikError(
            f"the teacher has {theirs.heads} heads, the student {mine.heads}: the loss of attention scores needs as many; "
            "set --attention-weight 0"
        )
    if (settings.hidden_weight or settings.attention_weight) and theirs.layers != mine.layers:
        raise QuikError(
            f"the teacher has {theirs.layers} blocks, the student {mine.layers} before any are removed: the losses of hidden "
            "states and attention scores compare block with block; set --hidden-weight 0 --attention-weight 0"
        )


def _check_tokens(examples: Examples, vocabulary: int) -> None:
    if max(int(ids.max()) for ids in examples.ids if len(ids)) >= vocabulary:
        raise QuikError(f"a token is outside the model's vocabulary of {vocabulary}; is this its tokenizer?")


def kept_blocks(start: Beginning, settings: TrainSettings) -> tuple[int, ...]:
    """The blocks that stay in the student.

    Raises:
        QuikError: none would.
    """
    layers = start.model.config.layers
    if settings.remove_blocks >= layers:
        raise QuikError(f"the model has {layers} blocks; {settings.remove_blocks} cannot be removed")
    return kept_layers(layers, settings.remove_blocks)


def take_student(
    start: Beginning, recipe: Recipe, settings: TrainSettings, lessons: Examples
) -> tuple[Student, tuple[dict[str, Moving], masks.Masks]]:
    """Prune, quantize and take apart: the student, and what moves at step 0: its latent floats and step sizes, and its masks."""
    model, originals = start.model, dict(start.params)
    prefix = ".".join(model.block_path)
    found = masks.find(model, originals, settings) if settings.prune and settings.prune_first else {}
    unpruned, again = dict(originals), settings.prune_every > 0
    originals |= {path: originals[path] * mask for path, mask in found.items()}
    params = _quantized(model, originals, recipe, lessons)
    if settings.prune and not settings.prune_first:
        found = masks.find(model, masks.dense(params), settings)
    for path, leaf in params.items():
        originals[path] = latent.within_its_code(leaf, originals[path]) if latent.is_quantized(path, leaf) else originals[path]
        if again and path in found:
            # Zeros would stay the smallest: nothing would ever come back.
            originals[path] = np.where(found[path], originals[path], unpruned[path])
    parts = split_parts(params, model.block_path)

    def own(flat: Mapping[str, Any], key: str | None) -> dict[str, Any]:
        below = "" if key is None else f"{prefix}.{key}."
        return {path.removeprefix(below): leaf for path, leaf in flat.items() if path.startswith(below)}

    def begin(key: str | None, flat: Mapping[str, Any]) -> tuple[dict[str, Any], Moving]:
        return latent.start(flat, own(originals, key), own(found, key), revives=again)

    by_key = {key: own(parts[f"{prefix}.{key}"], key) for key in model.blocks}
    skeleton, still, moving = blocks.take_apart_by(model, by_key, parts[REST], begin, latent.student)
    device = partial(jax.tree.map, jnp.asarray)
    still = device(still)
    return Student(start.fields, params, skeleton, still), (device(moving), masks.of(still))


def take_teacher(guide: Beginning, kept: tuple[int, ...]) -> Teacher:
    """A teacher for a student that has kept those of its blocks."""
    model, prefix = guide.model, ".".join(guide.model.block_path)
    parts = split_parts(guide.params, model.block_path)
    by_key = {
        key: {path.removeprefix(f"{prefix}.{key}."): leaf for path, leaf in parts[f"{prefix}.{key}"].items()}
        for key in model.blocks
    }
    skeleton, still, moving = blocks.take_apart_by(
        model, by_key, parts[REST], lambda _key, flat: latent.start(flat, {}), latent.student
    )
    device = partial(jax.tree.map, jnp.asarray)
    matching = kept if model.config.layers > max(kept) else tuple(range(model.config.layers))
    return Teacher(skeleton, device(still), device(moving), matching)


def _quantized(model: Any, params: Mapping[str, Any], recipe: Recipe, lessons: Examples) -> dict[str, Any]:
    """The student's parameters at step 0, as they would be stored."""
    if not recipe.rules:
        return dict(params)
    whole = nnx.merge(nnx.split(model)[0], nested({path: jnp.asarray(leaf) for path, leaf in params.items()}))
    whole.published = model.published
    batches: list[Array] = []
    if recipe.needs_data():
        # Texts of one length each: statistics know no padding.
        by_length: dict[int, list[np.ndarray]] = {}
        for ids in lessons.ids[: 8 * _CALIBRATION]:
            by_length.setdefault(len(ids), []).append(ids)
        longest = sorted(by_length.items(), key=lambda item: -item[0] * len(item[1]))[:4]
        batches = [jnp.asarray(np.stack(rows[:_CALIBRATION])) for _, rows in longest]
    return dotted(quantize_model(whole, recipe, batches))


def _train(
    student: Student,
    teacher: Teacher | None,
    moving: tuple[dict[str, Moving], masks.Masks],
    plan: list[np.ndarray],
    lessons: Examples,
    exam: Examples,
    settings: TrainSettings,
    store: Store,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    """Train; return what moved to the best validation figures, and the notes of all evaluations."""
    step = make_step(
        student.skeleton, None if teacher is None else teacher.skeleton, () if teacher is None else teacher.matching, settings
    )
    taught = None if teacher is None else (teacher.still, teacher.moving)

    def take(index: int, moved: Any, state: Any) -> Any:
        values, found, average = moved
        if settings.prune_every and index and index % settings.prune_every == 0:
            found = masks.again(student.skeleton, masks.put(student.still, found), values, settings)
        batch = padded(lessons, plan[index], settings.batch)
        key = dropout_key(settings, index)
        values, state, loss, finite = step(masks.put(student.still, found), values, state, taught, batch, key)
        return (values, found, next_average(average, values, index, settings.average)), state, loss, finite

    judge = _Judge(student, exam)
    training = loop.Training(take, judge, settings.steps, settings.evaluate_every)
    values, found = moving
    beginning = (values, found, values if settings.average else None)
    return loop.run(training, beginning, optimizer(settings).init(values), store, progress)


class _Judge:
    """Errors and loss of what has moved so far on the validation examples, through the integer path."""

    def __init__(self, student: Student, exam: Examples) -> None:
        self._student, self._exam = student, exam

    def __call__(self, moved: Any) -> dict[str, float]:
        params = nested(jax.tree.map(jnp.asarray, finished_params(self._student, moved)))
        found = measured(self._student.skeleton.graphdef, params, self._exam, _EVALUATION_ROWS)
        return {"error": 1 - found.accuracy, "loss": found.loss}


def finished_params(student: Student, moved: Moved) -> dict[str, Any]:
    """The student's parameters, flat, with what has moved put in (its average, where there is one), as they will be stored.

    Raises:
        QuikError: see `latent.finish`.
    """
    values, found, average = moved
    values = values if average is None else average
    still, skeleton = masks.put(student.still, found), student.skeleton
    of_part = split_parts(student.params, tuple(skeleton.prefix.split(".")))
    finished = latent.finish(of_part[REST], still[REST], values[REST])
    for number, run in enumerate(skeleton.runs):
        for index, key in enumerate(run.keys):
            below = f"{skeleton.prefix}.{key}."
            own = {path.removeprefix(below): leaf for path, leaf in of_part[below[:-1]].items()}
            one = partial(jax.tree.map, lambda leaf, index=index: leaf[index])
            done = latent.finish(own, one(still[str(number)]), one(values[str(number)]))
            finished |= {below + path: leaf for path, leaf in done.items()}
    return {path: finished[path] for path in student.params}


def _write(
    target: Path,
    student: Student,
    recipe: Recipe,
    tokenizer: Any,
    best: Any,
    notes: Mapping[str, Any],
    known: Mapping[str, Any],
    force: bool,
) -> str:
    """Write the artifact and return its fingerprint."""
    by_step = {str(step): figures for step, figures in notes["evaluations"]}
    record = {**known, "best_step": notes["best"], "validation_figures": by_step}
    if "stopped" in notes:
        record["stopped"] = notes["stopped"]
    described = recipe.model_dump(mode="json") if recipe.rules else None
    with Writer(target, config=student.fields, recipe=described, provenance={"trained": record}, force=force) as writer:
        params = finished_params(student, best)
        for name, members in split_parts(params, tuple(student.skeleton.prefix.split("."))).items():
            writer.write_part(name, members)
        return writer.finish(tokenizer=tokenizer)


def _fingerprint(start: Beginning) -> str:
    """SHA-256 over a model's configuration and parameters."""
    digest = hashlib.sha256(repr(sorted(start.fields.items(), key=lambda item: item[0])).encode())
    for path in sorted(start.params):
        leaf = np.ascontiguousarray(start.params[path])
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _sha256(path: str | Path) -> str:
    return hashlib.sha256(user_path(path).read_bytes()).hexdigest()
