"""The failure analysis against its definitions: models in plain `jnp`, activations rounded where they are observed."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from quikjax.checkpoint.load import load
from quikjax.loading.tokenizer import add_borders
from quikjax.models.base import Positions, default_positions
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import find_recipe
from quikjax.study.failure import Subject, failure_study, masked_places, open_subjects
from quikjax.study.grid import Cell, NoProgress, Row
from quikjax.study.results import Study
from quikjax.testing import END, tiny_tokenizer
from quikjax.texts import Text
from quikjax.weights.formats import dequantize_params

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from random_weights import random_weights

TEXT = Text("a text", "The quick brown fox jumps over the lazy dog, and again it does. " * 3)
W4A4 = find_recipe("rtn-w4a4")
WINDOW, COUNT = 24, 3
_SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_OPT = {
    **_SHAPE,
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
_BERT = {**_SHAPE, "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu", "intermediate_size": 48}


def publish(directory: Path, config: dict[str, Any]) -> str:
    """A random model as published; its tokenizer knows bytes, an end on either side of an encoder's texts, and a mask."""
    directory.mkdir(parents=True)
    shapes = {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract_model(config))).items()}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_weights(shapes, 3), directory / "model.safetensors")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    if config["model_type"] == "bert":
        add_borders(tokenizer.backend_tokenizer, bos=END, eos=END)
    tokenizer.save_pretrained(str(directory))
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("models")
    return [publish(place / "decoder", _OPT), publish(place / "encoder", _BERT)]


@pytest.fixture(scope="module")
def subjects(models: list[str]) -> list[Subject]:
    return open_subjects(models, TEXT, W4A4, window=WINDOW, count=COUNT)


