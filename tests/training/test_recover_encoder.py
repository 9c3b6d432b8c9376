"""Recovery of encoders: hidden states nearer to the original's, the same kind and size, and the same bytes after a stop."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_classifier import VARIANTS, random_weights, write_encoder
from tiny_recovery import quantize, shapes, tokens, write_model
from tokenizers import processors

from quikjax.checkpoint import Reader, restore, sizes
from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.models.base import Positions, default_positions
from quikjax.models.registry import dotted, pure_params
from quikjax.testing import tiny_tokenizer
from quikjax.training.lessons import HiddenStates, NextTokens
from quikjax.training.loop import NoProgress
from quikjax.training.memory import estimate
from quikjax.training.recover import Recovered, load_both, recover
from quikjax.training.recoverable import check_recoverable
from quikjax.training.settings import RecoverySettings
from quikjax.weights.quik import QuikWeight

SETTINGS = RecoverySettings(steps=6, batch=2, seqlen=32, windows=8, validation=3, evaluate_every=3, sigma_rate=2e-2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of two blocks and an artifact of it."""
    directory = tmp_path_factory.mktemp("encoder")
    write_encoder(directory / "model", num_hidden_layers=2)
    quantize(directory / "model", directory / "artifact")
    return directory


@pytest.fixture(scope="module")
def done(place: Path) -> Recovered:
    return recover(place / "artifact", place / "recovered", tokens, SETTINGS, original=place / "model")


def hidden_states(model: Any, ids: np.ndarray) -> list[np.ndarray]:
    """What leaves each block, one after the other."""
    where = Positions(default_positions(jnp.asarray(ids)))
    hidden, found = model.embed(jnp.asarray(ids), where.queries), []
    for block in model.blocks.values():
        hidden, _ = block(hidden, where)
        found.append(np.asarray(hidden, np.float64))
    return found


def test_its_embeddings_are_closer_to_the_originals(place: Path, done: Recovered) -> None:
    assert done.measure == "distance"
    assert [step for step, _ in done.evaluations] == [0, 3, 6]
    assert done.after < done.before
    assert done.after == min(figures["distance"] for _, figures in done.evaluations)
    # The figures are the artifacts' own, through the integer path.
    held_out = HiddenStates().cut(tiny_tokenizer(), tokens(), SETTINGS)[1]
    theirs = hidden_states(load(place / "model")[0], held_out)[-1]
    for name, step in (("artifact", 0), ("recovered", done.step)):
        mine = hidden_states(restore(place / name)[0], held_out)[-1]
        a, b = mine.mean(axis=1), theirs.mean(axis=1)
        cosine = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        figures = dict(done.evaluations)[step]
        assert figures["distance"] == pytest.approx(np.mean(1 - cosine), rel=1e-3)
        assert figures["error"] == pytest.approx(np.sum((mine - theirs) ** 2) / np.sum(theirs**2), rel=1e-3)


def test_it_is_the_same_kind_of_thing(place: Path, done: Recovered) -> None:
    before, after = Reader(place / "artifact"), Reader(place / "recovered")
    assert sizes(place / "artifact").all_bits == sizes(place / "recovered").all_bits
    changed = {
        path
        for name, part in before.parts.items()
        for path, row in part.arrays.items()
        if after.parts[name].arrays[path].sha256 != row.sha256
    }
    kinds = {path.rpartition(".")[2] for path in changed}
    assert kinds == {"scale", "reduced", "outliers", "weight", "bias"}
    assert all("LayerNorm" in path for path in changed if path.endswith((".weight", ".bias")))
    told = after.manifest.provenance["recovered"]
    assert told["validation_distance"][str(done.step)] == done.after
    assert told["best_step"] == done.step
    assert told["tokens"]["shape"] == [8, 32]


