"""Recovery: distil what an artifact holds in floats from the model it was made of, its codes frozen; to disk, resumably.

The student computes with straight-through quantizers in float32, the teacher is the original; what is learned is a language
model's predictions or an encoder's hidden states (`lessons.py`). What is kept is the best of the evaluated steps, step 0 among
them, judged on windows that are not trained on, through the integer path that the artifact runs.

OUT.work     what a killed run needs to go on (`quikjax.training.state`); removed at the end
"""

import functools
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32

from quikjax.checkpoint import REST, Reader, Writer
from quikjax.checkpoint.output import real_path
from quikjax.errors import QuikError
from quikjax.loading import load_params, open_source, verify
from quikjax.loading.locate import DEMO_MODELS
from quikjax.loading.source import Source
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.quantizing.checkpoint import refuse_existing
from quikjax.texts import tokens_fingerprint
from quikjax.training import blocks, loop, moving
from quikjax.training.blocks import Skeleton, Tree
from quikjax.training.lessons import HiddenStates, Lesson, NextTokens
from quikjax.training.loop import NoProgress, Progress
from quikjax.training.memory import check_formats
from quikjax.training.recoverable import is_encoder
from quikjax.training.settings import RecoverySettings, optimizer, order
from quikjax.training.state import Store
from quikjax.version import __version__
from quikjax.weights.quik import QuikWeight


class Recovered(NamedTuple):
    """A finished recovery: the artifact's fingerprint; how far from the original it was on the validation windows, and is.

    Attributes:
        measure: what that is: `kl`, of a language model's predictions, in nats; `distance`, of an encoder's embeddings
            (`1 - cos`).
        before, after: at step 0, and at `step`, whose parameters were saved (0: nothing was better than the beginning).
        evaluations: `(step, figures)`, `measure` the first of them.
    """

    fingerprint: str
    measure: str
    before: float
    after: float
    step: int
    evaluations: list[tuple[int, dict[str, float]]]
    seconds: float


class Student(NamedTuple):
    """An artifact in training: its parameters as read, by part, and taken apart."""

    parts: dict[str, dict[str, Any]]
    skeleton: Skeleton
    still: Tree


class Teacher(NamedTuple):
    """The original, taken apart; nothing of it moves."""

    skeleton: Skeleton
    still: Tree


