"""Classes of texts, from a published classifier: the softmax over its classes, or a number for each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from quikjax.encoding.text_encoder import TextEncoder, Work
from quikjax.errors import QuikError
from quikjax.models.encoder import CLASSIFIER, TAGGER, Encoder
from quikjax.models.encoder_decoder import Reader


class Classification(NamedTuple):
    """The scores of each text's classes, in the order of the texts, and what it took.

    `kind` says what the scores are: "probabilities" that sum to 1 over the classes, "independent" probabilities of each class, or
    "values", the model's own outputs, of a regression or a single class. `labels` are the classes by their columns.
    """

    labels: tuple[str, ...]
    scores: Float32[np.ndarray, "texts labels"]
    kind: str
    work: Work

    @property
    def best(self) -> list[str]:
        """Each text's class of the highest score."""
        return [self.labels[at] for at in np.argmax(self.scores, axis=1)]


def classify(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    labels: Sequence[str] | None = None,
    length: int | None = None,
    batch_size: int = 32,
) -> Classification:
    """Classify texts, or pairs of two, with an encoder that has a classifier.

    Programs are compiled for every call; who classifies more than once keeps a `TextEncoder` and calls `classify_with`.

    Args:
        model: a classifier of texts, dense or with packed weights.
        tokenizer: its tokenizer.
        texts: texts, or pairs of two.
        labels: the classes' names in order, in place of those that the model's configuration (`id2label`) gives.
        length, batch_size: see `TextEncoder`.

    Raises:
        QuikError: as `TextEncoder`; the model has no classifier of texts, or nobody names its classes.
    """
    return classify_with(TextEncoder(model, tokenizer, length=length, batch_size=batch_size), texts, labels=labels)


def classify_with(encoder: TextEncoder, texts: Sequence[Any], *, labels: Sequence[str] | None = None) -> Classification:
    """`classify` with an encoder that keeps its programs.

    Raises:
        QuikError: as `classify`.
    """
    names = class_names(encoder.model, labels)
    logits, work = encoder.run(texts, class_logits)
    # In float64: a sum of probabilities is 1 to the last digit that is printed.
    wide = logits.astype(np.float64)
    problem = encoder.config.problem
    if problem == "regression" or (problem is None and len(names) == 1):
        return Classification(names, logits, "values", work)
    if problem == "multi_label_classification":
        return Classification(names, (1 / (1 + np.exp(-wide))).astype(np.float32), "independent", work)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))
    return Classification(names, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32), "probabilities", work)


def class_names(model: Encoder | Reader, labels: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of a classifier's classes: those given, or its configuration's.

    Raises:
        QuikError: the model has no classifier of texts, nobody names its classes, or there are more or fewer names than classes.
    """
    config, name = model.config, type(model).__name__
    if config.head == TAGGER:
        raise QuikError(f"{name} classifies each token, not whole texts; give a model with a classifier of texts")
    if config.head != CLASSIFIER:
        raise QuikError(
            f"{name} has no classifier; give a model published as ...{CLASSIFIER}, or embed texts with: quikjax embed"
        )
    if labels is not None:
        if len(labels) != config.label_count:
            raise QuikError(
                f"the model has {config.label_count} classes, and {len(labels)} labels are given ({', '.join(labels)})"
            )
        return tuple(labels)
    if config.labels:
        return config.labels
    if config.label_count == 1:
        return ("score",)
    raise QuikError(
        f"the configuration does not name the model's {config.label_count} classes (id2label); give their names in order, with "
        "--labels or labels="
    )


def class_logits(
    model: Encoder | Reader, hidden: Float[Array, "batch state hidden"], positions: Int32[Array, "batch length"]
) -> Float32[Array, "batch labels"]:
    found: Array = model.head(hidden, positions)
    return found
