"""BART from a directory to an artifact and back: forms of a checkpoint, quantizing, planning, reporting, export, commands."""

import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from bart_variants import VARIANTS
from random_weights import random_weights
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import quikjax
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.cli.bench import bench
from quikjax.cli.chat import chat
from quikjax.cli.generate import generate
from quikjax.encoding import embed
from quikjax.errors import QuikError
from quikjax.generation import TextToText
from quikjax.loading.tokenizer import add_borders
from quikjax.models.bart import BartConfig, BartForConditionalGeneration
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.planning.plan import make_plan
from quikjax.quantizing.calibration import calibration_tokens
from quikjax.quantizing.checkpoint import NoProgress, quantize_checkpoint
from quikjax.reports.artifact import read_report
from quikjax.testing import END, forward, tiny_tokenizer
from quikjax.weights.formats import is_packed

Weights = dict[str, np.ndarray]
SMALL = {"vocab_size": 257, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 256}
STARTS = {"decoder_start_token_id": 256, "forced_bos_token_id": 70, "forced_eos_token_id": 256}
FIELDS = {**VARIANTS["bart-summarizer"], **SMALL, **STARTS}
CLASSES = {**VARIANTS["bart-classifier"], **SMALL, "decoder_start_token_id": 256}
app = typer.Typer()
for command in (generate, chat, bench):
    app.command(command.__name__)(command)
TABLES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")


def random_checkpoint(fields: dict[str, Any]) -> Weights:
    shapes = {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract_model(fields))).items()}
    return random_weights(shapes, 3)


def write(directory: Path, weights: Weights, fields: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    """The weights as Hugging Face publishes them, with a tokenizer that puts a token around each text."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, directory / "model.safetensors")
    tokenizer = tiny_tokenizer()
    add_borders(tokenizer.backend_tokenizer, bos=END, eos=END)
    tokenizer.save_pretrained(str(directory))
    return directory


def test_every_form_of_a_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    weights = random_checkpoint(FIELDS)
    table = weights["model.shared.weight"]
    untabled = {name: array for name, array in weights.items() if name != "model.shared.weight"}
    bare = {**FIELDS, "architectures": ["BartModel"]}
    core = {path: array for path, array in weights.items() if path.startswith("model.")}
    for name, fields, held, expected in (
        ("once", FIELDS, weights, weights),
        ("repeated", FIELDS, weights | dict.fromkeys(TABLES, table), weights),
        ("encoder's", FIELDS, untabled | {TABLES[0]: table}, weights),
        ("bare", bare, {path.removeprefix("model."): array for path, array in core.items()}, core),
        ("prefixed", bare, core, core),
    ):
        found = dotted(pure_params(quikjax.load(write(tmp_path / name, held, fields))[0]))
        assert found.keys() == expected.keys(), name
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=f"{name}: {path}")
    with pytest.raises(QuikError, match=r"ties the head to the embeddings, but lm_head\.weight and model\.shared\.weight differ"):
        quikjax.load(write(tmp_path / "other head", weights | {"lm_head.weight": table + 1}, FIELDS))


@pytest.mark.parametrize("fields", [FIELDS, CLASSES], ids=["summarizer", "classifier"])
def test_a_flax_checkpoint_is_the_same_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    expected = random_checkpoint(fields)
    tree: dict[str, Any] = {}
    for path, array in expected.items():  # as transformers' Flax classes named and laid them out
        *parents, leaf = path.split(".")
        kind = "embedding" if path.endswith(("shared.weight", "positions.weight")) else "kernel" if array.ndim == 2 else "scale"
        node = tree
        for step in parents:
            node = node.setdefault(step, {})
        node[kind if leaf == "weight" else leaf] = array.T.copy() if kind == "kernel" and leaf == "weight" else array
    directory = write(tmp_path / "flax", {}, fields)
    (directory / "model.safetensors").unlink()
    (directory / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    found = dotted(pure_params(quikjax.load(directory)[0]))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A summarizer's directory that names its tokens as newer ones do, and its QUIK-4B artifact beside it."""
    place = tmp_path_factory.mktemp("bart")
    fields = {name: value for name, value in FIELDS.items() if name not in STARTS}
    write(place / "model", random_checkpoint(FIELDS), {**fields, "decoder_start_token_id": 2}, STARTS)
    quantize_checkpoint(place / "model", place / "artifact", "quik-4b", windows(FIELDS))
    return place


def windows(fields: dict[str, Any]) -> Any:
    text = "What a text says, an encoder reads at once. " * 9
    return lambda tokenizer: calibration_tokens(abstract_model(fields), tokenizer, text, 3, 32)


@pytest.mark.long
def test_both_sides_are_quantized_and_planned(place: Path) -> None:
    model, _ = quikjax.restore(place / "artifact")
    packed = {path for path, leaf in dotted(pure_params(model)).items() if is_packed(leaf)}
    assert packed == {
        f"model.{key}.{layer}.weight"
        for key, block in model.blocks.items()
        for layers in block.groups.values()
        for layer in layers
    }
    assert list(model.blocks) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]
    planned = make_plan(FIELDS, memory_bytes=1 << 30)
    assert not planned.problems
    assert planned.generates
    assert sum(row.count for row in planned.layers) == sum(row.count for row in read_report(place / "artifact").layers) == 32
    idle = {row.pattern for row in planned.layers if row.decode is None}
    across = {f"model.decoder.layers.*.encoder_attn.{name}_proj.weight" for name in "kv"}
    assert idle == across | {row.pattern for row in planned.layers if ".encoder." in row.pattern}
    # Keys and values of the tokens written, and of the text: for 64 tokens of 2 blocks.
    assert planned.running.cache == 4 * 2 * 64 * 32 * 4
    assert not make_plan(FIELDS, "int4", memory_bytes=1 << 30).problems


