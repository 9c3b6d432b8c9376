"""Recovery: distil what an artifact holds in floats from the model it was made of, its codes frozen; to disk, resumably.

The student computes with straight-through quantizers in float32, the teacher is the original; the loss is the mean KL divergence
from teacher to student over the whole vocabulary. What is kept is the best of the evaluated steps, step 0 among them, judged on
windows that are not trained on, through the integer path that the artifact runs.

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
from quikjax.evaluation import Reference, evaluate
from quikjax.loading import load_params, open_source, verify
from quikjax.loading.locate import DEMO_MODELS
from quikjax.loading.source import Source
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_model
from quikjax.quantizing.checkpoint import refuse_existing
from quikjax.texts import tokens_fingerprint
from quikjax.training import blocks, distill, loop, moving
from quikjax.training.blocks import Skeleton, Tree
from quikjax.training.loop import NoProgress, Progress
from quikjax.training.memory import check_formats
from quikjax.training.settings import RecoverySettings, cut, default_seqlen, optimizer, order
from quikjax.training.state import Store
from quikjax.version import __version__
from quikjax.weights.quik import QuikWeight


class Recovered(NamedTuple):
    """A finished recovery: the artifact's fingerprint; KL to the original on the validation windows before and after.

    `step` is the one whose parameters were saved (0: nothing was better than the beginning); `evaluations` are `[step, KL,
    perplexity]`.
    """

    fingerprint: str
    kl_before: float
    kl: float
    step: int
    evaluations: list[list[float]]
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
        tokens: given the artifact's tokenizer, the text to train and to choose on, as one row of tokens.
        settings: left out, `RecoverySettings()`, with windows no longer than the context.
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
    settings = settings or RecoverySettings(seqlen=default_seqlen(reader.manifest.config, context))
    train, held_out = _windows(reader, tokens, settings, context)
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
        best, notes = _train(student, teacher, start, train, held_out, settings, store, progress)
        fingerprint = _write(reader, target, student, best, notes, known, force)
        store.remove()
    finally:
        store.close()
    evaluations = [[step, figures["kl"], figures["perplexity"]] for step, figures in notes["evaluations"]]
    kl = loop.figures_at(notes, notes["best"])["kl"]
    return Recovered(fingerprint, evaluations[0][1], kl, notes["best"], evaluations, time.perf_counter() - started)


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
    reader: Reader, tokens: Callable[[Any], np.ndarray], settings: RecoverySettings, context: int | None
) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = reader.tokenizer()
    if tokenizer is None:
        raise QuikError(f"{reader.path} has no tokenizer, so it cannot read text")
    train, held_out = cut(tokens(tokenizer), settings)
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
    abstract = checked_model(abstract_model(source.config, context=context))
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
    """The teacher's last hidden states of windows, made when they are wanted and kept where they will be wanted again."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._kept: dict[Any, np.ndarray] = {}

    def hidden(self, key: Any, ids: Int32[np.ndarray, " length"], *, keep: bool) -> Array:
        """`[1, length, hidden]`."""
        found = self._kept.get(key)
        if found is None:
            found = np.asarray(_teach(self.teacher.skeleton, self.teacher.still, jnp.asarray(ids[None])))
            if keep:
                self._kept[key] = found
        return jnp.asarray(found)


def _still_only(skeleton: Skeleton) -> dict[str, Any]:
    return {REST: {}, **{str(number): {} for number in range(len(skeleton.runs))}}


@partial(jax.jit, static_argnums=0)
def _teach(skeleton: Skeleton, still: Tree, ids: Int32[Array, "batch length"]) -> Float32[Array, "batch length hidden"]:
    nothing = _still_only(skeleton)
    return blocks.forward(skeleton, still, nothing, blocks.embed(skeleton, still, nothing, ids))