def test_the_loss_is_its_equation(place: Path) -> None:
    reader = Reader(place / "artifact")
    student, teacher, start = load_both(reader, open_source(place / "model"))
    lesson, ids = HiddenStates(), tokens(count=1).reshape(2, -1)
    taught = lesson.taught(teacher.skeleton, teacher.still, jnp.asarray(ids))
    theirs = hidden_states(load(place / "model")[0], ids)
    np.testing.assert_allclose(np.moveaxis(np.asarray(taught), 1, 0), theirs, rtol=1e-3, atol=1e-4)
    skeletons = (student.skeleton, teacher.skeleton)
    found, gradient = jax.jit(lesson.loss_and_gradients, static_argnums=0)(
        skeletons, student.still, start, teacher.still, jnp.asarray(ids), taught
    )
    mine = hidden_states(restore(place / "artifact")[0], ids)
    each = [np.sum((a - b) ** 2) / np.sum(b**2) for a, b in zip(mine, theirs, strict=True)]
    # An activation on the boundary of two codes may fall to either side in another program.
    assert float(found) == pytest.approx(np.mean(each) + each[-1], rel=0.05)
    assert str(jax.tree.structure(gradient)) == str(jax.tree.structure(start))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_windows_are_whole_texts() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.eos_token} $A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, 256)]
    )
    settings = RecoverySettings(seqlen=6, windows=2, validation=1)
    train, held_out = HiddenStates().cut(tokenizer, np.arange(13, dtype=np.int32), settings)
    assert train.tolist() == [[256, 0, 1, 2, 3, 256], [256, 4, 5, 6, 7, 256]]
    assert held_out.tolist() == [[256, 8, 9, 10, 11, 256]]
    assert NextTokens().cut(tokenizer, np.arange(18, dtype=np.int32), settings)[0].tolist()[0] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(QuikError, match="no room for a text beside the 2 around it"):
        HiddenStates().cut(tokenizer, np.arange(13, dtype=np.int32), settings.model_copy(update={"seqlen": 2}))


class Stops(NoProgress):
    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        if step == 4:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_second_run_stopped_once_gives_the_same_bytes(place: Path, done: Recovered) -> None:
    arguments: Any = (place / "artifact", place / "again", tokens, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        recover(*arguments, original=place / "model", progress=Stops())
    again = recover(*arguments, original=place / "model")
    assert again.fingerprint == done.fingerprint


@pytest.mark.long
@pytest.mark.parametrize("name", ["bert-classifier", "distilbert"])
def test_codes_move_in_other_families_and_heads_stay(name: str, tmp_path: Path) -> None:
    fields = {**VARIANTS[name], "vocab_size": 257}
    quantize(write_model(tmp_path / "model", fields, random_weights(shapes(fields), 0)), tmp_path / "artifact")
    settings = SETTINGS.model_copy(update={"codes": True, "code_rate": 0.15})
    found = recover(tmp_path / "artifact", tmp_path / "out", tokens, settings, original=tmp_path / "model")
    assert found.after < found.before
    before, after = (dotted(pure_params(restore(tmp_path / name)[0])) for name in ("artifact", "out"))
    packed = [path for path, leaf in before.items() if isinstance(leaf, QuikWeight)]
    assert any(bool((before[path].qweight != after[path].qweight).any()) for path in packed)
    heads = [path for path in before if "classifier" in path or "pooler" in path]
    assert all(bool((before[path] == after[path]).all()) for path in heads)
    assert bool(heads) == (name == "bert-classifier")


def test_settings_are_the_kinds_own(place: Path) -> None:
    encoder, decoder = {"model_type": "bert"}, None
    config = Reader(place / "artifact").manifest.config
    found = RecoverySettings.of(config, steps=7, batch=None)
    assert (found.steps, found.batch, found.seqlen) == (7, 32, 64)
    assert RecoverySettings.of(decoder) == RecoverySettings()
    assert RecoverySettings.of(config, batch=3, norm_rate=0.5).model_dump()["norm_rate"] == 0.5
    assert check_recoverable(encoder, place) == encoder
    with pytest.raises(QuikError, match="is an encoder-decoder"):
        check_recoverable({"model_type": "bart"}, place)


def test_the_estimate_counts_what_is_there(place: Path) -> None:
    params = dotted(pure_params(restore(place / "artifact")[0]))
    packed = [leaf for leaf in params.values() if isinstance(leaf, QuikWeight)]
    norms = sum(leaf.size for path, leaf in params.items() if "LayerNorm" in path)
    moves = sum(leaf.outputs + leaf.outputs * (leaf.inputs - leaf.base) for leaf in packed) + norms
    found = estimate(place / "artifact", SETTINGS)
    assert found.moving == 24 * moves
    # Every block's hidden states, of the windows to choose on and of one step.
    assert found.hidden_states == 4 * 32 * 48 * 2 * (3 + 2)
    assert 0 < found.step_seconds < found.seconds
