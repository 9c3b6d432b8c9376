"""Settings of a recovery: everything that decides its bytes, beside the artifact, its original and the tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax
from jaxtyping import Int32
from pydantic import BaseModel, ConfigDict, Field

from quikjax.errors import QuikError
from quikjax.models.registry import abstract_model
from quikjax.training.moving import KINDS
from quikjax.training.recoverable import is_encoder

_ENCODER = {
    "batch": 32,
    "seqlen": 64,
    "validation": 64,
    "sigma_rate": 1e-2,
    "norm_rate": 1e-3,
    "outlier_rate": 1e-3,
    "code_rate": 1e-2,
}


class RecoverySettings(BaseModel):
    """Settings of a recovery. Unknown fields are refused.

    Attributes:
        steps: of the optimizer.
        batch: windows a step.
        seqlen: tokens a window.
        windows: to train on, from the start of the text; left out, as many as the steps see, or as there are.
        validation: windows behind those, to choose on.
        evaluate_every: steps between evaluations on them.
        seed: of the order in which windows are seen.
        sigma_rate, norm_rate, outlier_rate, code_rate: the largest rate, of logarithms of scales, of norms (logarithm of the
            weight; bias as it is), of outlier columns, and of codes (in steps of a code).
        codes: let codes move too.

    The defaults are a language model's; `of` has each kind's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1)
    batch: int = Field(1, ge=1)
    seqlen: int = Field(2048, ge=2)
    windows: int | None = Field(None, ge=1)
    validation: int = Field(16, ge=1)
    evaluate_every: int = Field(25, ge=1)
    seed: int = Field(0, ge=0)
    sigma_rate: float = Field(1e-3, ge=0)
    norm_rate: float = Field(5e-4, ge=0)
    outlier_rate: float = Field(1e-4, ge=0)
    code_rate: float = Field(5e-3, ge=0)
    codes: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, context: int | None = None, **given: Any) -> "RecoverySettings":
        """`given`, and what a model with this configuration is recovered with where they say nothing or `None`.

        A language model sees one window of 2048 tokens a step, an encoder, whose texts are short, 32 of 64; neither more than its
        context. An encoder has its own rates: its loss is of another kind.

        Raises:
            QuikError: the configuration is of no model here, or does not allow this `context`.
            pydantic.ValidationError: something given is out of range, or unknown.
        """
        known: dict[str, Any] = dict(_ENCODER) if is_encoder(config) else {}
        length = known.get("seqlen", cls.model_fields["seqlen"].default)
        if config is not None:
            known["seqlen"] = min(length, abstract_model(config, context=context).config.context_length)
        return cls(**known | {name: value for name, value in given.items() if value is not None})

    def rates(self) -> dict[str, float]:
        """The largest rate of each kind of moving array."""
        scale = self.sigma_rate / 10 if self.codes else self.sigma_rate
        rates = (scale, self.outlier_rate, self.norm_rate, self.norm_rate, self.code_rate)
        return dict(zip(KINDS, rates, strict=True))


def cut(
    tokens: Int32[np.ndarray, " tokens"], settings: RecoverySettings
) -> tuple[Int32[np.ndarray, "windows length"], Int32[np.ndarray, "validation length"]]:
    """Windows to train on, and those behind them to choose on; none overlap.

    Raises:
        QuikError: the text is too short.
    """
    there = len(tokens) // settings.seqlen
    used = settings.windows or min(settings.steps * settings.batch, there - settings.validation)
    if used < 1 or used + settings.validation > there:
        wanted = max(settings.windows or 1, 1) + settings.validation
        raise QuikError(
            f"the text has {len(tokens)} tokens, {there} windows of {settings.seqlen}; {wanted} are needed, "
            f"{settings.validation} of them to choose on: give more text, or lower --seqlen or --validation"
        )
    rows = tokens[: (used + settings.validation) * settings.seqlen].reshape(-1, settings.seqlen)
    return rows[:used], rows[used:]


def order(windows: int, settings: RecoverySettings) -> Int32[np.ndarray, "steps batch"]:
    """Which windows each step sees: all of them in an order of the seed's, then all again in another."""
    rng = np.random.default_rng(settings.seed)
    needed = settings.steps * settings.batch
    epochs = [rng.permutation(windows) for _ in range(-(-needed // windows))]
    return np.concatenate(epochs)[:needed].reshape(settings.steps, settings.batch).astype(np.int32)


def schedule(settings: RecoverySettings) -> optax.Schedule:
    """The share of each rate at a step: up to 1 over a tenth of the steps, then straight down to 0 behind the last."""
    warm = max(1, settings.steps // 10)
    up = optax.linear_schedule(1 / warm, 1.0, warm - 1) if warm > 1 else optax.constant_schedule(1.0)
    return optax.join_schedules([up, optax.linear_schedule(1.0, 0.0, settings.steps - warm + 1)], [warm - 1])


def optimizer(settings: RecoverySettings) -> optax.GradientTransformation:
    """Adam (0.9, 0.95) on gradients clipped to a global norm of 1, each kind of array at its own rate."""
    rates = settings.rates()

    def by_rate(updates: optax.Updates, _params: optax.Params | None = None) -> optax.Updates:
        assert isinstance(updates, dict)
        return {
            part: {path: {kind: array * -rates[kind] for kind, array in own.items()} for path, own in group.items()}
            for part, group in updates.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.stateless(by_rate),
        optax.scale_by_schedule(schedule(settings)),
    )
