"""Embeddings and classes against their definitions, in buckets, and what neither is for."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_encoder import VARIANTS, build

import quikjax
from quikjax.cli import classify as classify_command
from quikjax.cli import embed as embed_command
from quikjax.cli.text_options import read_texts
from quikjax.encoding.classify import class_names, classify_with
from quikjax.encoding.embed import embed_with, pool
from quikjax.encoding.text_encoder import TextEncoder, bucket
from quikjax.errors import QuikError
from quikjax.loading.tokenizer import add_borders
from quikjax.models import stacked
from quikjax.models.encoder import Encoder, masked_positions
from quikjax.testing import END, tiny_model, tiny_tokenizer

# Most of the time would go into optimizing code that runs once.
QUICK = {"xla_backend_optimization_level": 0}
TEXTS = ["a", "a longer text of some words", "b", "x" * 45, "the last one"]


def tokens_of_bytes() -> Any:
    tokenizer = tiny_tokenizer()
    add_borders(tokenizer.backend_tokenizer, bos=END, eos=END)
    return tokenizer


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(build("bert-classifier"), tokens_of_bytes(), batch_size=2)


def slow_pool(hidden: Any, count: int, pooling: str, normalize: bool) -> np.ndarray:
    rows = np.asarray(hidden, np.float64)[:count]
    vector = {"mean": sum(rows) / count, "first": rows[0], "max": np.max(rows, axis=0)}[pooling]
    return vector / np.sqrt(sum(x * x for x in vector)) if normalize else vector


def padded(rows: list[Any]) -> np.ndarray:
    """Rows of unequal length, with -1 behind the shorter ones."""
    return np.asarray([[*row, *[-1] * (max(map(len, rows)) - len(row))] for row in rows], np.int32)


def hidden_states(model: Encoder, rows: list[Any]) -> np.ndarray:
    """The last hidden states of texts, computed all at once: one program."""
    ids = padded(rows)
    run = jax.jit(lambda ids, mask: model.encode(ids, masked_positions(ids, mask)), compiler_options=QUICK)
    return np.asarray(run(np.maximum(ids, 0), ids >= 0))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "first", "max"])
def test_pooling_is_its_definition(pooling: Any, normalize: bool) -> None:
    hidden = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    positions = jnp.asarray([[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]], jnp.int32)
    found = pool(jnp.asarray(hidden), positions, pooling, normalize)
    for row, count in ((0, 3), (1, 5)):
        np.testing.assert_allclose(found[row], slow_pool(hidden[row], count, pooling, normalize), rtol=1e-5, atol=1e-6)


def test_texts_are_embedded_in_their_order_whatever_their_lengths(encoder: TextEncoder) -> None:
    found, work = embed_with(encoder, TEXTS)
    assert work.buckets == (16, 32, 64)
    assert work.tokens == sum(len(text) + 2 for text in TEXTS)
    assert work.cut == 0
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    rows = [encoder.tokenizer(text)["input_ids"] for text in TEXTS]
    for row, hidden, ids in zip(found, hidden_states(encoder.model, rows), rows, strict=True):
        np.testing.assert_allclose(row, slow_pool(hidden, len(ids), "mean", True), rtol=2e-4, atol=2e-5)


def test_a_gpus_blocks_are_not_stacked(encoder: TextEncoder) -> None:
    """There each has arrays of its own, and a loop over them is unrolled."""
    unrolled = copy.copy(encoder)
    unrolled._layout, unrolled._params = stacked.stack(encoder.model, unrolled=True)
    unrolled._programs = {}
    got, want = (embed_with(one, TEXTS[:2]).vectors for one in (unrolled, encoder))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_bucket_is_compiled_once(encoder: TextEncoder) -> None:
    embed_with(encoder, TEXTS)
    before = encoder.compiled
    again = embed_with(encoder, [*TEXTS, *TEXTS[::-1]]).work
    assert encoder.compiled == before
    assert again.compile_seconds == 0
    assert [bucket(length, 100) for length in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


def test_long_texts_are_cut_and_counted() -> None:
    encoder = TextEncoder(build("distilbert", n_layers=1), tokens_of_bytes(), length=8, batch_size=4)
    found, work = embed_with(encoder, ["a" * 30, "a" * 6, "bc"])
    assert work.cut == 1
    assert work.tokens == 8 + 8 + 4
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_classes_are_the_softmax_of_the_logits(encoder: TextEncoder) -> None:
    texts: list[Any] = ["good", ("a question", "its answer"), "bad"]
    found = classify_with(encoder, texts)
    assert found.labels == ("negative", "neutral", "positive")
    assert found.kind == "probabilities"
    tokens = [encoder.tokenizer(*([text] if isinstance(text, str) else text), return_token_type_ids=True) for text in texts]
    ids, types = (padded([row[name] for row in tokens]) for name in ("input_ids", "token_type_ids"))
    assert types.max(axis=1).tolist() == [0, 1, 0]
    run = jax.jit(lambda ids, mask, types: encoder.model(ids, mask, types), compiler_options=QUICK)
    logits = np.asarray(run(np.maximum(ids, 0), ids >= 0, np.maximum(types, 0)), np.float64)
    for row, values, best in zip(found.scores, logits, found.best, strict=True):
        expected = np.exp(values) / np.sum(np.exp(values))
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-5)
        assert best == found.labels[int(np.argmax(expected))]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"problem_type": "multi_label_classification"}, "independent"),
        ({"problem_type": "regression"}, "values"),
        ({"id2label": {"0": "LABEL_0"}}, "values"),
    ],
)
def test_what_scores_are_is_the_configurations_choice(fields: dict[str, Any], kind: str) -> None:
    model, tokenizer = build("bert-classifier", num_hidden_layers=1, **fields), tokens_of_bytes()
    found = quikjax.classify(model, tokenizer, ["some text"])
    ids = np.asarray([tokenizer("some text")["input_ids"]], np.int32)
    logits = np.asarray(jax.jit(lambda ids: model(ids), compiler_options=QUICK)(ids)[0], np.float64)
    assert found.kind == kind
    np.testing.assert_allclose(
        found.scores[0], 1 / (1 + np.exp(-logits)) if kind == "independent" else logits, rtol=1e-3, atol=1e-5
    )
    assert found.labels == (("score",) if len(logits) == 1 else ("negative", "neutral", "positive"))


def test_what_an_encoder_is_not_for() -> None:
    tokenizer = tokens_of_bytes()
    with pytest.raises(QuikError, match="LlamaForCausalLM predicts the next token and does not embed or classify"):
        quikjax.embed(tiny_model(), tokenizer, TEXTS)
    with pytest.raises(QuikError, match=r"BertModel has no classifier.*quikjax embed"):
        quikjax.classify(build("minilm"), tokenizer, TEXTS)
    with pytest.raises(QuikError, match="RobertaForTokenClassification classifies each token"):
        quikjax.classify(build("roberta-tagger"), tokenizer, TEXTS)
    nameless = build("bert-classifier", id2label=None)
    with pytest.raises(QuikError, match=r"does not name the model's 2 classes \(id2label\).*--labels"):
        quikjax.classify(nameless, tokenizer, TEXTS)
    assert class_names(nameless, ["no", "yes"]) == ("no", "yes")
    with pytest.raises(QuikError, match="has 2 classes, and 1 labels are given"):
        class_names(nameless, ["no"])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("a text", "a list of texts is expected, not 'a text'"),
        ([], "no texts"),
        (["a", 3], r"not 3 \(int\)"),
        ([("a",)], "a pair"),
    ],
)
def test_what_is_no_list_of_texts(encoder: TextEncoder, texts: Any, said: str) -> None:
    with pytest.raises(QuikError, match=said):
        embed_with(encoder, texts)


def test_settings_that_cannot_work(encoder: TextEncoder) -> None:
    model, tokenizer = encoder.model, encoder.tokenizer
    with pytest.raises(QuikError, match="cut to 3 to 64 tokens, which is what the model reads, not 65"):
        TextEncoder(model, tokenizer, length=65)
    with pytest.raises(QuikError, match="no tokenizer"):
        TextEncoder(model, None)
    with pytest.raises(QuikError, match="at least 1 text"):
        TextEncoder(model, tokenizer, batch_size=0)
    with pytest.raises(QuikError, match='no pooling "men"; did you mean "mean"'):
        embed_with(encoder, ["a"], pooling="men")


def test_texts_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\n\ntwo\twith a tab\n")
    assert read_texts([str(tmp_path / "texts"), "three"], False) == ["one", "two\twith a tab", "three"]
    assert read_texts(["a\tb"], True) == [("a", "b")]
    with pytest.raises(QuikError, match='two texts with one tab between them, not "one"'):
        read_texts([str(tmp_path / "texts")], True)
    with pytest.raises(QuikError, match="a text is empty"):
        read_texts([" "], False)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(QuikError, match="has no texts"):
        read_texts([str(tmp_path / "empty")], False)


def test_the_commands(encoder: TextEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "artifact"
    config = {**VARIANTS["bert-classifier"], "vocab_size": 257}
    quikjax.save(artifact, encoder.model, config=config, tokenizer=encoder.tokenizer)
    out = tmp_path / "vectors.npy"
    embed_command.embed(str(artifact), ["a", "b"], out=out, batch_size=2)
    np.testing.assert_allclose(np.load(out), embed_with(encoder, ["a", "b"]).vectors, atol=1e-6)
    capsys.readouterr()
    embed_command.embed(str(artifact), ["one", "two"], as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert np.asarray(printed["embeddings"]).shape == (2, 48)
    embed_command.embed(str(artifact), ["one", "two", "one"])
    table = capsys.readouterr().out
    assert "| 3 |  one |       1 | 1.0000 |      one |" in table
    classify_command.classify(str(artifact), ["one\ttwo"], pairs=True, as_json=True)
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["scores"].keys() == {"negative", "neutral", "positive"}
    assert row["label"] == max(row["scores"], key=row["scores"].get)
    with pytest.raises(QuikError, match="exists; choose another file"):
        embed_command.embed(str(artifact), ["one"], out=out)
