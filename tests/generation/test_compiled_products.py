"""Generation with products compiled for this CPU: the texts and probabilities of XLA's products, for every form of a model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.generation import Generator
from quikjax.models import stacked
from quikjax.models.base import CausalLM, Transformer
from quikjax.models.registry import pure_params
from quikjax.quantizing.model import calibrate
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule, find_recipe
from quikjax.testing import tiny_model
from quikjax.weights import compiled
from quikjax.weights.formats import PACKED, is_packed
from quikjax.weights.panels import DensePanels, in_panels, is_paneled

REASON = compiled.why_no_compiled_products()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"products are not compiled here: {REASON}")

PROMPTS = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (3, 20, 11)]


def packed(model: CausalLM, **rule: Any) -> CausalLM:
    return by_recipe(model, Recipe(name="test", rules=(Rule(match=r"proj\.weight", method="rtn", outliers=5, **rule),)))


def by_recipe(model: CausalLM, recipe: Recipe) -> CausalLM:
    graphdef, params = nnx.split(model)[0], pure_params(model)
    stats = calibrate(graphdef, params, [np.asarray([PROMPTS[1]], np.int32)])
    return nnx.merge(graphdef, quantize_params(params, recipe, stats))


def narrow(model: CausalLM, dtype: Any = jnp.bfloat16) -> CausalLM:
    return nnx.merge(nnx.split(model)[0], jax.tree.map(lambda leaf: leaf.astype(dtype), pure_params(model)))


def both(model: Transformer, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Generator, Generator]:
    monkeypatch.setenv(compiled.VARIABLE, "0")
    xla = Generator(model, **settings)
    monkeypatch.delenv(compiled.VARIABLE)
    return Generator(model, **settings), xla


def paneled(generator: Generator) -> list[Any]:
    leaves = jax.tree.leaves(generator.params, is_leaf=is_paneled)
    return [leaf for leaf in leaves if is_paneled(leaf)]


MODELS = {
    "dense": lambda: tiny_model(),
    "untied": lambda: tiny_model(tie_word_embeddings=False),
    "W4A4": lambda: packed(tiny_model(), weight_bits=4, activation_bits=4),
    "W8A8": lambda: packed(tiny_model(), weight_bits=8, activation_bits=8),
}


@pytest.mark.parametrize("unrolled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_xlas_products(name: str, unrolled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, xla = both(MODELS[name](), monkeypatch, unrolled=unrolled)
    assert not paneled(xla)
    # Seven matrices of a block, stacked or of each of three, and the head's table.
    assert len(paneled(ours)) == (3 if unrolled else 1) * 7 + 1
    one, other = (generator.generate(PROMPTS, max_new_tokens=12, logprobs=True) for generator in (ours, xla))
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.logprobs is not None
    assert other.logprobs is not None
    # Sums in another order move an activation by a rounding, and it may get the next code.
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-2 if name.startswith("W") else 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_matrices_keep_their_16_bits_and_multiply_as_if_widened(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, xla = both(narrow(tiny_model(), dtype), monkeypatch)
    assert {leaf.panels.dtype for leaf in paneled(ours) if isinstance(leaf, DensePanels)} == {jnp.dtype(dtype)}
    ids, lengths = jnp.asarray([PROMPTS[1]], jnp.int32), jnp.array([20], jnp.int32)
    one, other = (jax.jit(stacked.read, static_argnums=0)(g.layout, g.params, ids, lengths)[0] for g in (ours, xla))
    # Hidden states are of 16 bits in both, and a rounding may fall to either side.
    np.testing.assert_allclose(one, other, atol=0.05 * float(jnp.abs(other).max()))


def test_float32_that_is_bfloat16_is_held_so_and_stays_float32() -> None:
    """As most checkpoints are published: half the bytes a token, and every sum the same."""
    published = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), pure_params(tiny_model()))
    model = nnx.merge(nnx.split(tiny_model())[0], published)
    ours = Generator(model)
    assert {leaf.panels.dtype for leaf in paneled(ours)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, panels=leaf.panels.astype(jnp.float32)) if isinstance(leaf, DensePanels) else leaf,
        ours.params,
        is_leaf=is_paneled,
    )
    ids, lengths = jnp.asarray([PROMPTS[1]], jnp.int32), jnp.array([20], jnp.int32)
    one, other = (jax.jit(stacked.read, static_argnums=0)(ours.layout, params, ids, lengths)[0] for params in (ours.params, wide))
    np.testing.assert_array_equal(one, other)
    # A single value that needs more keeps its matrices, those of all blocks, as they are.
    fine = jax.tree.map(lambda leaf: leaf.copy(), published)
    path = fine["model"]["layers"]["1"]["mlp"]["up_proj"]
    path["weight"] = path["weight"].at[-1, -1].set(1 + 2**-20)
    kept = [leaf.panels.dtype for leaf in paneled(Generator(nnx.merge(nnx.split(tiny_model())[0], fine)))]
    assert sorted(map(str, kept)) == ["bfloat16"] * 7 + ["float32"]


def test_rows_of_a_table_in_panels_are_the_tables() -> None:
    table = jnp.asarray(np.random.default_rng(1).normal(size=(37, 8)), jnp.float16)
    held = in_panels([table], stacked=False)
    assert isinstance(held, DensePanels)
    rows = held.rows(jnp.array([[0, 36], [17, -3]]))
    np.testing.assert_array_equal(rows, jnp.stack([table[jnp.array([0, 36])], table[jnp.array([17, 0])]]))
    assert held.rows(jnp.array([99])).tolist() == table[-1:].tolist()


def test_blocks_that_are_released_are_freed_once_they_are_in_panels() -> None:
    model = packed(tiny_model(), weight_bits=4, activation_bits=4)
    given = jax.tree.leaves(pure_params(model)["model"]["layers"])
    codes = [leaf for leaf in given if leaf.dtype == jnp.int4]
    generator = Generator(model, release=True)
    assert codes
    assert all(leaf.is_deleted() for leaf in codes)
    generator.generate(PROMPTS[:1], max_new_tokens=2)


def test_weights_that_meet_floats_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, xla = both(packed(tiny_model(), weight_bits=4, activation_bits=16), monkeypatch)
    assert len(paneled(ours)) == 1  # the head's table
    one, other = (generator.generate(PROMPTS, max_new_tokens=4) for generator in (ours, xla))
    np.testing.assert_array_equal(one.tokens, other.tokens)


# A recipe of each other packed format; a format's arrays are not matrices, whatever their axes and dtypes.
FORMATS = {"CodebookWeight": "nf4", "SparseWeight": "quik-4b-sparse", "GroupWeight": "zeroquant-w4a8"}


@pytest.mark.parametrize("name", sorted(PACKED.keys() - {"QuikWeight"}))
def test_every_packed_format_gives_the_texts_of_xlas_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find_recipe(FORMATS[name])
    model = by_recipe(tiny_model(num_hidden_layers=2), recipe.with_outliers(5) if "quik" in recipe.name else recipe)
    found = {type(leaf).__name__ for leaf in jax.tree.leaves(pure_params(model), is_leaf=is_packed) if is_packed(leaf)}
    assert name in found
    ours, xla = both(model, monkeypatch)
    one, other = (generator.generate(PROMPTS[:1], max_new_tokens=3) for generator in (ours, xla))
    np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("value", ["0", "off", "No"])
def test_the_environment_can_ask_for_xlas(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIKJAX_NATIVE", value)
    assert compiled.why_no_compiled_products() == "QUIKJAX_NATIVE asks for XLA's"
