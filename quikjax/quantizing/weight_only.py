"""Weight-only baselines that have no packed format here: weights rounded in groups and kept as dense arrays, for their accuracy.

No kernel runs them in 4 bits; sizes are those that a format with a 16-bit scale and a zero point per group would have.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from quikjax.algorithms.awq import awq
from quikjax.algorithms.groups import rtn_groups
from quikjax.errors import QuikError, did_you_mean
from quikjax.models.base import CausalLM
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.quantizing.statistics import LayerStats

_BITS, _GROUP = 4, 128
# By name: whether weights are scaled before they are rounded.
METHODS = {"rtn-w4-g128": False, "awq-w4-g128": True}


def weight_only(name: str, model: CausalLM, stats: Mapping[str, LayerStats]) -> tuple[dict[str, Any], float]:
    """Round the weights of all layers in the blocks, asymmetric in groups of 128: parameters, and bits per weight.

    Args:
        name: "rtn-w4-g128", or "awq-w4-g128", which scales columns by what is best for the activations in `stats`.
        stats: what `calibrate` gives.

    Raises:
        QuikError: there is no such method.
    """
    if name not in METHODS:
        raise QuikError(f'there is no weight-only method "{name}"; {did_you_mean(name, METHODS)}')
    params = dotted(pure_params(model))
    for key, block in model.blocks.items():
        for layers in block.groups.values():
            paths = [".".join((*model.block_path, key, layer, "weight")) for layer in layers]
            weights = [params[path].astype(jnp.float32) for path in paths]
            if METHODS[name]:
                rounded, _ = awq(weights, stats[paths[0]].hessian, bits=_BITS, group=_GROUP)
            else:
                rounded = [rtn_groups(W, bits=_BITS, group=_GROUP, symmetric=False).dequantize(_GROUP) for W in weights]
            for path, W in zip(paths, rounded, strict=True):
                params[path] = W.astype(params[path].dtype)
    return nested(params), _BITS + (16 + _BITS) / _GROUP