def recover(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokens: Callable[[Any], Int32[np.ndarray, " tokens"]],
    settings: RecoverySettings | None = None,
    *,
    original: str | Path | Source | None = None,
    context: int | None = None,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Recovered:
    """Recover accuracy of the artifact `artifact` into the artifact `out`: the same format, size and cost.

    Args:
        artifact: a directory that `quantize` or `recover` wrote.
        out: a directory that does not exist, or an artifact with `force`.
        tokens: given the artifact's tokenizer, the text to train and to choose on, as one row of tokens; for an encoder without
            what its tokenizer puts around a text.
        settings: left out, `RecoverySettings.of` the model.
        original: the model that the artifact was made of, as `open_source` takes it, or opened; left out, the demo model, if
            it is that one.
        context: longest window in tokens, in place of what the model declares, which is what the artifact keeps.
        restart: forget what a killed run with the same `out` has done; by default it is gone on with, to the same bytes.

    Raises:
        QuikError: anything wrong with the artifact, its original, the text or the disk; the loss is not finite before any
            evaluation was better than the beginning. What is done so far stays for the next run.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    target = real_path(out)
    refuse_existing(target, force=force)
    reader = Reader(artifact)
    check_formats(reader)
    source = find_original(reader, original)
    settings = settings or RecoverySettings.of(reader.manifest.config, context)
    lesson: Lesson = HiddenStates() if is_encoder(reader.manifest.config) else NextTokens()
    train, held_out = _windows(reader, lesson, tokens, settings, context)
    known = {
        "parent": reader.manifest.fingerprint,
        "tokens": {"sha256": tokens_fingerprint(train), "shape": list(train.shape)},
        "validation_tokens": {"sha256": tokens_fingerprint(held_out), "shape": list(held_out.shape)},
        **settings.model_dump(mode="json"),
        **({} if context is None else {"context": context}),
    }
    store = Store(target.with_name(target.name + ".work"), {"quikjax": __version__, **known}, restart=restart)
    try:
        student, teacher, start = load_both(reader, source, codes=settings.codes, context=context)
        best, notes = _train(lesson, student, teacher, start, train, held_out, settings, store, progress)
        fingerprint = _write(reader, target, lesson, student, best, notes, known, force)
        store.remove()
    finally:
        store.close()
    before, after = (loop.figures_at(notes, step)[lesson.measure] for step in (0, notes["best"]))
    evaluations = [(int(step), dict(figures)) for step, figures in notes["evaluations"]]
    return Recovered(fingerprint, lesson.measure, before, after, notes["best"], evaluations, time.perf_counter() - started)


def find_original(reader: Reader, original: str | Path | Source | None) -> Source:
    """Open the checkpoint that an artifact was made of.

    Raises:
        QuikError: the artifact does not say what it was made of, or it was another model, or nobody says where that is.
    """
    wanted = reader.manifest.provenance.get("source")
    if reader.manifest.config is None or wanted is None:
        raise QuikError(f"{reader.path} does not say which model it was made of; only artifacts of `quantize` can be recovered")
    if original is not None:
        source = original if isinstance(original, Source) else open_source(original)
        if source.fingerprint() != wanted:
            raise QuikError(
                f"{source.where} is not what {reader.path} was made of: its fingerprint is {source.fingerprint()[:16]}..., the "
                f"artifact's original has {wanted[:16]}...; give the checkpoint that was quantized"
            )
        return source
    for name in DEMO_MODELS:
        try:
            source = open_source(name)
        except QuikError:
            continue  # not installed
        if source.fingerprint() == wanted:
            return source
    raise QuikError(
        f"{reader.path} was made of a model with the fingerprint {wanted[:16]}..., its teacher; say where that is with --original"
    )


def _windows(
    reader: Reader,
    lesson: Lesson,
    tokens: Callable[[Any], np.ndarray],
    settings: RecoverySettings,
    context: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = reader.tokenizer()
    if tokenizer is None:
        raise QuikError(f"{reader.path} has no tokenizer, so it cannot read text")
    train, held_out = lesson.cut(tokenizer, tokens(tokenizer), settings)
    config = abstract_model(reader.manifest.config or {}, context=context).config
    if settings.seqlen > config.context_length:
        raise QuikError(f"--seqlen {settings.seqlen} exceeds the model's context of {config.context_length} tokens")
    if max(train.max(), held_out.max()) >= config.vocab_size or min(train.min(), held_out.min()) < 0:
        raise QuikError(f"a token is outside the model's vocabulary of {config.vocab_size}; is this its tokenizer?")
    return train, held_out


def load_both(
    reader: Reader, source: Source, *, codes: bool = False, context: int | None = None
) -> tuple[Student, Teacher, dict[str, moving.Moving]]:
    """Read an artifact and its original, both taken apart, and what moves at step 0.

    Raises:
        QuikError: one of them is damaged; the artifact has no packed weight.
    """
    abstract = abstract_model(source.config, context=context)
    verify(source, abstract)
    prefix = ".".join(abstract.block_path)
    held = {name: reader.read_part(name) for name in reader.parts}
    if not any(isinstance(leaf, QuikWeight) for part in held.values() for leaf in part.values()):
        raise QuikError(f"{reader.path} has no quantized layer: there is nothing to recover")

    def relative(flat: Mapping[str, Any], name: str) -> dict[str, Any]:
        return {path.removeprefix(f"{name}."): leaf for path, leaf in flat.items()}

    dense = {}
    for key in abstract.blocks:
        name = f"{prefix}.{key}"
        dense[key] = {
            path: np.asarray(leaf) for path, leaf in relative(dotted(load_params(source, abstract, [name])), name).items()
        }
    below = f"{prefix}."
    outside = [path for path in dotted(pure_params(abstract)) if not path.startswith(below)]
    rest = {path: np.asarray(leaf) for path, leaf in dotted(load_params(source, abstract, outside)).items()}
    packed = {key: relative(held[f"{prefix}.{key}"], f"{prefix}.{key}") for key in abstract.blocks}
    skeleton, still, start = blocks.take_apart(abstract, packed, held[REST], dense if codes else None)
    teacher_skeleton, teacher_still, _ = blocks.take_apart(abstract, dense, rest)
    device = partial(jax.tree.map, jnp.asarray)
    return Student(held, skeleton, device(still)), Teacher(teacher_skeleton, device(teacher_still)), device(start)


class _Teaching:
    """The teacher's side of windows, made when it is wanted and kept where it will be wanted again."""

    def __init__(self, lesson: Lesson, teacher: Teacher) -> None:
        self.lesson, self.teacher = lesson, teacher
        self._kept: dict[Any, np.ndarray] = {}

    def once(self, ids: Int32[np.ndarray, "batch length"]) -> Float32[Array, "batch ..."]:
        """Of windows that are not kept."""
        return _teach(self.lesson, self.teacher.skeleton, self.teacher.still, jnp.asarray(ids))

    def kept(self, key: Any, ids: Int32[np.ndarray, " length"]) -> Float32[np.ndarray, "one ..."]:
        """Of one window."""
        if key not in self._kept:
            self._kept[key] = np.asarray(self.once(ids[None]))
        return self._kept[key]


@partial(jax.jit, static_argnums=(0, 1))
def _teach(lesson: Lesson, skeleton: Skeleton, still: Tree, ids: Int32[Array, "batch length"]) -> Float32[Array, "batch ..."]:
    return lesson.taught(skeleton, still, ids)


@functools.lru_cache(maxsize=8)
def make_step(lesson: Lesson, skeletons: tuple[Skeleton, Skeleton], settings: RecoverySettings) -> Callable[..., Any]:
    """One compiled step: of `(still, moving, optimizer state, teacher's still, ids, what it taught)` comes
    `(moving, optimizer state, loss, finite)`.

    Where loss or gradient is not finite, nothing moves.
    """
    transform = optimizer(settings)

    @jax.jit
    def step(still: Tree, moved: Any, state: Any, teacher_still: Tree, ids: Array, taught: Array) -> Any:
        loss, gradient = lesson.loss_and_gradients(skeletons, still, moved, teacher_still, ids, taught)
        squares = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))
        finite = jnp.isfinite(loss) & jnp.isfinite(squares)
        updates, after = transform.update(gradient, state)
        kept = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        return kept(optax.apply_updates(moved, updates), moved), kept(after, state), loss, finite

    return step


