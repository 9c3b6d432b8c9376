"""Say which recipe suits a device, in one sentence with its figures."""

from collections.abc import Iterable
from typing import NamedTuple

from quikjax.pallas_kernels.devices import Device
from quikjax.quantizing.recipe import Recipe, Rule, find_recipe

# What every device is advised while no backend multiplies 4-bit activations faster than 8-bit ones.
SUITABLE = "w4a8"

# KL divergence to the original of SmolLM2-135M on three windows of 2048 tokens of WikiText-2 test, calibrated on 16 of its
# validation text. benchmarks/notes-accuracy.md has the command.
KL = {"quik-4b": 0.226, "quik-4b+": 0.180, "w4a8": 0.108}
# Mean cosine of an encoder's embeddings to the original's: MiniLM on 500 sentences of SST-2; benchmarks/notes-encoders.md.
COSINE = {"quik-4b": 0.959, "quik-8b": 0.9997, "w4a8": 0.971, "rtn-w4a4": 0.557}


class PlannedLayers(NamedTuple):
    """Equal layers: their path (with `*` for the block), how many, `N`, `K`, and the bits of their activations."""

    pattern: str
    number: int
    outputs: int
    inputs: int
    activation_bits: int


def advise(
    device: Device, recipe: Recipe, layers: Iterable[PlannedLayers], hidden_size: int, bits: float, *, encoder: bool = False
) -> str | None:
    """Name the recipe that suits `device` better than `recipe`, whose layers have `bits` per weight; `None` if there is none.

    4-bit activations cost accuracy and buy time only where they are multiplied as 4-bit numbers. What they cost is said of a
    model of the same kind, a language model or an encoder.
    """
    layers = list(layers)
    if recipe.name == SUITABLE:
        return f"{recipe.name} suits {device}: {_why(device)}, so 8-bit activations cost no time"
    if not any(layer.activation_bits == 4 for layer in layers):
        return None
    other = find_recipe(SUITABLE)
    planned = [(layer, rule) for layer in layers if isinstance(rule := other.rule_for(layer.pattern.replace("*", "0")), Rule)]
    weights = sum(layer.number * layer.outputs * layer.inputs for layer, _ in planned)
    if not weights:
        return None
    size = sum(layer.number * rule.packed_bits(layer.outputs, layer.inputs, hidden_size) for layer, rule in planned) / weights
    loss = ""
    if encoder and recipe.name in COSINE:
        loss = (
            f" (MiniLM's embeddings keep a cosine of {COSINE[SUITABLE]} to the original, of {COSINE[recipe.name]} with this one "
            f"and of {COSINE['quik-8b']} with quik-8b)"
        )
    elif not encoder and recipe.name in KL:
        mine, its = KL[recipe.name], KL[SUITABLE]
        loss = f" and loses {its / mine:.0%} of what this one does (KL {its} against {mine} on SmolLM2-135M)"
    return (
        f"{SUITABLE} suits {device} better: {_why(device)}, so it is as fast, takes {size:.2f} bits per weight "
        f"instead of {bits:.2f}{loss}; choose it with --recipe {SUITABLE}"
    )


def _why(device: Device) -> str:
    if device.platform == "gpu" and device.capability is not None and device.capability[0] == 8:
        return "its INT4 tensor cores are used by no backend here, and 4-bit activations travel as int8"
    if device.platform == "gpu":
        return "it has no INT4 tensor cores, and 4-bit activations travel as int8"
    return "it multiplies 4-bit activations as 8-bit numbers"
