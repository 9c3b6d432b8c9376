"""Encoders from a directory to an artifact and back: every form of a checkpoint, quantizing, planning, reporting, export."""

import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_variants import VARIANTS
from random_weights import random_weights
from safetensors.numpy import load_file, save_file

import quikjax
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.loading import match, open_source
from quikjax.loading.tokenizer import add_borders
from quikjax.models.base import Transformer
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.planning.plan import make_plan
from quikjax.quantizing.calibration import calibration_tokens
from quikjax.quantizing.smoothing import smooth_params
from quikjax.reports.artifact import read_report
from quikjax.testing import END, forward, tiny_tokenizer
from quikjax.weights.formats import is_packed

Weights = dict[str, np.ndarray]
FIELDS = {**VARIANTS["bert-classifier"], "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64}
DISTIL = {**VARIANTS["distilbert-masked-lm"], "vocab_size": 257, "dim": 32, "hidden_dim": 64, "activation": "gelu"}


def random_checkpoint(fields: dict[str, Any]) -> Weights:
    shapes = {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract_model(fields))).items()}
    return random_weights(shapes, 3)


def write(directory: Path, weights: Weights, fields: dict[str, Any]) -> Path:
    """The weights as Hugging Face publishes them, with a tokenizer that puts a token around each text."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, directory / "model.safetensors")
    tokenizer = tiny_tokenizer()
    add_borders(tokenizer.backend_tokenizer, bos=END, eos=END)
    tokenizer.save_pretrained(str(directory))
    return directory


def old(weights: Weights) -> Weights:
    """Norms as the first checkpoints called them, and the positions that they counted out."""
    renamed = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in weights}
    return {renamed[name]: array for name, array in weights.items()} | {
        "bert.embeddings.position_ids": np.arange(64)[None].astype(np.int64)
    }


def masked_lm(name: str) -> tuple[dict[str, Any], Weights]:
    fields = {**VARIANTS[name], "vocab_size": 257}
    return fields, random_checkpoint(fields)


def test_every_form_of_a_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    weights = random_checkpoint(FIELDS)
    headless = {**FIELDS, "architectures": ["BertModel"]}
    core = {name.removeprefix("bert."): array for name, array in weights.items() if name.startswith("bert.")}
    lm_fields, lm = masked_lm("bert-masked-lm")
    table, bias = lm["bert.embeddings.word_embeddings.weight"], lm["cls.predictions.bias"]
    more = {"cls.seq_relationship.weight": np.ones((2, 48), np.float32), "bert.pooler.dense.bias": np.ones(48, np.float32)}
    rob_fields, rob = masked_lm("roberta-masked-lm")
    tagger = {**FIELDS, "architectures": ["BertForTokenClassification"]}
    for name, fields, held, expected in (
        ("prefixed", FIELDS, weights, weights),
        ("old", FIELDS, old(weights), weights),
        ("headless", headless, core, core),
        ("headless, saved with a head's names", headless, {f"bert.{path}": array for path, array in core.items()}, core),
        (
            "pretrained",
            lm_fields,
            lm | more | {"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": bias},
            lm,
        ),
        ("roberta", rob_fields, rob | {"roberta.pooler.dense.bias": np.ones(48, np.float32)}, rob),
        ("tagger", tagger, weights, {path: array for path, array in weights.items() if ".pooler." not in path}),
    ):
        model, _ = quikjax.load(write(tmp_path / name, held, fields))
        found = dotted(pure_params(model))
        assert found.keys() == expected.keys(), name
        for path, array in expected.items():
            np.testing.assert_array_equal(found[path], array, err_msg=f"{name}: {path}")


@pytest.mark.parametrize(
    "name", ["bert-classifier", "bert-masked-lm", "roberta-classifier", "distilbert-masked-lm", "distilbert"]
)
def test_a_flax_checkpoint_is_the_same_model(tmp_path: Path, name: str) -> None:
    fields = {**VARIANTS[name], "vocab_size": 257}
    expected = random_checkpoint(fields)
    tree: dict[str, Any] = {}
    for path, array in expected.items():  # as transformers' Flax classes named and laid them out
        *parents, leaf = path.split(".")
        kind = "embedding" if parents[-1].endswith("embeddings") else "kernel" if array.ndim == 2 else "scale"
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


def test_a_checkpoint_that_is_another_model_is_refused(tmp_path: Path) -> None:
    weights = random_checkpoint(FIELDS)
    fields, lm = masked_lm("bert-masked-lm")
    other = lm | {"cls.predictions.decoder.weight": lm["bert.embeddings.word_embeddings.weight"] + 1}
    with pytest.raises(QuikError, match=r"cls\.predictions\.decoder\.weight and .*word_embeddings\.weight differ"):
        quikjax.load(write(tmp_path / "other head", other, fields))
    source = open_source(write(tmp_path / "headless", weights, {**FIELDS, "architectures": ["BertModel"]}))
    with pytest.raises(QuikError, match=r"holds 2 tensors \(classifier.* that its configuration has no place for"):
        match(source, abstract_model(source.config))


def windows(model: Transformer, tokenizer: Any) -> np.ndarray:
    return calibration_tokens(model, tokenizer, "What a text says, an encoder reads at once. " * 9, 3, 32)


@pytest.fixture(
    scope="module", params=[pytest.param(FIELDS, id="bert"), pytest.param(DISTIL, id="distilbert", marks=pytest.mark.long)]
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published directory, and its QUIK-4B artifact beside it."""
    place = tmp_path_factory.mktemp("encoder")
    fields = request.param
    model = abstract_model(fields)
    write(place / "model", random_checkpoint(fields), fields)
    quikjax.quantize_checkpoint(place / "model", place / "artifact", "quik-4b", lambda tokenizer: windows(model, tokenizer))
    return place