@pytest.fixture(scope="module")
def finished(subjects: list[Subject], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a study of both models that nothing stopped."""
    place = tmp_path_factory.mktemp("study")
    failure_study(subjects, W4A4, TEXT).run(place)
    return place


def results(place: Path) -> dict[tuple[str, str], Any]:
    rows = [Row(**json.loads(line)) for line in (place / "rows.jsonl").read_text().splitlines()]
    return {(row.parameters["model"], row.parameters["quantized"]): row.result for row in rows}


def rounded(x: Any) -> Any:
    """4 bits of every token, asymmetric."""
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    scale = (high - low) / 15
    return jnp.round((x - low) / scale) * scale + low


@partial(jax.jit, static_argnums=(0, 3))
def through(blockdef: Any, params: Any, hidden: Any, rounds: bool) -> Any:
    block = nnx.merge(blockdef, params)
    places = Positions(default_positions(hidden[..., 0].astype(jnp.int32)))
    return block(hidden, places, observe=lambda group, x: rounded(x) if rounds and group in block.groups else x)[0]


def walk(model: Any, ids: Any, rounds: bool, inputs: list[Any] | None = None) -> list[Any]:
    """What leaves the embedding and each block; blocks read `inputs`, where they are given."""
    tokens = jnp.asarray(ids)
    states = [model.embed(tokens, default_positions(tokens))]
    for number, block in enumerate(model.blocks.values()):
        states.append(through(*nnx.split(block), states[-1] if inputs is None else inputs[number], rounds))
    return states


def log_probabilities(model: Any, hidden: Any) -> np.ndarray:
    places = (default_positions(hidden[..., 0].astype(jnp.int32)),) if hasattr(model, "encode") else ()
    logits = np.asarray(model.head(hidden, *places), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_token(right: Any, other: Any) -> np.ndarray:
    right, other = np.asarray(right, np.float64), np.asarray(other, np.float64)
    return np.linalg.norm(right - other, axis=-1) / np.linalg.norm(right, axis=-1)


def relative(right: Any, other: Any) -> float:
    right, other = np.asarray(right, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(right - other) / np.linalg.norm(right))


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1], ids=["decoder", "encoder"])
@pytest.mark.parametrize("part", ["both", "weights", "activations"])
def test_figures_are_their_definitions(subjects: list[Subject], finished: Path, index: int, part: str) -> None:
    subject = subjects[index]
    found = results(finished)[subject.name, part]
    original = load(subject.given)[0]
    params = pure_params(original)
    codes = dequantize_params(quantize_params(params, W4A4)) if part != "activations" else params
    model, rounds = nnx.merge(nnx.split(original)[0], codes), part != "weights"
    right, free = walk(original, subject.ids, False), walk(model, subject.ids, rounds)
    forced = walk(model, subject.ids, rounds, right)

    # The loss of every token that is predicted, [windows, places], and the places.
    places = [list(range(1, WINDOW))] * COUNT if subject.asked is None else subject.asked.tolist()
    back = 1 if subject.asked is None else 0
    theirs, mine = log_probabilities(original, right[-1]), log_probabilities(model, free[-1])
    losses: tuple[list[tuple[int, float]], ...] = ([], [])
    kls: list[tuple[int, float]] = []
    for window, asked in enumerate(places):
        for place in asked:
            p, q = theirs[window, place - back], mine[window, place - back]
            token = subject.right[window, place]
            losses[0].append((place, -p[token]))
            losses[1].append((place, -q[token]))
            kls.append((place, np.sum(np.exp(p) * (p - q))))

    def mean(pairs: list[tuple[int, float]], first: int, last: int) -> float:
        return float(np.mean([value for place, value in pairs if first <= place <= last]))

    assert found["original_perplexity"] == pytest.approx(math.exp(mean(losses[0], 0, WINDOW)), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(mean(losses[1], 0, WINDOW)), rel=1e-2)
    assert found["kl"] == pytest.approx(mean(kls, 0, WINDOW), rel=2e-2)
    for row in found["positions"]:
        inside = row["first"], row["last"]
        assert row["original_perplexity"] == pytest.approx(math.exp(mean(losses[0], *inside)), rel=1e-4)
        assert row["perplexity"] == pytest.approx(math.exp(mean(losses[1], *inside)), rel=2e-2)
        assert row["kl"] == pytest.approx(mean(kls, *inside), rel=5e-2)
    gaps = [(place, q - p) for (place, q), (_, p) in zip(losses[1], losses[0], strict=True)]
    halves = (found["ln_ppl_ratio_first_half"], found["ln_ppl_ratio_second_half"])
    for half, inside in zip(halves, ((0, WINDOW // 2 - 1), (WINDOW // 2, WINDOW)), strict=True):
        values = [gap for place, gap in gaps if inside[0] <= place <= inside[1]]
        assert half["mean"] == pytest.approx(np.mean(values), abs=1e-2)
        assert half["stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=5e-2)

    # Hidden states: as a whole, by token, by position; forced and free.
    assert found["places"] == [[0, 0], [1, 1], [2, 3], [4, 7], [8, 15], [16, 23]]
    for number, block in enumerate(found["blocks"], 1):
        for how, states in (("forced", forced), ("free", free)):
            errors = by_token(right[number], states[number])
            assert block[f"hidden_{how}"] == pytest.approx(relative(right[number], states[number]), rel=2e-2)
            assert block[f"by_token_{how}"] == pytest.approx(errors.mean(), rel=2e-2)
            expected = [errors[:, first : last + 1].mean() for first, last in found["places"]]
            np.testing.assert_allclose(block[f"by_position_{how}"], expected, rtol=5e-2)
    assert found["blocks"][1]["hidden_free"] > found["blocks"][1]["hidden_forced"]
    if subject.name == "encoder":
        pooled = [np.asarray(states[-1], np.float64).mean(axis=1) for states in (right, free)]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*pooled, strict=True)]
        assert found["embedding_cosine"] == pytest.approx(np.mean(cosines), abs=1e-3)
    # Each part alone has its own error and none of the other's.
    for layer in found["layers"]:
        assert (layer["weights"] > 0.01) == (part != "activations")
        assert (layer["rounding_by_token"] > 0.01) == (part != "weights")


@pytest.mark.long
def test_models_are_told_apart_by_what_they_are(subjects: list[Subject], finished: Path) -> None:
    found = results(finished)
    traits = {name: [found[name, "both"][trait] for trait in ("family", "norms", "mask")] for name in ("decoder", "encoder")}
    assert traits == {"decoder": ["opt", "before", "causal"], "encoder": ["bert", "behind", "none"]}
    groups = {(layer["block"], layer["layer"]): layer["group"] for layer in found["decoder", "both"]["layers"]}
    assert groups[1, "fc2"] == "mlp_output"
    assert len(groups) == 12
    # The encoder reads its tokens between two ends, with a fixed share of those between them masked.
    encoder = subjects[1]
    assert encoder.asked is not None
    assert (encoder.ids[:, [0, -1]] == 256).all()
    assert encoder.asked.shape == (COUNT, 3)
    np.testing.assert_array_equal(encoder.ids == 257, np.any(np.arange(WINDOW) == encoder.asked[..., None], axis=1))
    np.testing.assert_array_equal(encoder.asked, masked_places(COUNT, 1, WINDOW - 1))


@pytest.mark.long
def test_tables_and_charts(finished: Path) -> None:
    whole = json.loads((finished / "study.json").read_text())
    assert [line[:2] for line in whole["table"]] == [
        [model, part] for model in ("decoder", "encoder") for part in ("both", "weights", "activations")
    ]
    titles = [table["title"].split()[0] for table in whole["further"]]
    assert titles == ["Models", "Perplexity", "Hidden", "Hidden", "Layers,"]
    assert whole["further"][0]["table"][1][:4] == ["encoder", "bert", "behind", "none"]
    assert len(whole["further"][2]["table"]) == 2 * 6
    assert (finished / "table.md").read_text().count("| encoder ") == sum(
        line[0] == "encoder" for table in (whole, *whole["further"]) for line in table["table"]
    )
    kinds = ("perplexity", "places", "blocks", "rounding")
    drawn = {"plot.svg", "positions.svg", *(f"{kind}-{model}.svg" for kind in kinds for model in ("decoder", "encoder"))}
    assert {path.name for path in finished.glob("*.svg")} == drawn
    assert "original: 1, " in (finished / "perplexity-decoder.svg").read_text()


class Stops(NoProgress):
    """A kill when the fourth cell begins."""

    begun = 0

    def begin(self, cell: Cell) -> None:
        self.begun += 1
        if self.begun == 4:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_study_that_was_stopped_leaves_the_rows_of_one_that_was_not(
    models: list[str], subjects: list[Subject], finished: Path, tmp_path: Path, quikjax_command: Any
) -> None:
    study: Study = failure_study(subjects, W4A4, TEXT)
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path / "out", Stops())
    assert sum(study.finished(tmp_path / "out")) == 3
    # The command goes on with what Python began.
    (tmp_path / "text.txt").write_text(TEXT.content)
    options = ["--evaluation", tmp_path / "text.txt", f"--window={WINDOW}", f"--windows={COUNT}", "--out", tmp_path / "out"]
    dry = quikjax_command("study", "failure", *models, *options, "--dry-run", "--json")
    cells = json.loads(dry.stdout)["cells"]
    assert [cell["finished"] for cell in cells] == [True] * 3 + [False] * 3
    assert cells[0]["command"].endswith(f"--out DIR --parts both {models[0]}")
    done = quikjax_command("study", "failure", *models, *options)
    assert done.returncode == 0, done.stderr
    assert "3 of them finished by an earlier run" in done.stderr
    rows = [
        [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()] for place in (tmp_path / "out", finished)
    ]
    for mine, theirs in zip(*rows, strict=True):
        assert {**mine, "command": ""} == {**theirs, "command": ""}


@pytest.mark.long
def test_an_artifact_of_the_model_in_place_of_a_recipe(
    models: list[str], finished: Path, tmp_path: Path, quikjax_command: Any
) -> None:
    quantize_checkpoint(models[0], tmp_path / "artifact", W4A4)
    (tmp_path / "text.txt").write_text(TEXT.content)
    options = ["--evaluation", tmp_path / "text.txt", f"--window={WINDOW}", f"--windows={COUNT}", "--artifact"]
    options += [tmp_path / "artifact", "--out", tmp_path / "out"]
    done = quikjax_command("study", "failure", models[0], *options, "--parts", "weights")
    assert done.returncode == 0, done.stderr
    expected, found = results(finished)["decoder", "weights"], results(tmp_path / "out")["decoder", "weights"]
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-6)
    other = quikjax_command("study", "failure", models[1], *options)
    assert other.returncode != 0
    assert "was made from a model with fingerprint" in other.stderr
    two = quikjax_command("study", "failure", *models, *options)
    assert "--artifact is of one model, and 2 are given" in two.stderr


def test_mistakes_come_before_any_work(models: list[str], tmp_path: Path, quikjax_command: Any) -> None:
    def said(*words: Any) -> str:
        done = quikjax_command("study", "failure", *words, "--out", tmp_path / "out")
        assert done.returncode != 0
        assert not (tmp_path / "out" / "rows.jsonl").exists()
        return " ".join(done.stderr.split())

    (tmp_path / "short.txt").write_text("a few words")
    assert 'there is no recipe "rtn-w4a5"; did you mean "rtn-w4a4"' in said(models[0], "--recipe", "rtn-w4a5")
    assert 'recipe "fp" quantizes no layer of' in said(models[0], "--recipe", "fp")
    assert 'there is no part "weight"' in said(models[0], "--parts", "weight")
    short = ["--evaluation", tmp_path / "short.txt", "--window", 20]
    assert "the text has 11 tokens, fewer than one window of 20; use more text" in said(models[0], *short)
    assert "the text has 11 tokens, fewer than one window of 18; use more text" in said(models[1], *short)
    assert "--window 65 exceeds the context of decoder, 64 tokens" in said(models[0], "--window", 65)
    assert 'two models are called "decoder"' in said(models[0], models[0])
    (tmp_path / "bart").mkdir()
    (tmp_path / "bart" / "config.json").write_text(json.dumps(_BART))
    save_file({}, tmp_path / "bart" / "model.safetensors")
    assert "give a decoder or an encoder" in said(tmp_path / "bart")


_BART = {
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
