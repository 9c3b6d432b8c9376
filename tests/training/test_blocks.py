"""Blocks in one loop are the model: for every family, dense and packed, equal blocks and unequal ones; gradients too."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.models.base import CausalLM
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.models.tokens import checked_model
from quikjax.testing import forward
from quikjax.training import blocks
from quikjax.training.distill import kl_divergence
from quikjax.training.lessons import NextTokens
from quikjax.training.moving import Moving
from quikjax.weights.quik import QuikWeight

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from model_variants import VARIANTS
from random_weights import random_weights

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 24)), jnp.int32)


def build(name: str, layers: int = 2) -> CausalLM:
    fields = {**VARIANTS[name], "n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    abstract = checked_model(abstract_model(fields))
    flat = {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract)).items()}
    return nnx.merge(nnx.split(abstract)[0], nested({path: jnp.asarray(w) for path, w in random_weights(flat, 0).items()}))


def apart(model: CausalLM, params: Any) -> tuple[blocks.Skeleton, blocks.Tree, dict[str, Moving]]:
    flat, prefix = dotted(params), ".".join(model.block_path) + "."
    rest = {path: leaf for path, leaf in flat.items() if not path.startswith(prefix)}
    parts: dict[str, dict[str, Any]] = {}
    for path, leaf in flat.items():
        if path.startswith(prefix):
            key, _, inner = path.removeprefix(prefix).partition(".")
            parts.setdefault(key, {})[inner] = leaf
    skeleton, still, moving = blocks.take_apart(model, parts, rest)
    return skeleton, jax.tree.map(jnp.asarray, still), jax.tree.map(jnp.asarray, moving)


def logits(skeleton: blocks.Skeleton, still: blocks.Tree, moving: dict[str, Moving]) -> jax.Array:
    hidden = blocks.forward(skeleton, still, moving, blocks.embed(skeleton, still, moving, IDS))
    return blocks.outside(skeleton, still, moving).head(hidden)


def pack(path: str, matrix: Any, activation_bits: int) -> QuikWeight:
    """A layer in 8 bits, rounded to nearest by NumPy; layers with as many inputs have the same outliers."""
    W = np.asarray(matrix, np.float32)
    n, k = W.shape
    base = k - k // 8
    columns = np.random.default_rng(k).permutation(k).astype(np.int32)
    scale = np.abs(W[:, columns[:base]]).max(1) / 127
    codes = np.round(W[:, columns[:base]] / scale[:, None]).astype(np.int8)
    return QuikWeight(
        qweight=jnp.asarray(codes),
        scale=jnp.asarray(scale),
        reduced=jnp.asarray((scale.astype(np.float64) * codes.sum(1, dtype=np.int64)).astype(np.float32)),
        outliers=jnp.asarray(W[:, columns[base:]].astype(np.float16)),
        columns=jnp.asarray(columns),
        weight_bits=8,
        activation_bits=activation_bits,
        shape=(n, k),
        in_axes=(1,),
        base=base,
        group="input" if "q_proj" in path or "k_proj" in path or "v_proj" in path else None,
    )


def quantize(model: CausalLM, match: str = "", activation_bits: int = 8) -> Any:
    """The parameters of a model, the matrices of its blocks packed where `match` is found in their path."""
    prefix = ".".join(model.block_path) + "."
    return nested(
        {
            path: pack(path, leaf, activation_bits)
            if path.startswith(prefix) and leaf.ndim == 2 and re.search(match, path)
            else leaf
            for path, leaf in dotted(pure_params(model)).items()
        }
    )


@pytest.mark.parametrize(
    "name", ["llama-2-70b", *(pytest.param(name, marks=pytest.mark.long) for name in ("opt-350m", "gpt2", "falcon-7b"))]
)
def test_every_family_computes_what_it_computes(name: str) -> None:
    model = build(name)
    dense = apart(model, pure_params(model))
    assert [len(run.keys) for run in dense[0].runs] == [2]
    np.testing.assert_allclose(jax.jit(logits, static_argnums=0)(*dense), forward(model, IDS), rtol=2e-4, atol=2e-4)

    quantized = quantize(model)
    packed = apart(model, quantized)
    assert [len(run.keys) for run in packed[0].runs] == [2]
    found = jax.jit(logits, static_argnums=0)(*packed)
    expected = forward(nnx.merge(nnx.split(model)[0], quantized), IDS)
    # A code on the boundary of two may fall to the other side: never far, at 8 bits.
    assert float(jnp.sqrt(jnp.mean((found - expected) ** 2) / jnp.mean(expected**2))) < 0.01


@pytest.mark.long
def test_unequal_blocks_are_runs_and_gradients_those_of_the_plain_model() -> None:
    model = build("llama-2-70b", layers=3)
    # Not rounded: between two programs an activation on the boundary of two codes may fall to either side.
    quantized = quantize(model, r"layers\.[02]\.", activation_bits=16)
    skeleton, still, moving = apart(model, quantized)
    assert [run.keys for run in skeleton.runs] == [("0",), ("1",), ("2",)]
    assert [key for key, _ in blocks.blocks_of(skeleton, moving)] == ["0", "1", "2"]
    teacher, teacher_still, _ = apart(model, pure_params(model))
    empty: dict[str, Moving] = {"rest": {}, "0": {}}
    theirs = jax.jit(lambda still: blocks.forward(teacher, still, empty, blocks.embed(teacher, still, empty, IDS)))(teacher_still)

    def plain(moving: dict[str, Moving]) -> jax.Array:
        target = blocks.outside(teacher, teacher_still, empty).head(theirs)
        return jnp.mean(kl_divergence(target, logits(skeleton, still, moving)))

    expected = jax.jit(jax.value_and_grad(plain))(moving)
    found = jax.jit(NextTokens().loss_and_gradients, static_argnums=0)(
        (skeleton, teacher), still, moving, teacher_still, IDS, theirs
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    assert str(jax.tree.structure(found[1])) == str(jax.tree.structure(expected[1]))
    for mine, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4 * float(jnp.abs(other).max()) + 1e-9)
    assert {"sigma", "outliers"} == set(moving["0"]["mlp.up_proj.weight"])
    assert set(moving["rest"]) == {"model.norm.weight"}


def test_attention_s_gradient_is_that_of_its_equation() -> None:
    from quikjax.models.attention import attend
    from quikjax.models.base import Positions

    rng = np.random.default_rng(0)
    length = 70  # beyond what a CPU does in one piece
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 4)).astype(np.float32)) for heads in (4, 2, 2))
    where = Positions(jnp.arange(length, dtype=jnp.int32)[None])

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k) * 0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
        return jnp.einsum("bhlm,bmhd->blhd", jax.nn.softmax(scores, axis=-1), v)

    target = jnp.asarray(rng.normal(size=q.shape).astype(np.float32))
    expected = jax.jit(jax.grad(lambda *qkv: jnp.sum(plain(*qkv) * target), argnums=(0, 1, 2)))(q, k, v)
    found = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, where, None, scale=0.5)[0] * target), argnums=(0, 1, 2)))(
        q, k, v
    )
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