def loss_and_gradients(
    skeletons: tuple[Skeleton, Skeleton],
    still: Tree,
    moved: Mapping[str, moving.Moving],
    teacher_still: Tree,
    ids: Int32[Array, "batch length"],
    teacher_hidden: Float32[Array, "batch length hidden"],
) -> tuple[Float32[Array, ""], dict[str, moving.Moving]]:
    """The mean KL from teacher to student over all tokens, and its gradient by everything that moves. Traceable."""
    skeleton, teacher_skeleton = skeletons
    in_blocks = {part: own for part, own in moved.items() if part != REST}
    hidden, back = jax.vjp(
        lambda in_blocks: blocks.forward(
            skeleton, still, {**in_blocks, REST: moved[REST]}, blocks.embed(skeleton, still, moved, ids)
        ),
        in_blocks,
    )

    def head(rest: moving.Moving, rows: Array) -> Array:
        return blocks.outside(skeleton, still, {REST: rest}).head(rows[None])[0]

    def teacher_head(rows: Array) -> Array:
        return blocks.outside(teacher_skeleton, teacher_still, {REST: {}}).head(rows[None])[0]

    loss, d_rest, d_hidden = distill.kl_and_gradients(head, moved[REST], hidden, teacher_head, teacher_hidden)
    return loss, {**back(d_hidden)[0], REST: d_rest}


@functools.lru_cache(maxsize=8)
def make_step(skeletons: tuple[Skeleton, Skeleton], settings: RecoverySettings) -> Callable[..., Any]:
    """One compiled step: of `(still, moving, optimizer state, teacher's still, ids, teacher's hidden)` comes
    `(moving, optimizer state, loss, finite)`.

    Where loss or gradient is not finite, nothing moves.
    """
    transform = optimizer(settings)

    @jax.jit
    def step(still: Tree, moved: Any, state: Any, teacher_still: Tree, ids: Array, teacher_hidden: Array) -> Any:
        loss, gradient = loss_and_gradients(skeletons, still, moved, teacher_still, ids, teacher_hidden)
        squares = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))
        finite = jnp.isfinite(loss) & jnp.isfinite(squares)
        updates, after = transform.update(gradient, state)
        kept = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        return kept(optax.apply_updates(moved, updates), moved), kept(after, state), loss, finite

    return step


def _train(
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
    teaching = _Teaching(teacher)
    plan, again = order(len(train), settings), settings.steps * settings.batch > len(train)
    step = make_step((student.skeleton, teacher.skeleton), settings)

    def take(index: int, moved: Any, state: Any) -> Any:
        chosen = plan[index]
        lessons = jnp.concatenate([teaching.hidden(int(window), train[window], keep=again) for window in chosen])
        return step(student.still, moved, state, teacher.still, jnp.asarray(train[chosen]), lessons)

    judge = _Judge(student, teaching, held_out)
    training = loop.Training(take, judge, settings.steps, settings.evaluate_every)
    return loop.run(training, start, optimizer(settings).init(start), store, progress)


class _Judge:
    """KL and perplexity of what has moved so far on the validation windows, through the integer path."""

    def __init__(self, student: Student, teaching: _Teaching, held_out: np.ndarray) -> None:
        self._student, self._teaching, self._held_out = student, teaching, held_out

    def __call__(self, moved: Mapping[str, moving.Moving]) -> dict[str, float]:
        parts = finished_parts(self._student, moved)
        params = jax.tree.map(jnp.asarray, {path: leaf for part in parts.values() for path, leaf in part.items()})
        teacher = self._teaching.teacher
        rest = moving.student(teacher.still[REST], {})
        hidden = [
            np.asarray(self._teaching.hidden(("held out", index), ids, keep=True))[0] for index, ids in enumerate(self._held_out)
        ]
        graphdef = self._student.skeleton.graphdef
        mine = nnx.merge(graphdef, nested(params))
        # Only the teacher's head is needed, beside its hidden states: the blocks under it may be anybody's.
        theirs = nnx.merge(graphdef, nested({**params, **rest}))
        found = evaluate(mine, self._held_out, Reference(theirs, hidden))
        assert found.kl is not None
        return {"kl": found.kl, "perplexity": found.perplexity}


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
        "validation_kl": {str(step): found["kl"] for step, found in notes["evaluations"]},
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
