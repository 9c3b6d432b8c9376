"""Recovery from artifact to artifact: closer to the original, the same kind and size, and the same bytes again after a stop."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_recovery import SETTINGS, quantize, shapes, tokens, write_model

from quikjax.checkpoint import Reader, parts, restore, sizes
from quikjax.errors import QuikError
from quikjax.evaluation import evaluate, reference
from quikjax.loading import load_published
from quikjax.models.registry import dotted, pure_params
from quikjax.testing import write_tiny_checkpoint
from quikjax.training import recover as recovery
from quikjax.training.loop import NoProgress
from quikjax.training.memory import check_formats, estimate
from quikjax.training.recover import Recovered, recover
from quikjax.training.settings import cut
from quikjax.training.state import INPUTS
from quikjax.weights.quik import QuikWeight

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from model_variants import VARIANTS
from random_weights import random_weights
from tiny_artifacts import read_directory

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an artifact of it."""
    directory = tmp_path_factory.mktemp("recovery")
    quantize(write_model(directory / "model"), directory / "artifact")
    return directory


@pytest.fixture(scope="module")
def done(place: Path) -> Recovered:
    return recover(place / "artifact", place / "recovered", tokens, SETTINGS, original=place / "model")


def test_it_is_closer_to_the_original_on_text_it_was_not_trained_on(place: Path, done: Recovered) -> None:
    assert [step for step, _ in done.evaluations] == [0, 4, 8, 9]
    assert done.after < done.before
    assert done.after == min(figures["kl"] for _, figures in done.evaluations)
    # The figures are the artifacts' own, through the integer path.
    held_out = cut(tokens(), SETTINGS)[1]
    original = reference(load_published(place / "model")[0], held_out)
    for name, kl in (("artifact", done.before), ("recovered", done.after)):
        assert evaluate(restore(place / name)[0], held_out, original).kl == pytest.approx(kl, rel=1e-4)
    assert not (place / "recovered.work").exists()


def test_it_is_the_same_kind_of_thing(place: Path, done: Recovered) -> None:
    before, after = Reader(place / "artifact"), Reader(place / "recovered")
    assert sizes(place / "artifact").all_bits == sizes(place / "recovered").all_bits
    changed = set()
    for name, part in before.parts.items():
        other = after.parts[name]
        assert other.packed == part.packed
        assert {path: (row.dtype, row.shape) for path, row in other.arrays.items()} == {
            path: (row.dtype, row.shape) for path, row in part.arrays.items()
        }
        changed |= {path.rpartition(".")[2] for path, row in part.arrays.items() if other.arrays[path].sha256 != row.sha256}
        codes = [path for path in part.arrays if path.endswith((".qweight", ".columns", "embed_tokens.weight"))]
        assert all(other.arrays[path] == part.arrays[path] for path in codes)
    assert changed == {"scale", "reduced", "outliers", "weight"}
    told = after.manifest.provenance["recovered"]
    assert told["parent"] == before.manifest.fingerprint
    assert told["steps"] == 9
    assert told["seed"] == 0
    assert told["best_step"] == done.step
    assert told["tokens"]["shape"] == [6, 64]
    assert len(told["tokens"]["sha256"]) == 64
    assert after.manifest.provenance["source"] == before.manifest.provenance["source"]
    assert after.manifest.fingerprint == done.fingerprint != before.manifest.fingerprint
    assert after.report() == before.report()


