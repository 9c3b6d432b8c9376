"""Where a student begins: a model given a classifier, or fewer blocks; all of it on the host."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from quikjax.errors import QuikError
from quikjax.models.base import Transformer
from quikjax.models.encoder import CLASSIFIER, Encoder, EncoderConfig
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.weights.formats import is_packed

# What new classifiers and poolers are drawn with, as Hugging Face's `initializer_range`.
_DEVIATION = 0.02
# What configurations call the number of blocks, by `model_type`; the others as LLaMA.
_BLOCK_COUNTS = {"distilbert": "n_layers", "gpt2": "n_layer", "falcon": "num_hidden_layers"}


class Beginning(NamedTuple):
    """A published configuration, the model without weights, and its dense parameters, flat."""

    fields: dict[str, Any]
    model: Transformer
    params: dict[str, np.ndarray]


def beginning(model: Transformer) -> Beginning:
    """A dense model as a beginning.

    Raises:
        QuikError: it has quantized layers, or does not know its configuration.
    """
    if model.published is None:
        raise QuikError("the model does not know its published configuration; load it with quikjax.load")
    flat = dotted(pure_params(model))
    packed = next((path for path, leaf in flat.items() if is_packed(leaf)), None)
    if packed is not None:
        raise QuikError(
            f"{packed} is quantized; training begins with the model as published, and --recipe says how to quantize it"
        )
    return _built(json.loads(model.published), {path: np.asarray(leaf) for path, leaf in flat.items()})


def as_classifier(start: Beginning, names: Sequence[str], seed: int) -> Beginning:
    """The model with a classifier of the classes `names`: its own, or a new one drawn from `seed` (deviation 0.02, biases 0).

    Raises:
        QuikError: the model is no encoder, or its classifier has another number of classes.
    """
    model = start.model
    if not isinstance(model, Encoder):
        raise QuikError(f"{type(model).__name__} is no encoder; only encoders are trained to classify")
    config: EncoderConfig = model.config
    if config.head == CLASSIFIER:
        if config.label_count != len(names):
            raise QuikError(
                f"the model's classifier has {config.label_count} classes, the data {len(names)} ({', '.join(names)}); "
                "give data of the same task, or a model without a head"
            )
        return start
    family = type(model).__name__.removesuffix(config.head)
    fields = {
        **start.fields,
        "architectures": [family + CLASSIFIER],
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
    fields.pop("num_labels", None)
    prefix, rng, params = model.prefix + ".", np.random.default_rng(seed), {}
    for path, shape in _shapes(abstract_model(fields)).items():
        known = start.params.get(path, start.params.get(path.removeprefix(prefix)))
        if known is None:
            drawn = rng.normal(0, _DEVIATION, shape) if len(shape) == 2 else np.zeros(shape)
            known = drawn.astype(np.float32)
        params[path] = known
    return _built(fields, params)


def with_blocks(start: Beginning, kept: Sequence[int]) -> Beginning:
    """The model with only the blocks `kept`, in order."""
    name = _BLOCK_COUNTS.get(str(start.fields.get("model_type")), "num_hidden_layers")
    prefix = re.compile(re.escape(".".join(start.model.block_path)) + r"\.(\d+)\.")
    numbers = {str(old): new for new, old in enumerate(kept)}
    params = {}
    for path, leaf in start.params.items():
        found = prefix.match(path)
        if found is None:
            params[path] = leaf
        elif found[1] in numbers:
            params[f"{path[: found.start(1)]}{numbers[found[1]]}{path[found.end(1) :]}"] = leaf
    return _built({**start.fields, name: len(kept)}, params)


def _built(fields: dict[str, Any], params: Mapping[str, np.ndarray]) -> Beginning:
    model = abstract_model(fields)
    return Beginning(fields, model, {path: params[path] for path in _shapes(model)})


def _shapes(model: Transformer) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in dotted(jax.tree.map(lambda leaf: leaf, pure_params(model))).items()}
