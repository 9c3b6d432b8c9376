"""Settings of a training: everything that decides its bytes, beside models and data."""

from typing import Literal

import optax
from pydantic import BaseModel, ConfigDict, Field, model_validator

Pruning = Literal["2:4", "unstructured", "heads", "intermediate"]


class TrainSettings(BaseModel):
    """Settings of a training. Unknown fields are refused.

    Attributes:
        steps: of the optimizer.
        batch: examples a step.
        longest: tokens of a text; what is longer is cut.
        evaluate_every: steps between evaluations on the validation examples.
        seed: of the order of examples, and of new parameters.
        rate: the largest rate of AdamW; it rises over the share `warmup` of the steps and falls straight to 0.
        step_size_rate: the largest rate of the logarithms of step sizes; left out, `rate`.
        weight_decay: of matrices.
        dropout: share of zeros, while it trains, in the student's embeddings and in what enters the last layers of attention
            and MLP (arXiv 1207.0580). Each step draws its own, by `seed`.
        average: decay of a running average of what moves, which is what is evaluated and kept; 0: the last values are.
        label_weight, soft_weight, hidden_weight, attention_weight: of the losses: cross-entropy against labels; against a
            teacher's softened classes (at `temperature`); mean squared errors of hidden states and of attention scores.
        prune: a mask over the layers of blocks: 2:4; the smallest `prune_share` of each matrix; whole heads; or whole rows of
            the MLP's inside.
        prune_every: steps after which the mask is made anew from the latent weights, of which the pruned ones go on moving,
            straight-through, as if they were there; 0: it stays, and they stay zero.
        prune_first: make the mask of the floats; else of what quantization has left of them.
        remove_blocks: so many blocks are taken out of the student, spread evenly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    longest: int = Field(128, ge=4)
    evaluate_every: int = Field(250, ge=1)
    seed: int = Field(0, ge=0)
    rate: float = Field(5e-5, gt=0)
    step_size_rate: float | None = Field(None, ge=0)
    warmup: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    average: float = Field(0.0, ge=0, lt=1)
    label_weight: float = Field(0.0, ge=0)
    soft_weight: float = Field(1.0, ge=0)
    hidden_weight: float = Field(1.0, ge=0)
    attention_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    prune: Pruning | None = None
    prune_share: float = Field(0.5, gt=0, lt=1)
    prune_every: int = Field(0, ge=0)
    prune_first: bool = True
    remove_blocks: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_is_learned(self) -> "TrainSettings":
        if not self.label_weight + self.soft_weight + self.hidden_weight + self.attention_weight:
            raise ValueError("all losses have the weight 0; give one of them a weight")
        if self.prune is None and self.prune_every:
            raise ValueError("prune_every is of a mask; say with prune which")
        return self


def schedule(settings: TrainSettings) -> optax.Schedule:
    """The share of the rate at a step: up to 1 over the warm-up, then straight down to 0 behind the last step."""
    warm = max(1, round(settings.steps * settings.warmup))
    up = optax.linear_schedule(1 / warm, 1.0, warm - 1) if warm > 1 else optax.constant_schedule(1.0)
    return optax.join_schedules([up, optax.linear_schedule(1.0, 0.0, settings.steps - warm + 1)], [warm - 1])


def optimizer(settings: TrainSettings) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999) on gradients clipped to a global norm of 1; step sizes at their own rate, without decay."""
    rates = {"value": settings.rate, "sigma": settings.rate if settings.step_size_rate is None else settings.step_size_rate}

    def decayed(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        assert isinstance(updates, dict)
        assert isinstance(params, dict)
        changed: dict[str, dict[str, dict[str, object]]] = {}
        for part, group in updates.items():
            # Blocks are stacked: their matrices have three axes.
            matrix = 2 if part == "rest" else 3
            changed[part] = {}
            for path, own in group.items():
                values = params[part][path]
                changed[part][path] = {
                    kind: -rates[kind]
                    * (array + settings.weight_decay * values[kind] if kind == "value" and array.ndim == matrix else array)
                    for kind, array in own.items()
                }
        return changed

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.999),
        optax.stateless(decayed),
        optax.scale_by_schedule(schedule(settings)),
    )
