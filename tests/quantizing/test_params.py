"""`quantize_params` on our models and on a user's own Flax trees: NNX and Linen, kernels of several axes."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.errors import QuikError
from quikjax.models.registry import dotted, pure_params
from quikjax.quantizing.params import LayerResult, quantize_block, quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.quantizing.statistics import LayerStats, empty_stats, observe
from quikjax.testing import forward, tiny_model
from quikjax.weights.linear import linear
from quikjax.weights.quik import QuikWeight


def stats_of(x: np.ndarray, group: str | None = None) -> LayerStats:
    return observe(empty_stats(x.shape[-1], group=group), jnp.asarray(x, jnp.float32), rows=64)


def outlying(rng: np.random.Generator, rows: int, k: int, columns: tuple[int, ...]) -> np.ndarray:
    x = rng.normal(size=(rows, k)).astype(np.float32)
    x[:, list(columns)] *= 40
    return x


class Stack(linen.Module):
    """A user's own model: two dense layers and an attention projection with several axes."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Dense(48)(x))
        x = linen.Dense(32)(x)
        return linen.DenseGeneral((4, 8), name="query")(x)


RULES = Recipe(
    name="mine",
    rules=(
        Rule(match=r"query\.kernel$", in_axes=(0,), outliers=0.125),
        Rule(match=r"Dense_\d+\.kernel$", outliers=4),
    ),
)


@pytest.mark.long
def test_a_linen_tree_is_quantized_and_runs_through_linear() -> None:
    rng = np.random.default_rng(0)
    x = outlying(rng, 512, 32, (3, 17))
    variables = Stack().init(jax.random.key(0), x)
    first = linen.relu(x @ variables["params"]["Dense_0"]["kernel"] + variables["params"]["Dense_0"]["bias"])
    second = first @ variables["params"]["Dense_1"]["kernel"]
    stats = {
        "params.Dense_0.kernel": stats_of(x),
        "params.Dense_1.kernel": stats_of(np.asarray(first)),
        "params.query.kernel": stats_of(np.asarray(second)),
    }
    seen: list[LayerResult] = []
    packed = quantize_params(variables, RULES, stats, on_layer=seen.append)
    whole = jax.tree.structure(packed, is_leaf=lambda leaf: isinstance(leaf, QuikWeight))
    assert str(whole) == str(jax.tree.structure(variables))
    kernels = packed["params"]
    assert kernels["Dense_0"]["kernel"].shape == (32, 48)
    assert set(np.asarray(kernels["Dense_0"]["kernel"].columns[-2:])) == {3, 17}
    assert kernels["query"]["kernel"].out_shape == (4, 8)
    np.testing.assert_array_equal(kernels["Dense_0"]["bias"], variables["params"]["Dense_0"]["bias"])
    for weight in (kernels["Dense_0"]["kernel"], kernels["Dense_1"]["kernel"], kernels["query"]["kernel"]):
        weight.validate()

    y = linen.relu(linear(jnp.asarray(x), kernels["Dense_0"]["kernel"], kernels["Dense_0"]["bias"]))
    y = linear(y, kernels["Dense_1"]["kernel"], kernels["Dense_1"]["bias"])
    y = linear(y, kernels["query"]["kernel"], kernels["query"]["bias"])
    exact = jnp.asarray(Stack().apply(variables, x))
    assert y.shape == exact.shape == (512, 4, 8)
    assert float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) < 0.25  # 4 bits, three layers deep
    assert [layer.path for layer in seen] == sorted(stats)
    assert all(0 < layer.relative_error < 0.25 and layer.damping == 0.01 for layer in seen)


