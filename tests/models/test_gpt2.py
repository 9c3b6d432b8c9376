"""GPT-2's checkpoints as they are published, and one through everything that is done with a model."""

import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_weights
from safetensors.numpy import load_file, save_file
from test_golden import load

import quikjax
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.evaluation import evaluate
from quikjax.generation import Generator
from quikjax.generation.chat import render
from quikjax.loading import match, open_source
from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.planning.plan import make_plan
from quikjax.reports.artifact import read_report
from quikjax.study.loss import study_loss
from quikjax.testing import forward, tiny_tokenizer
from quikjax.weights.formats import is_packed

FIELDS: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "n_ctx": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 257,
    "eos_token_id": 256,
}
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights by name, with GPT-2's layers as it publishes them: `[inputs, outputs]`."""
    wide, blocks = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}, range(2)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (257, 32), "wpe.weight": (64, 32)}
    shapes |= {f"h.{i}.{layer}.weight": shape for i in blocks for layer, shape in wide.items()}
    shapes |= {f"h.{i}.{layer}.bias": shape[1:] for i in blocks for layer, shape in wide.items()}
    norms = [*(f"h.{i}.{norm}" for i in blocks for norm in ("ln_1", "ln_2")), "ln_f"]
    shapes |= {f"{norm}.{leaf}": (32,) for norm in norms for leaf in ("weight", "bias")}
    return {f"transformer.{name}": array for name, array in random_weights(shapes, 3).items()}


def write(directory: Path, weights: Weights, **fields: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, directory / "model.safetensors")
    tiny_tokenizer().save_pretrained(str(directory))
    return directory


def bare(weights: Weights) -> Weights:
    """Named as the first checkpoints were, with the causal mask that they hold beside each block's weights."""
    masks: Weights = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": np.array([-1e4], np.float32) for i in range(2)}
    return masks | {name.removeprefix("transformer."): array for name, array in weights.items()}


def test_every_form_of_a_checkpoint_is_the_same_model(weights: Weights, tmp_path: Path) -> None:
    expected = {name: array.T if ".c_" in name and array.ndim == 2 else array for name, array in weights.items()}
    tree: dict[str, Any] = {}
    for name, array in weights.items():  # as transformers' Flax class named and laid them out: its kernels are turned Conv1Ds
        *path, leaf = name.split(".")
        kind = "embedding" if path[-1][0] == "w" else "scale" if path[-1].startswith("ln") else "kernel"
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[kind if leaf == "weight" else leaf] = array.T.copy() if kind == "kernel" and leaf == "weight" else array
    flax_directory = write(tmp_path / "flax", {})
    (flax_directory / "model.safetensors").unlink()
    (flax_directory / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    head = {"lm_head.weight": weights["transformer.wte.weight"]}
    for directory in (
        write(tmp_path / "prefixed", weights),
        write(tmp_path / "bare", bare(weights)),
        write(tmp_path / "tied", weights | head),
        flax_directory,
    ):
        model, _ = quikjax.load(directory)
        found = dotted(pure_params(model))
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{directory.name}: {name}")


def test_a_checkpoint_that_is_another_model_is_refused(weights: Weights, tmp_path: Path) -> None:
    def refusal(directory: Path) -> str:
        source = open_source(directory)
        with pytest.raises(QuikError) as error:
            match(source, abstract_model(source.config))
        return str(error.value)

    linear = weights | {"transformer.h.0.mlp.c_fc.weight": weights["transformer.h.0.mlp.c_fc.weight"].T}
    said = "tensor transformer.h.0.mlp.c_fc.weight is [128, 32] where the configuration asks for [32, 128]"
    assert refusal(write(tmp_path / "linear", linear)).endswith(said)
    assert "lacks 1 tensor (lm_head.weight)" in refusal(write(tmp_path / "untied", weights, tie_word_embeddings=False))
    classifier = write(tmp_path / "classifier", weights, architectures=["GPT2ForSequenceClassification"])
    assert "GPT-2 as GPT2ForSequenceClassification is not supported, only as GPT2LMHeadModel" in refusal(classifier)
    with pytest.raises(QuikError, match=r"and transformer\.wte\.weight differ"):
        quikjax.load(write(tmp_path / "other head", weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}))


