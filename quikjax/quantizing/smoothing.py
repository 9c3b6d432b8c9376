"""SmoothQuant on a whole model: the ranges of activations move into the weights, and the model stays the same function.

Only where a norm makes the tensor that layers read: q, k, v and gate, up, fc1 or c_fc. What the norm is divided by, the columns
of those layers are multiplied by (`algorithms.smoothquant`).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from quikjax.algorithms.smoothquant import smoothing_scales
from quikjax.errors import QuikError
from quikjax.models.base import Transformer
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.quantizing.statistics import LayerStats

# The norm that makes what a group of layers reads, by published names: the first one that a block has.
NORMS: dict[str, tuple[str, ...]] = {
    "attention_input": ("input_layernorm", "self_attn_layer_norm", "ln_attn", "ln_1"),
    "mlp_input": ("post_attention_layernorm", "final_layer_norm", "ln_mlp", "ln_2"),
    "block_input": ("input_layernorm",),
}


def smooth_params(model: Transformer, stats: Mapping[str, LayerStats], alpha: float) -> dict[str, Any]:
    """Smooth a dense model: its parameters as nested dictionaries, the same function with narrower activations.

    Args:
        model: any of our models, dense.
        stats: what `calibrate` gives: statistics of every layer's input, by dotted path.
        alpha: how much of the range moves: 0.5 for OPT, GPT-2 and Falcon, 0.8 to 0.85 for LLaMA.

    Raises:
        QuikError: `alpha` is not within 0 and 1, or the model's norms stand behind its layers.
    """
    if not 0 <= alpha <= 1:
        raise QuikError(f"alpha must be between 0 and 1, not {alpha:g}")
    if not getattr(model.config, "norm_first", True):
        raise QuikError("this model's norms stand behind its layers, so that there is nothing to divide before them")
    params = dotted(pure_params(model))
    for key, block in model.blocks.items():
        prefix = ".".join((*model.block_path, key))
        for group, layers in block.groups.items():
            norm = next((name for name in NORMS.get(group, ()) if f"{prefix}.{name}.weight" in params), None)
            if norm is None:
                continue
            paths = [f"{prefix}.{layer}.weight" for layer in layers]
            s = smoothing_scales(stats[paths[0]].absmax, [params[path].astype(jnp.float32) for path in paths], alpha)
            for path in paths:
                params[path] = (params[path] * s).astype(params[path].dtype)
            for name in (f"{prefix}.{norm}.weight", f"{prefix}.{norm}.bias"):
                if name in params:
                    params[name] = (params[name] / s).astype(params[name].dtype)
    return nested(params)