class Stops(NoProgress):
    """An interrupt after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.resumed_at = steps, -1

    def start(self, steps: int, finished: int) -> None:
        self.resumed_at = finished

    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        if step == self.steps:
            raise KeyboardInterrupt


def test_a_second_run_stopped_twice_gives_the_same_bytes(place: Path, done: Recovered) -> None:
    arguments: Any = (place / "artifact", place / "again", tokens, SETTINGS)
    for stop, resumed_at in ((6, 0), (9, 4)):
        progress = Stops(stop)
        with pytest.raises(KeyboardInterrupt):
            recover(*arguments, original=place / "model", progress=progress)
        assert progress.resumed_at == resumed_at
        assert not (place / "again").exists()
    other = SETTINGS.model_copy(update={"seed": 1, "sigma_rate": 0.5})
    with pytest.raises(QuikError, match=r"other inputs \(seed: 0 before, 1 now; sigma_rate: .*--restart"):
        recover(place / "artifact", place / "again", tokens, other, original=place / "model")
    label = sorted((place / "again.work/states").glob("*.json"))[-1]
    assert label.stem == "step-000008"
    last = Stops(-1)
    assert recover(*arguments, original=place / "model", progress=last).fingerprint == done.fingerprint
    assert last.resumed_at == 8
    assert read_directory(place / "again") == read_directory(place / "recovered")


def test_a_damaged_state_is_not_gone_on_with(place: Path) -> None:
    arguments: Any = (place / "artifact", place / "damaged", tokens, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        recover(*arguments, original=place / "model", progress=Stops(1))
    data = max((place / "damaged.work/states/step-000000").rglob("0*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(QuikError, match=r"is damaged.*--restart"):
        recover(*arguments, original=place / "model")
    (place / "damaged.work" / INPUTS).write_text("{")
    with pytest.raises(QuikError, match="is damaged; begin again with --restart"):
        recover(*arguments, original=place / "model")


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = SETTINGS.model_copy(update={"sigma_rate": 1e4})
    with pytest.raises(QuikError, match="nothing before it was better than the beginning; train at lower rates"):
        recover(place / "artifact", place / "wild", tokens, wild, original=place / "model")
    assert not (place / "wild").exists()

    # Later, what was better before is saved.
    real = recovery.make_step

    def fails_at_the_seventh(*arguments: Any) -> Any:
        step, taken = real(*arguments), []

        def counting(*inputs: Any) -> Any:
            taken.append(1)
            moved, state, loss, finite = step(*inputs)
            return moved, state, loss, finite & (len(taken) < 7)

        return counting

    monkeypatch.setattr(recovery, "make_step", fails_at_the_seventh)
    said: list[str] = []
    progress = NoProgress()
    monkeypatch.setattr(progress, "stopped", said.append, raising=False)
    saved = recover(place / "artifact", place / "stopped", tokens, SETTINGS, original=place / "model", progress=progress)
    assert saved.step == 4
    assert said == ["the loss or its gradient is not finite at step 7; saving step 4, the best before it"]
    assert Reader(place / "stopped").manifest.provenance["recovered"]["stopped"].endswith("not finite at step 7")


@pytest.mark.long
def test_a_disk_that_fills_is_said_and_gone_on_from(place: Path, done: Recovered, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = parts.write, []

    def full(*arguments: Any) -> Any:
        written.append(arguments[1])
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(parts, "write", full)
    with pytest.raises(QuikError, match="the disk is full; the state before is kept, make room and run the same command again"):
        recover(place / "artifact", place / "full", tokens, SETTINGS, original=place / "model")
    assert written == ["step-000000", "step-000004", "step-000008"]
    monkeypatch.setattr(parts, "write", write)
    progress = Stops(-1)
    assert recover(place / "artifact", place / "full", tokens, SETTINGS, original=place / "model", progress=progress) == (
        *done[:6],
        pytest.approx(0, abs=1e4),
    )
    assert progress.resumed_at == 4


def test_what_cannot_be_recovered_is_said_at_once(place: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=1, num_hidden_layers=2)
    with pytest.raises(
        QuikError, match=r"is not what .* was made of: its fingerprint is .* give the checkpoint that was quantized"
    ):
        recover(place / "artifact", tmp_path / "out", tokens, SETTINGS, original=other)
    with pytest.raises(QuikError, match="say where that is with --original"):
        recover(place / "artifact", tmp_path / "out", tokens, SETTINGS)
    with pytest.raises(QuikError, match="the text has 320 tokens, 5 windows of 64; 9 are needed, 3 of them to choose on"):
        recover(place / "artifact", tmp_path / "out", lambda _: tokens(count=5), SETTINGS, original=place / "model")
    long = SETTINGS.model_copy(update={"seqlen": 300, "windows": 1, "validation": 1})
    with pytest.raises(QuikError, match="exceeds the model's context of 256"):
        recover(place / "artifact", tmp_path / "out", lambda _: np.zeros(600, np.int32), long, original=place / "model")
    with pytest.raises(QuikError, match="outside the model's vocabulary"):
        recover(place / "artifact", tmp_path / "out", lambda _: tokens() + 1000, SETTINGS, original=place / "model")
    with pytest.raises(QuikError, match="exists"):
        recover(place / "artifact", place / "model", tokens, SETTINGS, original=place / "model")
    other_format = Reader(place / "artifact")
    other_format.parts["model.layers.0"].packed["model.layers.0.mlp.up_proj.weight"]["class"] = "CodebookWeight"
    with pytest.raises(QuikError, match=r"up_proj.weight is a CodebookWeight; only layers in QUIK format can be recovered"):
        check_formats(other_format)
    dense = quantize(place / "model", tmp_path / "dense", "fp", off=1.0)
    with pytest.raises(QuikError, match="has no quantized layer"):
        recover(dense, tmp_path / "out", tokens, SETTINGS, original=place / "model")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("codes", [True])
def test_codes_may_move_too(place: Path, codes: bool) -> None:
    settings = SETTINGS.model_copy(update={"codes": codes, "code_rate": 0.1, "steps": 4})
    found = recover(place / "artifact", place / "codes", tokens, settings, original=place / "model")
    assert sizes(place / "codes").all_bits == sizes(place / "artifact").all_bits
    before, after = Reader(place / "artifact"), Reader(place / "codes")
    path = "model.layers.0.mlp.up_proj.weight.qweight"
    moved = before.parts["model.layers.0"].arrays[path] != after.parts["model.layers.0"].arrays[path]
    assert moved == (found.step > 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-125m", "opt-350m", "gpt2", "falcon-7b", "falcon-40b", "falcon-rw-1b"])
def test_every_family_recovers(name: str, tmp_path: Path) -> None:
    fields = {**VARIANTS[name], "vocab_size": 257}
    quantize(write_model(tmp_path / "model", fields, random_weights(shapes(fields), 0)), tmp_path / "artifact")
    found = recover(tmp_path / "artifact", tmp_path / "out", tokens, SETTINGS, original=tmp_path / "model")
    assert found.after < found.before


def test_the_estimate_counts_what_is_there(place: Path) -> None:
    params = dotted(pure_params(restore(place / "artifact")[0]))
    packed = [leaf for leaf in params.values() if isinstance(leaf, QuikWeight)]
    norms = sum(leaf.size for leaf in params.values() if not isinstance(leaf, QuikWeight) and leaf.ndim == 1)
    moves = sum(leaf.outputs + leaf.outputs * (leaf.inputs - leaf.base) for leaf in packed) + norms
    found = estimate(place / "artifact", SETTINGS)
    assert found.moving == 24 * moves
    with_codes = estimate(place / "artifact", SETTINGS.model_copy(update={"codes": True}))
    assert with_codes.moving - found.moving == 24 * sum(leaf.outputs * leaf.inputs for leaf in packed)
    # Windows of which 9 steps see 6, and 3 to choose on.
    assert found.hidden_states == 4 * 64 * 64 * 9
    # Codes twice, in a byte; what is outside the blocks in float32; the teacher in float32.
    outside = params["model.embed_tokens.weight"].size + 64
    inside = sum(leaf.outputs * leaf.inputs for leaf in packed) + norms - 64
    assert (found.student, found.teacher) == (2 * inside + 4 * outside, 4 * (inside + outside))
    assert 0 < found.step_seconds < found.seconds
    assert found.as_json()["total"] == found.total > found.teacher


@pytest.mark.long
def test_the_command_says_what_it_does(place: Path, done: Recovered, quikjax_command: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 16 * 32).astype(np.uint8)))
    settings = ("--steps", "2", "--seqlen", "32", "--windows", "4", "--validation", "2", "--evaluate-every", "1")
    plan = quikjax_command("recover", place / "artifact", "--plan", *settings)
    assert plan.returncode == 0, plan.stderr
    assert [line.split()[0] for line in plan.stdout.splitlines()] == ["memory", "time"]
    arguments = ("--calibration", text, "--original", place / "model", *settings, "--json")
    ran = quikjax_command("recover", place / "artifact", "--out", tmp_path / "out", *arguments)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("after")] == [
        "after 0 steps",
        "after 1 steps",
        "after 2 steps",
    ]
    assert any(line.startswith("step 2 of 2  KL") for line in lines)
    assert "\x1b" not in ran.stderr
    assert '"kl_before"' in ran.stdout
    missing = quikjax_command("recover", place / "artifact", *arguments)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1] == "error: say where the result goes with --out, or ask for --plan"
    wrong = quikjax_command("recover", place / "artifact", "--out", tmp_path / "o", "--steps", "0")
    assert wrong.stderr.splitlines()[-1] == "error: --steps: Input should be greater than or equal to 1"
