"""Random encoders of the published variants, small, for tests."""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from quikjax.models.encoder import Encoder
from quikjax.models.registry import abstract_model, dotted, nested, pure_params

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from encoder_variants import VARIANTS
from random_weights import random_weights

__all__ = ["VARIANTS", "build"]


def build(name: str, **fields: Any) -> Encoder:
    """The variant `name`, which reads bytes; `fields` replace its configuration's."""
    abstract = abstract_model({**VARIANTS[name], "vocab_size": 257, **fields})
    assert isinstance(abstract, Encoder)
    shapes = {path: tuple(leaf.shape) for path, leaf in dotted(pure_params(abstract)).items()}
    weights = {path: jnp.asarray(weight) for path, weight in random_weights(shapes, 2).items()}
    return nnx.merge(nnx.split(abstract)[0], nested(weights))
