"""Layer-by-layer distillation: its gradient and its steps by hand, what it leaves on disk, and where it cannot help."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from quikjax import checkpoint
from quikjax.checkpoint.load import load
from quikjax.cli.printing import ProgressLines
from quikjax.errors import QuikError
from quikjax.models.base import Block, Linear
from quikjax.models.registry import dotted, pure_params
from quikjax.planning.plan import make_plan
from quikjax.quantizing.checkpoint import NoProgress, quantize_checkpoint
from quikjax.quantizing.distillation import (
    Distillation,
    DistillationStep,
    add_gradient,
    block_loss,
    distil_block,
    optimizer,
    update,
)
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import RECIPES, Recipe
from quikjax.reports.artifact import read_report
from quikjax.testing import tiny_config
from quikjax.weights import latent
from quikjax.weights.groups import GroupWeight
from quikjax.weights.linear import linear

BATCHES = [np.random.default_rng(i).integers(0, 256, (1, 32)).astype(np.int32) for i in range(5)]


# One layer, by hand.

N, K, GROUP = 6, 24, 8
PATH = "proj.weight"
W = np.random.default_rng(0).normal(size=(N, K)).astype(np.float32)
X = [np.random.default_rng(seed).normal(size=(2, 5, K)).astype(np.float32) for seed in (1, 2)]
RULES: dict[str, dict[str, Any]] = {
    "groups": {"match": "proj", "group_size": GROUP, "method": "rtn", "bits": 4, "symmetric": True},
    "quik": {"match": "proj", "method": "rtn", "outliers": 0, "clip": False, "activation_bits": 8},
}


class OneLayer(Block):
    """A block that is a linear layer and nothing else."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {"input": ("proj",)}

    def __init__(self) -> None:
        self.proj = Linear(K, N, bias=False, dtype=jnp.float32)

    def __call__(self, hidden: Any, positions: Any, cache: Any = None, observe: Any = None) -> Any:
        return self.proj(hidden), None


BLOCKDEF: Any = nnx.split(OneLayer())[0]
ORIGINAL = {PATH: jnp.asarray(W)}


def packed_layer(kind: str = "groups") -> dict[str, Any]:
    packed: dict[str, Any] = quantize_params(ORIGINAL, Recipe.model_validate({"name": kind, "rules": [RULES[kind]]}))
    return packed


