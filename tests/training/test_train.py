"""Training from a directory to an artifact: a teacher in floats, a student in 4 bits, the same bytes after a stop."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_classifier import SETTINGS, write_encoder, write_rows

from quikjax.checkpoint import Reader
from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.models.registry import dotted, pure_params
from quikjax.training import masks
from quikjax.training import train as training
from quikjax.training.accuracy import accuracy
from quikjax.training.loop import NoProgress
from quikjax.training.train import Trained, train
from quikjax.weights.formats import dequantize
from quikjax.weights.quik import QuikWeight

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LAYER = "bert.encoder.layer.0.intermediate.dense.weight"


class Place(NamedTuple):
    """A directory with a model, texts, and a teacher trained on them."""

    directory: Path
    teacher: Trained

    def train(self, out: str, settings: Any = SETTINGS, begin: str = "teacher", **options: Any) -> Trained:
        """Train into `out`; by default a student of the teacher that begins as it."""
        at = self.directory
        model, tokenizer = load(at / begin)
        options = {"teacher": load(at / "teacher")[0], "validation": at / "held.tsv", **options}
        return train(model, tokenizer, at / "texts.tsv", at / out, settings, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("training")
    write_encoder(directory / "model")
    write_rows(directory / "texts.tsv", 64, 0)
    write_rows(directory / "held.tsv", 40, 1)
    model, tokenizer = load(directory / "model")
    held = directory / "held.tsv"
    return Place(directory, train(model, tokenizer, directory / "texts.tsv", directory / "teacher", SETTINGS, validation=held))


@pytest.fixture(scope="module")
def student(place: Place) -> Trained:
    return place.train("student", recipe="rtn-w4a4")


def test_a_teacher_learns_and_is_an_artifact(place: Place) -> None:
    done = place.teacher
    assert done.accuracy > max(0.8, done.accuracy_before)
    model, tokenizer = load(place.directory / "teacher")
    found = accuracy(model, tokenizer, place.directory / "held.tsv")
    assert found.accuracy == pytest.approx(done.accuracy)
    assert found.error == pytest.approx(np.sqrt(found.accuracy * (1 - found.accuracy) / 40))
    assert getattr(model.config, "labels", ()) == ("less", "more")
    assert not (place.directory / "teacher.work").exists()


@pytest.mark.long
def test_a_student_runs_in_integers_as_it_was_judged(place: Place, student: Trained) -> None:
    model, tokenizer = load(place.directory / "student")
    params = dotted(pure_params(model))
    assert isinstance(params[LAYER], QuikWeight)
    assert {leaf.label for leaf in params.values() if isinstance(leaf, QuikWeight)} == {"W4A4"}
    found = accuracy(model, tokenizer, place.directory / "held.tsv")
    assert found.accuracy == pytest.approx(student.accuracy)
    best = min(student.evaluations, key=lambda row: row[1:])
    assert student.step == best[0]
    assert best[2] < student.evaluations[0][2]
    told = Reader(place.directory / "student").manifest.provenance["trained"]
    assert (told["best_step"], told["steps"], told["data"]["examples"]) == (student.step, 12, 64)


class Stops(NoProgress):
    """An interrupt after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        if step == self.steps:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_stopped_run_goes_on_to_the_same_bytes(place: Place, student: Trained) -> None:
    with pytest.raises(KeyboardInterrupt):
        place.train("again", recipe="rtn-w4a4", progress=Stops(6))
    with pytest.raises(QuikError, match=r"other inputs \(seed: 0 before, 1 now\).*--restart"):
        place.train("again", SETTINGS.model_copy(update={"seed": 1}), recipe="rtn-w4a4")
    assert place.train("again", recipe="rtn-w4a4").fingerprint == student.fingerprint


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_it(place: Place, student: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.make_step

    def fails(*arguments: Any) -> Any:
        def step(*inputs: Any) -> Any:
            moved, state, loss, finite = real(*arguments)(*inputs)
            return moved, state, loss, finite & False

        return step

    monkeypatch.setattr(training, "make_step", fails)
    with pytest.raises(QuikError, match="not finite at step 1, and nothing before it was better than the beginning"):
        place.train("wild", recipe="rtn-w4a4")
    assert not (place.directory / "wild").exists()


@pytest.mark.long
def test_pruned_weights_are_zero_in_what_runs_and_blocks_go(place: Place) -> None:
    at = place.directory
    write_encoder(at / "deep", "bert-classifier", num_hidden_layers=2, id2label={"0": "less", "1": "more"})
    deep, tokenizer = load(at / "deep")
    settings = SETTINGS.model_copy(update={"prune": "2:4", "prune_every": 1, "steps": 2, "remove_blocks": 1})
    options: Any = {"validation": at / "held.tsv", "teacher": deep, "recipe": "rtn-w4a4"}
    train(deep, tokenizer, at / "texts.tsv", at / "pruned", settings, **options)
    model = load(at / "pruned")[0]
    assert model.config.layers == 1
    W = np.asarray(dequantize(dotted(pure_params(model))[LAYER]))
    assert ((W.reshape(len(W), -1, 4) != 0).sum(-1) <= 2).all()
    assert (W != 0).mean() > 0.4


@pytest.mark.parametrize("recipe", ["fp", pytest.param("rtn-w4a4", marks=pytest.mark.long)])
def test_masks_made_anew_take_pruned_weights_back(place: Place, recipe: str) -> None:
    settings = SETTINGS.model_copy(update={"prune": "unstructured", "prune_every": 2, "steps": 6, "rate": 2e-2})
    done = place.train(f"revived-{recipe}", settings, begin="model", teacher=None, recipe=recipe)
    model, before = (load(place.directory / name)[0] for name in (f"revived-{recipe}", "model"))
    first = masks.find(before, dotted(pure_params(before)), settings)[LAYER.removeprefix("bert.")]
    left = dotted(pure_params(model))[LAYER]
    W = np.asarray(left if recipe == "fp" else dequantize(left))
    assert done.step > 0
    assert (W != 0).mean() <= 0.5
    assert ((W != 0) & (first == 0)).any()


@pytest.mark.parametrize(
    ("prune", "layer", "width"), [("heads", "attention.output.dense", 12), ("intermediate", "output.dense", 1)]
)
def test_whole_heads_and_whole_rows_are_masked(place: Place, prune: str, layer: str, width: int) -> None:
    model = load(place.directory / "model")[0]
    settings = SETTINGS.model_copy(update={"prune": prune})
    found = masks.find(model, dotted(pure_params(model)), settings)
    assert list(found) == [f"encoder.layer.0.{layer}.weight"]
    mask = found[f"encoder.layer.0.{layer}.weight"]
    units = mask.reshape(len(mask), -1, width)
    assert (units == units[:1, :, :1]).all()
    assert units[0, :, 0].mean() == 0.5


def test_mistakes_are_said_before_any_work(place: Place, tmp_path: Path) -> None:
    at = place.directory
    other = write_rows(tmp_path / "other.tsv", 20, 0)
    other.write_text(other.read_text().replace("less", "lots"))
    with pytest.raises(QuikError, match="has the label 'lots', which the classifier does not know; its classes are less, more"):
        place.train("x", validation=other)
    three = write_rows(tmp_path / "three.tsv", 20, 0)
    three.write_text(three.read_text() + "ab\tequal\n")
    model, tokenizer = load(at / "teacher")
    with pytest.raises(QuikError, match=r"classifier has 2 classes, the data 3 \(equal, less, more\)"):
        train(model, tokenizer, three, at / "x", SETTINGS, validation=at / "held.tsv")
    with pytest.raises(QuikError, match="distils blocks while it quantizes them; here the whole student is trained"):
        place.train("x", recipe="zeroquant-w8a8-lkd")
    with pytest.raises(QuikError, match="the teacher has no classes, the student 2; give a teacher trained for this task"):
        place.train("x", teacher=load(at / "model")[0])
    write_encoder(tmp_path / "turned", "bert-classifier", id2label={"0": "more", "1": "less"})
    with pytest.raises(QuikError, match="the teacher's classes are more, less, the student's less, more, in this order"):
        place.train("x", teacher=load(tmp_path / "turned")[0])
    write_encoder(tmp_path / "other", "bert-classifier", vocab_size=300, id2label={"0": "less", "1": "more"})
    with pytest.raises(QuikError, match="the teacher has a vocabulary of 300 tokens, the student of 257"):
        place.train("x", teacher=load(tmp_path / "other")[0])
    write_encoder(tmp_path / "wide", "bert-classifier", hidden_size=64, id2label={"0": "less", "1": "more"})
    wide = load(tmp_path / "wide")[0]
    with pytest.raises(QuikError, match="needs equal widths; set --hidden-weight 0"):
        place.train("x", teacher=wide)
    with pytest.raises(QuikError, match="the model has 1 blocks; 1 cannot be removed"):
        place.train("x", SETTINGS.model_copy(update={"remove_blocks": 1}))
    with pytest.raises(QuikError, match="there are 64 examples, and a batch has 65; give more, or lower --batch"):
        place.train("x", SETTINGS.model_copy(update={"batch": 65}))
    if (at / "student").exists():
        with pytest.raises(QuikError, match="is quantized; training begins with the model as published"):
            place.train("x", begin="student")
    with pytest.raises(QuikError, match="is no classifier of texts; quikjax train makes one"):
        accuracy(*load(at / "model"), at / "held.tsv")
    assert not (at / "x").exists()


@pytest.mark.long
def test_the_commands(place: Place, quikjax_command: Run, tmp_path: Path) -> None:
    at = place.directory
    measured = quikjax_command("accuracy", at / "teacher", "--data", at / "held.tsv")
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout.startswith(f"accuracy {place.teacher.accuracy:.2%} ± ")
    arguments = ("--data", at / "texts.tsv", "--validation", at / "held.tsv", "--out", tmp_path / "out", "--batch", "8")
    trained = quikjax_command("train", at / "model", *arguments, "--steps", "1", "--evaluate-every", "1", "--json")
    assert trained.returncode == 0, trained.stderr
    assert '"accuracy_before"' in trained.stdout
    assert [line.split(":")[0] for line in trained.stderr.splitlines() if line.startswith("after")] == [
        "after 0 steps",
        "after 1 steps",
    ]
    wrong = quikjax_command("train", at / "model", *arguments, "--prune", "3:4")
    assert wrong.returncode == 1
    assert "--prune: Input should be '2:4', 'unstructured', 'heads' or 'intermediate'" in wrong.stderr