@pytest.fixture(scope="module")
def place(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published directory, and its QUIK-4B artifact beside it."""
    place = tmp_path_factory.mktemp("gpt2")
    tokens = np.random.default_rng(0).integers(0, 256, (3, 32)).astype(np.int32)
    quikjax.quantize_checkpoint(write(place / "model", bare(weights)), place / "artifact", "quik-4b", lambda _: tokens)
    return place


@pytest.mark.long
def test_quik_4b_gives_eight_bits_to_the_layer_with_the_wide_input(place: Path) -> None:
    model, _ = quikjax.restore(place / "artifact")
    packed = {path: leaf for path, leaf in dotted(pure_params(model)).items() if is_packed(leaf)}
    bits = {path.removeprefix("transformer.h.").removesuffix(".weight"): leaf.weight_bits for path, leaf in packed.items()}
    assert bits == {
        f"{i}.{layer}": 8 if layer == "mlp.c_proj" else 4
        for i in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    planned = make_plan(FIELDS, source=open_source(place / "model"), memory_bytes=1 << 30)
    assert not planned.problems
    assert {row.pattern: row.weight_bits for row in planned.layers}["transformer.h.*.mlp.c_proj.weight"] == 8
    assert sum(row.count for row in read_report(place / "artifact").layers) == 8


@pytest.mark.long
def test_the_quantized_model_is_near_the_original_and_says_where_it_is_not(place: Path) -> None:
    original, _ = quikjax.load(place / "model")
    quantized, _ = quikjax.restore(place / "artifact")
    assert isinstance(quantized, CausalLM)
    ids = np.random.default_rng(1).integers(0, 256, (2, 24)).astype(np.int32)
    theirs, mine = forward(original, jnp.asarray(ids)), forward(quantized, jnp.asarray(ids))
    assert 0 < float(jnp.sqrt(jnp.mean((mine - theirs) ** 2) / jnp.mean(theirs**2))) < 0.5
    loss = study_loss(original, quantized, ids)
    assert loss.causes["everything"] > 0
    assert np.isfinite(evaluate(quantized, ids, original).perplexity)


@pytest.mark.long
def test_generation_with_a_cache_is_the_plain_forward_pass(place: Path) -> None:
    """Greedy, on the float model: the quantized one's activations depend on nothing else, but round differently by row count."""
    model, tokenizer = quikjax.load(place / "model")
    prompts = [[5, 9, 200], [int(token) for token in np.random.default_rng(3).integers(0, 256, 20)]]
    made = Generator(model, tokenizer=tokenizer).generate(prompts, max_new_tokens=12, stop=[])
    for row, prompt in enumerate(prompts):
        text = [*prompt, *made.tokens[row]]
        logits = forward(model, jnp.asarray([text + [0] * (32 - len(text))]))[0, : len(text)]  # one length, one program
        assert made.tokens[row].tolist() == jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist()
    with pytest.raises(QuikError, match="has no chat template"):
        render(tokenizer, [{"role": "user", "content": "hello"}])
    with pytest.raises(QuikError, match="exceed the model's context of 64"):
        Generator(model).generate([[1] * 60], max_new_tokens=5)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-crfm"])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """Through the generator's scan over blocks; of CRFM's, which differ by their scale, each is a run of its own."""
    case = load(name)
    model = nnx.merge(case.graphdef, jax.tree.map(jnp.asarray, case.params))
    expected = case.golden["tokens"][:24].tolist()
    assert Generator(model).generate([case.golden["prompt"].tolist()], max_new_tokens=24, stop=[]).tokens[0].tolist() == expected


def test_exports_hold_the_layers_as_published(place: Path, weights: Weights, tmp_path: Path) -> None:
    model, _ = quikjax.load(place / "model")
    quikjax.save(tmp_path / "dense", model)
    export_safetensors(tmp_path / "dense", tmp_path / "hf")
    held = load_file(tmp_path / "hf" / "model.safetensors")
    assert held.keys() == weights.keys()
    assert all(np.array_equal(held[name], array) for name, array in weights.items())
    # What is dequantized is turned too: the same logits as the artifact's float weights give.
    export_safetensors(place / "artifact", tmp_path / "dequantized")
    exported, _ = quikjax.load(tmp_path / "dequantized")
    restored, _ = quikjax.restore(place / "artifact")
    dense = nested({p: quikjax.dequantize(w) if is_packed(w) else w for p, w in dotted(pure_params(restored)).items()})
    ids = jnp.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(forward(exported, ids), forward(nnx.merge(nnx.split(restored)[0], dense), ids))