@pytest.mark.long
def test_the_quantized_model_is_near_the_original_and_exports_as_what_it_computes(place: Path, tmp_path: Path) -> None:
    original, _ = quikjax.load(place / "model")
    quantized, _ = quikjax.restore(place / "artifact")
    assert original.config == quantized.config
    assert isinstance(quantized.config, BartConfig)
    assert (quantized.config.start, quantized.config.first, quantized.config.last) == (256, 70, 256)
    assert isinstance(original, BartForConditionalGeneration)
    assert isinstance(quantized, BartForConditionalGeneration)
    ids = np.random.default_rng(1).integers(0, 256, (2, 24)).astype(np.int32)
    theirs, mine = forward(original, ids), forward(quantized, ids)
    assert 0 < float(jnp.sqrt(jnp.mean((mine - theirs) ** 2) / jnp.mean(theirs**2))) < 0.5
    export_safetensors(place / "artifact", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == dotted(pure_params(original)).keys()
    again, _ = quikjax.load(tmp_path / "out")
    for path, leaf in dotted(quikjax.dequantize_params(pure_params(quantized))).items():
        np.testing.assert_array_equal(dotted(pure_params(again))[path], leaf)


@pytest.mark.long
def test_a_killed_run_goes_on_between_the_halves(place: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Progress(NoProgress):
        def start(self, blocks: int, finished: int) -> None:
            self.before = finished

        def layer(self, layer: Any, seconds: float) -> None: ...

        def block(self, name: str, done: int, total: int, seconds_left: float) -> None:
            if name == "model.encoder.layers.1" and not self.before:
                raise Killed

    given = (place / "model", tmp_path / "out", "quik-4b", windows(FIELDS))
    progress = Progress()
    with pytest.raises(Killed):
        quantize_checkpoint(*given, progress=progress)
    quantize_checkpoint(*given, progress=progress)
    assert progress.before == 2
    whole, again = (dotted(pure_params(quikjax.restore(path)[0])) for path in (place / "artifact", tmp_path / "out"))
    for path, leaf in whole.items():
        for mine, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(again[path]), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=path)


@pytest.mark.long
def test_the_command_gives_the_encoder_the_prompt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would set where this process keeps what it compiles.
    monkeypatch.setattr("quikjax.executables.keep_executables", lambda _: None)

    def said(*arguments: str | Path) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        if result.exception is not None:
            raise result.exception
        return result.stdout

    model, tokenizer = quikjax.restore(place / "artifact")
    expected = TextToText(model, tokenizer=tokenizer).generate([tokenizer("a text")["input_ids"]], max_new_tokens=6)
    found = json.loads(said("generate", place / "artifact", "a text", "--max-new-tokens", "6", "--json"))
    assert expected.texts is not None
    assert (found["text"], found["prompt_tokens"]) == (expected.texts[0], 8)
    assert found["text"].startswith(tokenizer.decode([70]))  # the token that is forced
    with pytest.raises(QuikError, match="has no turns of a chat; leave --chat out"):
        said("generate", place / "artifact", "a text", "--chat")
    with pytest.raises(QuikError, match="a text of 102 tokens exceeds the 64 that the model reads"):
        said("generate", place / "artifact", "x" * 100)
    for other in (("chat",), ("bench", "-t", "pp8")):
        with pytest.raises(QuikError, match=r"reads a whole text with an encoder .*use it with: quikjax generate"):
            said(other[0], place / "artifact", *other[1:])


@pytest.mark.long
def test_a_classifier_is_quantized_and_classifies(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", random_checkpoint(CLASSES), CLASSES)
    quantize_checkpoint(directory, tmp_path / "artifact", "rtn-w8a8")
    texts = ["a text", "and another, which is longer"]
    model, tokenizer = quikjax.load(directory)
    assert tokenizer is not None
    found = quikjax.classify(model, tokenizer, texts)
    assert found.labels == ("contradiction", "neutral", "entailment")
    for text, scores in zip(texts, found.scores, strict=True):
        row = np.asarray(forward(model, np.array([tokenizer(text)["input_ids"]])))[0]
        np.testing.assert_allclose(scores, np.exp(row) / np.exp(row).sum(), atol=1e-5)
    near = quikjax.classify(*quikjax.restore(tmp_path / "artifact"), texts)
    assert 0 < np.abs(near.scores - found.scores).max() < 0.2
    with pytest.raises(QuikError, match="classifies texts and does not embed them; use it with: quikjax classify"):
        embed(model, tokenizer, texts)
    with pytest.raises(QuikError, match="writes texts and does not embed or classify them"):
        quikjax.classify(quikjax.load(write(tmp_path / "writer", random_checkpoint(FIELDS), FIELDS))[0], tokenizer, texts)
