"""Packed 4-bit checkpoints for AWQ's readers: the words bit by bit, and the numbers of the artifact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from quikjax import checkpoint
from quikjax.checkpoint.export.awq import ORDER, awq_tensors, export_awq, problem_of, words
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.models.gpt2 import GPT2LMHeadModel
from quikjax.models.llama import LlamaForCausalLM
from quikjax.models.registry import dotted, pure_params
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.params import abstract_weight, quantize_params
from quikjax.quantizing.recipe import AnyRule, Recipe, Rule, find_recipe
from quikjax.testing import tiny_config, tiny_model
from quikjax.weights.formats import dequantize
from quikjax.weights.groups import GroupWeight

Command = Callable[..., Any]
GROUPS = {"group_size": 16, "method": "rtn"}


def codes_of(packed: np.ndarray) -> np.ndarray:
    """The codes that `words` has packed."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    eight = (np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts & 15).astype(np.uint8)
    return eight[..., np.argsort(ORDER)].reshape(packed.shape[0], -1)


def dequantized(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`W` float32 `[N, K]` of a layer's three tensors, by the format's equation."""
    group = qweight.shape[0] // scales.shape[0]
    zero, scale = (np.repeat(part.astype(np.float32), group, axis=0) for part in (codes_of(qzeros), scales))
    return (scale * (codes_of(qweight).astype(np.float32) - zero)).T


def recipe(match: str = "_proj", **fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "g", "rules": [{"match": match, **GROUPS, **fields}]})


def saved(directory: Path, packed: Recipe, **fields: Any) -> Path:
    """An artifact of a tiny model, quantized without data."""
    model = tiny_model(num_hidden_layers=1, **fields)
    params = quantize_params(pure_params(model), packed)
    checkpoint.save(directory, nnx.merge(nnx.split(model)[0], params), config=tiny_config(num_hidden_layers=1, **fields))
    return directory


def test_words_hold_eight_outputs_in_awqs_order() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 24)).astype(np.uint8)
    found = words(codes)
    assert (found.dtype, found.shape) == (np.int32, (5, 3))
    for row in range(5):
        for word in range(3):
            slow = 0
            for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                slow |= int(codes[row, 8 * word + output]) << (4 * place)
            assert int(found[row, word]) % 2**32 == slow
    np.testing.assert_array_equal(codes_of(found), codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layers_tensors_are_its_numbers(symmetric: bool) -> None:
    kernel = np.random.default_rng(1).normal(0.3, 1, (16, 48)).astype(np.float32)
    weight = quantize_params({"x_proj.weight": jnp.asarray(kernel)}, recipe(symmetric=symmetric))["x_proj.weight"]
    tensors = awq_tensors(weight)
    assert {name: (array.shape, array.dtype.name) for name, array in tensors.items()} == {
        "qweight": ((48, 2), "int32"),
        "qzeros": ((3, 2), "int32"),
        "scales": ((3, 16), "float16"),
    }
    np.testing.assert_array_equal(dequantized(**tensors), dequantize(weight))
    assert (codes_of(tensors["qzeros"]) == 8).all() == symmetric


@pytest.mark.long
def test_a_directory_for_other_programs(tmp_path: Path) -> None:
    artifact = saved(tmp_path / "artifact", recipe())
    done = export_awq(artifact, tmp_path / "awq")
    assert (done.files, done.dtype) == (("model.safetensors",), "float16")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert (config["torch_dtype"], config["architectures"]) == ("float16", ["LlamaForCausalLM"])
    held = load_file(tmp_path / "awq" / "model.safetensors")
    assert done.bytes == sum(array.nbytes for array in held.values())
    params = dotted(pure_params(checkpoint.restore(artifact)[0]))
    for path, leaf in params.items():
        if isinstance(leaf, GroupWeight):
            fields = {field: held.pop(path.replace(".weight", f".{field}")) for field in ("qweight", "qzeros", "scales")}
            np.testing.assert_array_equal(dequantized(**fields), dequantize(leaf))
        else:
            np.testing.assert_array_equal(held.pop(path), np.asarray(leaf).astype(np.float16))
    assert not held
    with pytest.raises(QuikError, match=r"is already quantized .*(awq|AWQ)"):
        open_source(tmp_path / "awq")
    # In several files, one part after the other; layers that stay in floats are named.
    some = saved(tmp_path / "some", recipe(r"(up|down)_proj", symmetric=True, activation_bits=8))
    cut = export_awq(some, tmp_path / "cut", dtype="bfloat16", shard_bytes=1)
    assert (len(cut.files), cut.dtype) == (2, "bfloat16")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    names = [f"self_attn.{name}_proj" for name in "koqv"]
    assert config["quantization_config"]["modules_to_not_convert"] == [
        f"model.layers.0.{name}" for name in ["mlp.gate_proj", *names]
    ]
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.0.mlp.up_proj.qweight"] == index["model.layers.0.self_attn.q_proj.weight"] == cut.files[1]


@pytest.mark.parametrize(
    ("rule", "shape", "reason"),
    [
        (Rule(match="x"), (16, 64), "is in the format W4A4"),
        (GroupRule(match="x", group_size=16, bits=8), (16, 64), "has 8 bits"),
        (GroupRule(match="x", group_size=16, order="hessian"), (16, 64), "has groups of reordered columns"),
        (GroupRule(match="x", group_size=16, order="hessian", static_groups=True), (16, 64), None),
        (GroupRule(match="x", group_size=48), (16, 64), "has 64 inputs, no multiple of the group of 48"),
        (GroupRule(match="x", group_size=16), (12, 64), "has 12 outputs, no multiple of 8"),
    ],
)
def test_layers_that_the_format_does_not_have(rule: AnyRule, shape: tuple[int, int], reason: str | None) -> None:
    weight = abstract_weight(rule, shape, shape[1])
    assert problem_of(LlamaForCausalLM, "model.layers.0.mlp.up_proj.weight", weight) == reason
    turned = problem_of(GPT2LMHeadModel, "transformer.h.0.mlp.c_fc.weight", weight)
    assert turned is not None


def test_artifacts_that_have_no_place_in_it(tmp_path: Path) -> None:
    two = Recipe(name="two", rules=(*recipe("up_proj").rules, *recipe("q_proj", group_size=32).rules))
    for number, (packed, reason) in enumerate(
        (
            (
                recipe("up_proj", bits=8),
                r"up_proj.weight has 8 bits, which AWQ's format does not have; export it with safetensors-",
            ),
            (two, r"groups of one size, and these are of 16 \(.*up_proj.weight\), 32 \(.*q_proj.weight\)"),
            (find_recipe("fp"), "has no quantized layers"),
        )
    ):
        artifact = saved(tmp_path / f"{number}", packed)
        with pytest.raises(QuikError, match=reason):
            export_awq(artifact, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_export_by_command(quikjax_command: Command, tmp_path: Path) -> None:
    artifact = saved(tmp_path / "artifact", find_recipe("rtn-w4a16-g128"), hidden_size=128, intermediate_size=128)
    done = quikjax_command("export", artifact, "--out", tmp_path / "awq", "--format", "awq")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'awq'}: 1 file, 0.1 MB in float16\n"
    wrong = quikjax_command("export", artifact, "--out", tmp_path / "b", "--format", "awq", "--batch", "2")
    assert (wrong.returncode, "--batch is of jax-export; awq has no programs" in wrong.stderr) == (1, True)