def test_quik_4b_gives_eight_bits_to_the_layer_with_the_wide_input(place: Path) -> None:
    model, tokenizer = quikjax.restore(place / "artifact")
    packed = {path: leaf for path, leaf in dotted(pure_params(model)).items() if is_packed(leaf)}
    layers = {f"{layer}.weight" for group in next(iter(model.blocks.values())).groups.values() for layer in group}
    prefix = ".".join(model.block_path)
    assert packed.keys() == {f"{prefix}.{i}.{layer}" for i in range(2) for layer in layers}
    wide = {path for path, leaf in packed.items() if leaf.weight_bits == 8}
    assert wide == {f"{prefix}.{i}.{'ffn.lin2' if 'distil' in prefix else 'output.dense'}.weight" for i in range(2)}
    planned = make_plan(json.loads(model.published or ""), source=open_source(place / "model"), memory_bytes=1 << 30)
    assert not planned.problems
    assert not planned.generates
    assert planned.running.cache == 0
    assert {row.decode for row in planned.layers} == {None}
    assert sum(row.count for row in planned.layers) == sum(row.count for row in read_report(place / "artifact").layers) == 12
    assert [tokenizer("a")["input_ids"][at] for at in (0, 2)] == [256, 256]


def test_the_quantized_model_is_near_the_original_and_exports_as_what_it_computes(place: Path, tmp_path: Path) -> None:
    original, _ = quikjax.load(place / "model")
    quantized, _ = quikjax.restore(place / "artifact")
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 24)).astype(np.int32))
    theirs, mine = forward(original, ids), forward(quantized, ids)
    assert 0 < float(jnp.sqrt(jnp.mean((mine - theirs) ** 2) / jnp.mean(theirs**2))) < 0.5
    export_safetensors(place / "artifact", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == dotted(pure_params(original)).keys()
    again, _ = quikjax.load(tmp_path / "out")
    assert type(again) is type(original)
    dense = quikjax.dequantize_params(pure_params(quantized))
    for path, leaf in dotted(dense).items():
        np.testing.assert_array_equal(dotted(pure_params(again))[path], leaf)


def test_calibration_reads_whole_texts(place: Path) -> None:
    model, tokenizer = quikjax.load(place / "model")
    tokens = windows(model, tokenizer)
    assert tokens.shape == (3, 32)
    assert (tokens[:, 0] == 256).all()
    assert (tokens[:, -1] == 256).all()
    assert not (tokens[:, 1:-1] == 256).any()


def test_what_is_of_norms_before_layers_is_refused(place: Path) -> None:
    model, _ = quikjax.load(place / "model")
    with pytest.raises(QuikError, match="norms stand behind its layers"):
        smooth_params(model, {}, 0.5)
