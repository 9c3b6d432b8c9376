"""Which products of an encoder's block gain by integers, at which number of tokens: each is switched by itself.

An encoder reads all of its texts at once, so that the rows of its products are batch times length. With few of them a kernel's
own time is most of it, and a split before a product costs more than integers save (Wu et al., arXiv 2301.12017, quantize only the
MLP's first layer there); with many all of them gain. Times are counted (`counts.py`), not measured.
"""

import dataclasses
from collections.abc import Mapping

from quikjax.models.base import Transformer
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.devices import Device
from quikjax.quantizing.recipe import AnyRule, Rule

TOKENS = (32, 512, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductTimes:
    """Predicted microseconds of one product of a block, layers that read one tensor, at each of `tokens`.

    `integer` is what the recipe makes of it (split, product of integers, product of outliers), `wide` a bf16 product for each of
    its layers. `layers` are named within the block.
    """

    group: str
    layers: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    tokens: tuple[int, ...]
    integer: tuple[float, ...]
    wide: tuple[float, ...]

    @property
    def gains(self) -> tuple[bool, ...]:
        """Whether integers are faster, at each of `tokens`."""
        return tuple(ours < theirs for ours, theirs in zip(self.integer, self.wide, strict=True))


def product_times(
    model: Transformer,
    rules: Mapping[str, AnyRule],
    outliers: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    device: Device,
    tokens: int,
) -> tuple[ProductTimes, ...]:
    """Times of the products of an encoder's first block, at `TOKENS` and at `tokens`; none of other models and other devices.

    `rules` and numbers of `outliers` by the path of each quantized parameter, `shapes` of all. A product is left out if its
    layers have no rule, or more than one, or one that no integer kernel runs.
    """
    if model.generates or not device.hopper:
        return ()
    # These import the kernels' compiler, which takes its time: only where something is counted.
    from quikjax.pallas_kernels.quik_matmul.mosaic import DIRECT_ROWS
    from quikjax.planning.counts import assumed_of, dense_microseconds, joined, quik_microseconds, splits_inside

    assumed = assumed_of(device)
    if assumed is None:
        return ()
    rows = tuple(sorted({*TOKENS, tokens}))
    name, block = next(iter(model.blocks.items()))
    found = []
    for group, layers in block.groups.items():
        paths = [".".join((*model.block_path, name, layer, "weight")) for layer in layers]
        rule = rules.get(paths[0])
        same = all(rules.get(path) == rule and outliers.get(path) == outliers.get(paths[0]) for path in paths)
        if not isinstance(rule, Rule) or rule.activation_bits == 16 or not same:
            continue
        outputs, inputs = tuple(shapes[path][0] for path in paths), shapes[paths[0]][1]
        bias = paths[0].removesuffix("weight") + "bias" in shapes
        bits = rule.weight_bits, rule.activation_bits
        spec = LinearSpec("", group, outputs[0], inputs, outliers[paths[0]], *bits, bias=bias)
        onto = group.endswith("_output")  # its result is added to the hidden state
        found.append(
            ProductTimes(
                group=group,
                layers=layers,
                outputs=outputs,
                inputs=inputs,
                tokens=rows,
                integer=tuple(
                    quik_microseconds(
                        assumed, spec, m, [outputs], onto and m <= DIRECT_ROWS, splits_inside(joined(spec, outputs), m)
                    )
                    for m in rows
                ),
                wide=tuple(dense_microseconds(assumed, spec, m, outputs) for m in rows),
            )
        )
    return tuple(found)
