"""Masks of pruned weights in a training: found for a model's layers, laid over what stays, found again from what has moved."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int8

from quikjax.algorithms import pruning
from quikjax.models.base import Block, Transformer
from quikjax.training.blocks import Skeleton, Tree
from quikjax.training.moving import Moving
from quikjax.training.train_settings import TrainSettings
from quikjax.weights.formats import dequantize, is_packed
from quikjax.weights.latent import Latent

# part -> path -> int8 mask, stacked where the part's blocks are.
Masks = dict[str, dict[str, Any]]

# What `Block.groups` call the layers that read what attention has mixed, and what is inside the MLP.
_MIXED, _INSIDE = "attention_output", "mlp_output"


def dense(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters in floats: what quantization has left of those that are packed."""
    return {path: np.asarray(dequantize(leaf) if is_packed(leaf) else leaf) for path, leaf in params.items()}


def find(model: Transformer, params: Mapping[str, Any], settings: TrainSettings) -> dict[str, np.ndarray]:
    """The masks of all layers that a setting prunes, by full path, from dense parameters."""
    found = {}
    for key, block in model.blocks.items():
        for layer in _layers(block, settings):
            path = ".".join((*model.block_path, key, layer, "weight"))
            found[path] = np.asarray(_mask(jnp.asarray(params[path], jnp.float32), settings, model.config.head_size))
    return found


def again(skeleton: Skeleton, still: Tree, moving: Mapping[str, Moving], settings: TrainSettings) -> Masks:
    """The masks made anew, of the latent floats or (`prune_first` off) of what quantization leaves of them now."""
    head_size = int(skeleton.head_size)
    found: Masks = {}
    for part, own in still.items():
        found[part] = {path: leaf.mask for path, leaf in own.items()}
        for path, leaf in own.items():
            if leaf.mask.size:
                values = moving[part][path]["value"]
                if not settings.prune_first and isinstance(leaf, Latent):
                    values = _left(leaf, moving[part][path])
                found[part][path] = jax.vmap(lambda W: _mask(W, settings, head_size))(values)
    return found


def of(still: Tree) -> Masks:
    """The masks in what stays."""
    return {part: {path: leaf.mask for path, leaf in own.items()} for part, own in still.items()}


def put(still: Tree, masks: Masks) -> Tree:
    """Lay masks over what stays."""
    return {
        part: {path: dataclasses.replace(leaf, mask=masks[part][path]) for path, leaf in own.items()}
        for part, own in still.items()
    }


def _left(leaf: Latent, own: Mapping[str, Any]) -> Float32[Array, "blocks n k"]:
    """Latent floats of a layer in QUIK format rounded to their codes, in all blocks."""
    scale = leaf.scale * jnp.exp(own["sigma"])
    if scale.ndim != 2:
        return own["value"]
    high = 2 ** (leaf.packed.weight_bits - 1) - 1
    return jnp.clip(jnp.round(own["value"] / scale[..., None]), -high - 1, high) * scale[..., None]


def _layers(block: Block, settings: TrainSettings) -> list[str]:
    wanted = {"heads": (_MIXED,), "intermediate": (_INSIDE,)}.get(str(settings.prune), tuple(block.groups))
    return [layer for group in wanted for layer in block.groups.get(group, ())]


def _mask(W: Float32[Array, "n k"], settings: TrainSettings, head_size: int) -> Int8[Array, "n k"]:
    if settings.prune == "2:4":
        return pruning.semi_structured(W)
    if settings.prune == "unstructured":
        return pruning.unstructured(W, settings.prune_share)
    return pruning.structured(W, settings.prune_share, head_size if settings.prune == "heads" else 1)
