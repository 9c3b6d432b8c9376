"""How often a classifier of texts is right."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from quikjax.errors import QuikError
from quikjax.models.encoder import CLASSIFIER, Encoder, EncoderConfig
from quikjax.training.examples import Batch, Examples, in_order, numbers_of, read_labelled, tokenized


class Accuracy(NamedTuple):
    """The share of texts that a classifier is right on, its standard error, the mean cross-entropy in nats, how many texts."""

    accuracy: float
    error: float
    loss: float
    texts: int


def accuracy(model: Any, tokenizer: Any, data: str | Path, *, rows: int = 32) -> Accuracy:
    """Measure a classifier of texts on a file of labelled ones, `rows` at a time.

    Raises:
        QuikError: the model is no classifier of texts or has no tokenizer, or something is wrong with the file.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, EncoderConfig) or config.head != CLASSIFIER:
        raise QuikError(f"{type(model).__name__} is no classifier of texts; quikjax train makes one of an encoder")
    if tokenizer is None:
        raise QuikError("the model has no tokenizer, so it cannot read texts")
    if rows < 1:
        raise QuikError(f"--batch must be at least 1, not {rows}")
    labelled = read_labelled(data)
    labels = numbers_of(labelled.labels, config.labels, config.label_count, data)
    examples = tokenized(labelled.texts, labels, tokenizer, config.context_length)
    graphdef, params = nnx.split(model)
    return measured(graphdef, params, examples, rows)


def measured(graphdef: nnx.GraphDef[Any], params: Any, examples: Examples, rows: int) -> Accuracy:
    """The figures of a classifier's parameters on tokenized examples.

    Raises:
        QuikError: the loss is not finite.
    """
    right = loss = 0.0
    for batch in in_order(examples, rows):
        ours = np.asarray(predict(graphdef, params, batch), np.float64)
        ours = ours - ours.max(axis=-1, keepdims=True)
        ours -= np.log(np.exp(ours).sum(axis=-1, keepdims=True))
        right += float(np.sum(batch.weights * (np.argmax(ours, axis=-1) == batch.labels)))
        loss -= float(np.sum(batch.weights * ours[np.arange(len(batch.labels)), batch.labels]))
    count = len(examples.ids)
    if not math.isfinite(loss):
        raise QuikError("the loss on these texts is not finite")
    share = right / count
    return Accuracy(share, math.sqrt(share * (1 - share) / count), loss / count, count)


def _predict(graphdef: nnx.GraphDef[Encoder], params: Any, batch: Batch) -> jax.Array:
    return nnx.merge(graphdef, params)(batch.ids, batch.mask, batch.types)


# float32 logits `[batch, classes]`, through whatever the parameters are.
predict = jax.jit(_predict, static_argnums=0)
