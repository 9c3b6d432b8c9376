"""Tensor names of checkpoints: what wrappers put before them, which tensors nobody needs, and names that betray a quantizer.

All formats, index files included, go by the same rules, which are here.
"""

import re
from collections.abc import Iterable

from quikjax.errors import QuikError

HEAD = "lm_head.weight"
# Published beside the weights, and computed from the configuration by every implementation.
_COMPUTED = re.compile(
    r"(^|\.)((rotary_emb|rotary_pos_emb|rope)\.\w+|masked_bias|position_ids|attn_rot_embd(\.\w+)?|causal_mask"
    r"|h\.\d+\.attn\.bias)$"  # GPT-2's causal mask
)
# Modules that training tools wrap a model, or a part of one, in; they are no part of the published name, wherever they stand.
_WRAPPERS = re.compile(r"(^|\.)((module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_PEFT = "base_model.model."
# What stands beside or in place of a weight that is quantized, by the tool that writes it.
_QUANTIZED = (
    (
        "bitsandbytes",
        re.compile(r"\.((nested_)?(absmax|quant_map)|SCB|weight_format)$|\.quant_state\.bitsandbytes"),
    ),
    ("compressed-tensors", re.compile(r"\.weight_(packed|shape|global_scale)$")),
    ("FP8", re.compile(r"\.weight_scale(_inv)?$")),
    ("GPTQ", re.compile(r"\.g_idx$")),
    ("AWQ", re.compile(r"\.qzeros$")),
    ("GPTQ", re.compile(r"\.qweight$")),
    ("MLX", re.compile(r"\.(scales|biases)$")),
)
_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")


def published(where: str, names: Iterable[str]) -> dict[str, str]:
    """The published name of each tensor, by the name that the file has: without what wrappers put before and between.

    Known are PyTorch's `module.`, `_orig_mod.` and the wrappers of its FSDP and checkpointing, PEFT's `base_model.model.`, and a
    second `model.` from a trainer's own class.

    Raises:
        QuikError: two tensors would have one name, or they are an adapter's.

    >>> published("x", ["_orig_mod.module.model.norm.weight"])
    {'_orig_mod.module.model.norm.weight': 'model.norm.weight'}
    >>> published("x", ["model.layers.0._orig_mod.mlp.up_proj.weight"])
    {'model.layers.0._orig_mod.mlp.up_proj.weight': 'model.layers.0.mlp.up_proj.weight'}
    >>> published("x", ["base_model.model.model.norm.weight", "base_model.model.lm_head.weight"])
    {'base_model.model.model.norm.weight': 'model.norm.weight', 'base_model.model.lm_head.weight': 'lm_head.weight'}
    """
    names = list(names)
    adapter = next((name for name in names if _ADAPTER.search(name)), None)
    if adapter is not None:
        raise QuikError(
            f"{where} holds an adapter's weights (LoRA: {adapter}); merge them into their model first (PEFT's merge_and_unload)"
        )
    plain = {name: _unwrapped(name) for name in names}
    if any(name.startswith(("model.model.", "model.transformer.")) for name in plain.values()):
        plain = {name: short.removeprefix("model.") for name, short in plain.items()}
    seen: dict[str, str] = {}
    for name, short in plain.items():
        if short in seen:
            raise QuikError(f"{where} holds one tensor under two names, {seen[short]} and {name}")
        seen[short] = name
    return plain


def _unwrapped(name: str) -> str:
    before = None
    while name != before:
        before = name
        name = _WRAPPERS.sub(r"\1", name).removeprefix(_PEFT)
    return name


def is_computed(name: str) -> bool:
    """Whether every implementation computes this tensor by itself, so that it may be there, or in an index, or not.

    >>> is_computed("model.layers.0.self_attn.rotary_emb.inv_freq"), is_computed("model.norm.weight")
    (True, False)
    """
    return _COMPUTED.search(name) is not None


def may_be_missing(name: str) -> bool:
    """Whether an index may name or leave out this tensor whatever its shards hold: computed ones, and a head that may be tied."""
    return is_computed(name) or name == HEAD


def quantized_with(names: Iterable[str]) -> tuple[str, str] | None:
    """The tool whose quantized weights these are, and the tensor that tells so; `None` if none is known by them.

    >>> quantized_with(["model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.qzeros"])
    ('AWQ', 'model.layers.0.mlp.up_proj.qzeros')
    """
    names = list(names)
    return next(((tool, name) for tool, pattern in _QUANTIZED for name in names if pattern.search(name)), None)