def _train(
    lesson: Lesson,
    student: Student,
    teacher: Teacher,
    start: dict[str, moving.Moving],
    train: np.ndarray,
    held_out: np.ndarray,
    settings: RecoverySettings,
    store: Store,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    """The moving parameters at the best validation figure, and the notes of all evaluations."""
    teaching = _Teaching(lesson, teacher)
    plan, again = order(len(train), settings), lesson.repeats and settings.steps * settings.batch > len(train)
    step = make_step(lesson, (student.skeleton, teacher.skeleton), settings)

    def take(index: int, moved: Any, state: Any) -> Any:
        chosen = plan[index]
        if again:
            taught = jnp.concatenate([teaching.kept(int(window), train[window]) for window in chosen])
        else:
            taught = teaching.once(train[chosen])
        return step(student.still, moved, state, teacher.still, jnp.asarray(train[chosen]), taught)

    judge = _Judge(student, teaching, held_out)
    training = loop.Training(take, judge, settings.steps, settings.evaluate_every)
    return loop.run(training, start, optimizer(settings).init(start), store, progress)


class _Judge:
    """The lesson's figures of what has moved so far on the validation windows, through the integer path."""

    def __init__(self, student: Student, teaching: _Teaching, held_out: np.ndarray) -> None:
        self._student, self._teaching, self._held_out = student, teaching, held_out

    def __call__(self, moved: Mapping[str, moving.Moving]) -> dict[str, float]:
        parts = finished_parts(self._student, moved)
        params = jax.tree.map(jnp.asarray, {path: leaf for part in parts.values() for path, leaf in part.items()})
        model = nnx.merge(self._student.skeleton.graphdef, nested(params))
        rest = moving.student(self._teaching.teacher.still[REST], {})
        taught = [self._teaching.kept(("held out", at), ids)[0] for at, ids in enumerate(self._held_out)]
        return self._teaching.lesson.figures(model, rest, self._held_out, taught)


def finished_parts(student: Student, moved: Mapping[str, moving.Moving]) -> dict[str, dict[str, Any]]:
    """The artifact's parts with what has moved put in, rounded as they will be stored.

    Raises:
        QuikError: see `moving.finish`.
    """
    finished = {REST: moving.finish(student.parts[REST], moved[REST])}
    for key, own in blocks.blocks_of(student.skeleton, moved):
        name = f"{student.skeleton.prefix}.{key}"
        finished[name] = moving.finish(student.parts[name], {f"{name}.{path}": kinds for path, kinds in own.items()})
    return finished


def _write(
    reader: Reader,
    target: Path,
    lesson: Lesson,
    student: Student,
    best: Mapping[str, moving.Moving],
    notes: Mapping[str, Any],
    known: Mapping[str, Any],
    force: bool,
) -> str:
    """Write the artifact and return its fingerprint."""
    manifest = reader.manifest
    record = {
        **known,
        "best_step": notes["best"],
        f"validation_{lesson.measure}": {str(step): found[lesson.measure] for step, found in notes["evaluations"]},
    }
    if "stopped" in notes:
        record["stopped"] = notes["stopped"]
    if "recovered" in manifest.provenance:
        record["earlier"] = manifest.provenance["recovered"]
    with Writer(
        target,
        config=manifest.config,
        recipe=manifest.recipe,
        provenance={**manifest.provenance, "recovered": record},
        force=force,
        expected_bytes=reader.disk_bytes,
    ) as writer:
        for name, params in finished_parts(student, best).items():
            writer.write_part(name, params)
        return writer.finish(tokenizer=reader.tokenizer(), report=reader.report() or None)