def by_hand(value: np.ndarray, sigma: np.ndarray, scale0: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and gradients in float64: `W_hat = s q`, with `q` passing gradients on within its range and `s = s0 e^sigma`."""
    rows, s = x.reshape(-1, K).astype(np.float64), np.repeat(scale0 * np.exp(sigma), GROUP, 1)
    u = value / s
    q = np.clip(np.round(u), -8, 7)
    lost = rows @ (s * q - W.astype(np.float64)).T
    by_matrix = 2 / lost.size * lost.T @ rows
    inside = (u > -8) & (u < 7)
    by_sigma = by_matrix * s * np.where(inside, q - u, q)
    return float((lost**2).mean()), by_matrix * inside, by_sigma.reshape(N, -1, GROUP).sum(-1)


def test_loss_gradient_and_adams_steps_are_those_of_the_equations() -> None:
    still, moving = jax.tree.map(jnp.asarray, latent.start(packed_layer(), {PATH: W}))
    settings = Distillation(steps=4, batch=2, rate=0.02, step_size_rate=0.01)
    state, scale0 = optimizer(settings).init(moving), np.asarray(still[PATH].scale, np.float64)
    mine = {"value": W.astype(np.float64), "sigma": np.zeros((N, K // GROUP))}
    moments = {kind: (np.zeros_like(array), np.zeros_like(array)) for kind, array in mine.items()}
    for step in range(3):
        gradient = jax.tree.map(jnp.zeros_like, moving)
        wanted = {kind: np.zeros_like(array) for kind, array in mine.items()}
        # The scale that is stored has 11 bits: so does the one by hand.
        stored = (scale0 * np.exp(mine["sigma"])).astype(np.float16) / np.exp(mine["sigma"])
        for x in X:
            loss, by_value, by_sigma = by_hand(mine["value"], mine["sigma"], stored, x)
            found = block_loss(BLOCKDEF, still, moving, ORIGINAL, jnp.asarray(x))
            np.testing.assert_allclose(found, loss, rtol=1e-3)
            wanted["value"] += by_value
            wanted["sigma"] += by_sigma
            gradient = add_gradient(BLOCKDEF, still, moving, ORIGINAL, jnp.asarray(x), gradient, jnp.float32(1.0))
        for kind, array in wanted.items():
            np.testing.assert_allclose(gradient[PATH][kind], array, rtol=5e-3, atol=5e-3 * np.abs(array).max())
        moving, state, finite = update(settings, moving, state, gradient)
        assert finite
        for kind, rate in (("value", settings.rate), ("sigma", settings.step_size_rate)):
            first, second = moments[kind]
            g = wanted[kind] / settings.batch
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            moments[kind] = first, second
            # What rate there is falls to none behind the last step.
            size = rate * (1 - step / settings.steps) / (1 - 0.9 ** (step + 1))
            mine[kind] = mine[kind] - size * first / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
            np.testing.assert_allclose(moving[PATH][kind], mine[kind], atol=0.02 * rate)


@pytest.mark.long
@pytest.mark.parametrize("kind", RULES)
def test_what_is_returned_is_the_best_that_was_found_on_batches_kept_apart(kind: str) -> None:
    packed = packed_layer(kind)
    seen: list[DistillationStep] = []
    hidden = [x.reshape(1, -1, K) for x in X] * 2
    settings = Distillation(steps=12, rate=0.005, step_size_rate=0.005)
    found = distil_block(BLOCKDEF, ORIGINAL, packed, hidden, settings, on_step=seen.append)

    def loss(weight: Any) -> float:
        """That of the layer as it runs."""
        return float(np.mean((np.asarray(linear(jnp.asarray(hidden[-1]), weight)) - hidden[-1] @ W.T) ** 2))

    # Three batches to learn from, so a judgement every three steps.
    assert [step.step for step in seen] == [0, 3, 6, 9, 12]
    assert found.loss == min(step.loss for step in seen) == seen[-1].best < 1
    found.params[PATH].validate(PATH)
    assert found.params[PATH].bits() == packed[PATH].bits()
    np.testing.assert_allclose(loss(found.params[PATH]) / loss(packed[PATH]), found.loss, rtol=1e-3)
    # Steps that are too large help nothing, and nothing is changed.
    worse = distil_block(BLOCKDEF, ORIGINAL, packed, hidden, Distillation(steps=3, rate=10.0))
    assert worse.loss == 1
    assert worse.params[PATH] is packed[PATH]


def test_a_loss_that_is_not_finite_ends_in_a_sentence() -> None:
    far = Distillation(steps=5, step_size_rate=1e3)
    with pytest.raises(QuikError, match=r"the distillation of model.layers.7 has left the finite numbers at step \d of 5; lower"):
        distil_block(BLOCKDEF, ORIGINAL, packed_layer(), X, far, name="model.layers.7")
    with pytest.raises(QuikError, match=r"model.layers.7, or its original, gives values that are not finite"):
        distil_block(BLOCKDEF, ORIGINAL, packed_layer(), [np.full_like(X[0], np.inf)], far, name="model.layers.7")


# Whole models.


def windows(_tokenizer: Any) -> np.ndarray:
    return np.concatenate(BATCHES)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the log, in which times are."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file != directory / "log.jsonl"]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


class Stop(Exception):
    """A run ends here."""


class Watch(NoProgress):
    """Note what is distilled, and stop as soon as `when` says so of a step."""

    def __init__(self, when: Callable[[DistillationStep], bool] = lambda _: False) -> None:
        self.steps: list[DistillationStep] = []
        self._when = when

    def distilling(self, step: DistillationStep) -> None:
        self.steps.append(step)
        if self._when(step):
            raise Stop


@pytest.mark.long
def test_an_artifact_of_the_same_format_that_is_nearer_and_the_same_twice(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last block has no quantized layers.
    rule = {"match": r"layers\.[01]\.mlp\.", "group_size": 32, "method": "rtn", "activation_bits": 8}
    plainly = Recipe.model_validate({"name": "x", "rules": [rule]})
    recipe = plainly.model_copy(update={"distillation": Distillation(steps=6, rate=2e-4, step_size_rate=1e-3)})
    watch = Watch()
    done = quantize_checkpoint(tiny_checkpoint, tmp_path / "a", recipe, windows, progress=watch)
    plain = {row["path"]: row for row in quantize_checkpoint(tiny_checkpoint, tmp_path / "plain", plainly).layers}
    last = {step.block: step for step in watch.steps if step.step == step.steps}
    assert list(last) == ["model.layers.0", "model.layers.1"]
    assert all(step.best < 1 for step in last.values())
    # Each row of the report says what became of its block; formats and sizes are those without distillation.
    assert len(done.layers) == len(plain) == 6
    for row in done.layers:
        other = plain[row["path"]]
        assert row["distilled"] == last[".".join(row["path"].split(".")[:3])].best
        assert row["relative_error"] != other["relative_error"]
        assert {**other, **{name: row[name] for name in ("relative_error", "snr_db", "distilled")}} == row
    model, _ = checkpoint.restore(tmp_path / "a")
    params = dotted(pure_params(model))
    assert {path.split(".")[3] for path, leaf in params.items() if isinstance(leaf, GroupWeight)} == {"mlp"}
    # Norms and layers in floats of a distilled block move too; nothing else does.
    dense = dotted(pure_params(load(tiny_checkpoint)[0]))
    moved = {path for path, leaf in params.items() if not isinstance(leaf, GroupWeight) and not np.array_equal(leaf, dense[path])}
    assert {".".join(path.split(".")[1:3]) for path in moved} == {"layers.0", "layers.1"}
    assert {path.split(".")[3] for path in moved} >= {"input_layernorm", "self_attn"}
    assert checkpoint.sizes(tmp_path / "a").linear_bits == checkpoint.sizes(tmp_path / "plain").linear_bits
    assert read_report(tmp_path / "a").recipe == recipe.model_dump(mode="json")
    logged = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged if "distilled" in line] == [step.best for step in last.values()]
    # Killed in the middle of a block's training, and again after it: the same bytes.
    stopped = Watch(lambda step: step.block.endswith("1") and step.step > 0)
    with pytest.raises(Stop):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "b", recipe, windows, progress=stopped)
    again = Watch()
    resumed = quantize_checkpoint(tiny_checkpoint, tmp_path / "b", recipe, windows, progress=again, activation_bytes=100_000)
    assert {step.block for step in again.steps} == {"model.layers.1"}
    assert (resumed.fingerprint, contents(tmp_path / "b")) == (done.fingerprint, contents(tmp_path / "a"))
    lines = ProgressLines(recipe)
    for step in watch.steps:
        lines.distilling(step)
    ends = [line for line in capsys.readouterr().err.splitlines() if "after 6 of 6 steps of distillation" in line]
    assert len(ends) == 2
    assert ends[0].endswith(f", {last['model.layers.0'].best:.4f} is kept")


def test_plans_count_it_and_say_it() -> None:
    plain, taught = (
        make_plan(tiny_config(), name, memory_bytes=10**9, seqlen=32) for name in ("zeroquant-w8a8", "zeroquant-w8a8-lkd")
    )
    assert taught.quantizing.work > plain.quantizing.work
    assert (plain.samples, taught.samples) == (0, 16)
    assert [note for note in taught.notes if note not in plain.notes] == [
        "each block learns from its original in 100 steps of 1 calibration sequence: most of the time of quantizing"
    ]


def test_what_cannot_be_distilled_is_said_before_any_work() -> None:
    settings = {"distillation": {"steps": 2}}
    for name, reason in (
        ("nf4", "codebooks cannot be trained"),
        ("quik-4b-sparse", "the pattern of sparse ones would be lost"),
        ("gptq-w4a16-g128-actorder", 'take order "stored" or static_groups'),
        ("fp", "there are no rules"),
    ):
        with pytest.raises(ValidationError, match=reason):
            Recipe.model_validate({**RECIPES[name].model_dump(mode="json"), **settings})
    assert Recipe.model_validate({**RECIPES["gptq-w4a16-g128-static"].model_dump(), **settings}).distillation is not None
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"rate": float("inf")}, {"epochs": 3}):
        with pytest.raises(ValidationError):
            Distillation(**wrong)
    with pytest.raises(QuikError, match=r"distils block after block, and parameters alone have no blocks; use quantize_model"):
        quantize_params(ORIGINAL, "zeroquant-w8a8-lkd")
