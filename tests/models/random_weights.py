"""Weights that PyTorch and JAX make alike from a seed and the parameters' names, so that golden files need not hold them."""

import zlib
from collections.abc import Mapping

import numpy as np

# Small token tables, so that a tied head does not just repeat the token it reads; positions that make OPT and GPT-2 say something
# new.
_SPREAD = {"embed_tokens": 0.1, "word_embeddings": 0.1, "embed_positions": 0.5, "shared": 0.1, "wte": 0.1, "wpe": 0.5}


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """float32 arrays of the given shapes, by name. Each depends on `seed` and its own name only.

    Matrices keep the variance of what they multiply, so that depth neither dies out nor explodes; biases and norms are far
    enough from zero and one to be missed when they are left out.
    """
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape)
        if len(shape) == 2:
            layer = name.rpartition(".")[0].rpartition(".")[2]
            inputs = shape[0 if layer.startswith("c_") else 1]  # GPT-2's layers lie the other way
            values = _SPREAD.get(layer, 1.3 / np.sqrt(inputs)) * values
        elif name.endswith("bias"):
            values = 0.3 * values
        else:
            values = 1 + 0.3 * values
        weights[name] = values.astype(np.float32)
    return weights


def checksum(weights: Mapping[str, np.ndarray]) -> int:
    """Tells weights apart: equal only if all names, shapes and bits are."""
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(f"{name}{weights[name].shape}".encode(), crc)
        crc = zlib.crc32(weights[name].tobytes(), crc)
    return crc