def test_outliers_rescue_a_layer_that_has_them() -> None:
    rng = np.random.default_rng(0)
    x = outlying(rng, 512, 64, (5, 40))
    tree = {"layer": {"kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)}}
    errors = {}
    for count in (0, 4):
        recipe = Recipe(name="x", rules=(Rule(match="kernel", outliers=count),))
        quantize_params(tree, recipe, {"layer.kernel": stats_of(x)}, on_layer=lambda r, count=count: errors.update({count: r}))  # type: ignore[misc]
    # The outliers' own share of the output is exact; the rest needs a grid 40 times finer.
    assert errors[4].relative_error < errors[0].relative_error / 4


def test_an_nnx_state_keeps_its_structure() -> None:
    class Mine(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
            self.out = nnx.LinearGeneral((4, 6), 16, axis=(-2, -1), rngs=nnx.Rngs(1))

    recipe = Recipe(
        name="rtn",
        rules=(
            Rule(match=r"out\.kernel", method="rtn", outliers=0, in_axes=(0, 1)),
            Rule(match=r"kernel", method="rtn", outliers=0),
        ),
    )
    graphdef, state = nnx.split(Mine())
    packed = quantize_params(state, recipe)
    module = nnx.merge(graphdef, packed)
    assert isinstance(module.up.kernel.get_value(), QuikWeight)
    x = jnp.ones((2, 16))
    assert module.up.bias is not None
    y = linear(x, module.up.kernel.get_value(), module.up.bias.get_value())
    exact = Mine().up(x)
    assert float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) < 0.2
    assert linear(y.reshape(2, 4, 6), module.out.kernel.get_value()).shape == (2, 16)


def test_layers_with_one_input_share_outliers_and_nothing_else_changes() -> None:
    rng = np.random.default_rng(0)
    stats = stats_of(outlying(rng, 300, 32, (1, 2)), group="in")
    params = {name: jnp.asarray(rng.normal(size=(16, 32)), jnp.float32) for name in ("q_proj.weight", "k_proj.weight")}
    params["norm.weight"] = jnp.ones(32)
    packed = quantize_block(params, "quik-4b", dict.fromkeys(("q_proj.weight", "k_proj.weight"), stats), prefix="layers.0.")
    np.testing.assert_array_equal(packed["q_proj.weight"].columns, packed["k_proj.weight"].columns)
    assert packed["q_proj.weight"].group == packed["k_proj.weight"].group == "in"
    assert packed["norm.weight"] is params["norm.weight"]


def test_our_model_without_data_and_the_fp_recipe() -> None:
    model = tiny_model(num_hidden_layers=1)
    params = pure_params(model)
    packed = quantize_params(params, "rtn-w4a4")
    assert len([path for path, leaf in dotted(packed).items() if isinstance(leaf, QuikWeight)]) == 7
    ids = jnp.arange(12)[None] % 250
    logits = forward(nnx.merge(nnx.split(model)[0], packed), ids)
    assert bool(jnp.isfinite(logits).all())
    same = quantize_params(params, "fp")
    np.testing.assert_array_equal(forward(nnx.merge(nnx.split(model)[0], same), ids), forward(model, ids))


def test_zero_outlier_rule() -> None:
    rng = np.random.default_rng(0)
    tree = {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}
    x = np.clip(rng.normal(size=(64, 16)), -2, 2)
    for bits, threshold, expected in ((4, 2.5, 0), (4, 1.5, 4), (8, 1.5, 0), (4, 0.0, 4)):
        rule = Rule(match="kernel", method="rtn", outliers=4, weight_bits=bits, zero_threshold=threshold)
        packed = quantize_params(tree, Recipe(name="x", rules=(rule,)), {"kernel": stats_of(x)})
        assert 16 - packed["kernel"].base == expected, (bits, threshold)


def one(rule: Rule) -> Recipe:
    return Recipe(name="one", rules=(rule,))


@pytest.mark.parametrize(
    ("kernel", "rule", "stats", "message"),
    [
        (np.ones((4, 4)), Rule(match="nothing"), None, 'recipe "one" matches none of the 1 parameters'),
        (np.ones((4, 4)), Rule(match="kernel"), None, "without statistics"),
        (
            np.full((4, 4), np.nan),
            Rule(match="kernel", method="rtn", outliers=0),
            None,
            "layer.kernel has weights that are not finite",
        ),
        (np.ones((4, 4)), Rule(match="kernel"), np.ones((9, 5)), "of 5 columns, the kernel has 4"),
        (np.ones((4, 4)), Rule(match="kernel"), np.full((9, 4), np.inf), "activations that enter layer.kernel are not finite"),
        (np.ones((4, 4, 4)), Rule(match="kernel", method="rtn", outliers=0), None, "state in_axes"),
        (np.ones((4, 4)), Rule(match="kernel", method="rtn", outliers=0, in_axes=(0, 1)), None, "do not fit"),
        (np.ones((4, 4)), Rule(match="kernel", method="rtn", outliers=0, in_axes=(7,)), None, "do not fit"),
        (
            np.full((4, 4), 1e6),
            Rule(match="kernel", outliers=2),
            np.ones((9, 4)),
            'overflows float16; set outlier_dtype to "bfloat16"',
        ),
    ],
)
def test_mistakes_are_one_sentence(kernel: np.ndarray, rule: Rule, stats: np.ndarray | None, message: str) -> None:
    given = None if stats is None else {"layer.kernel": stats_of(stats)}
    with pytest.raises(QuikError, match=message):
        quantize_params({"layer": {"kernel": jnp.asarray(kernel, jnp.float32)}}, one(rule), given)


def test_statistics_accumulate_like_one_batch() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 30, 8)).astype(np.float32)
    stats = empty_stats(8)
    for batch in x:
        stats = jax.jit(observe)(stats, batch[None])
    flat = x.reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(stats.hessian, flat.T @ flat, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(stats.absmax, np.abs(x).max(axis=(0, 1)))
    assert int(stats.count) == 4
    assert int(stats.filled) == 64
    rows = {tuple(row) for row in x.reshape(-1, 8)}
    assert all(tuple(row) in rows for row in np.asarray(stats.sample[:64]))
