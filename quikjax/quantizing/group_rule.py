"""The rule for weights in groups with a scale and a zero point each: GPTQ W4A16, ZeroQuant."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from quikjax.algorithms.codebooks import MAX_BITS, MIN_BITS
from quikjax.quantizing.layer_rule import LayerRule
from quikjax.quantizing.level_clip import Fixed, fixed_level_clip, names_of_level_clips


class GroupRule(LayerRule):
    """How one kind of layer is quantized in groups along its inputs. In a recipe it is told from other rules by `group_size`."""

    group_size: Annotated[int, Field(strict=True, ge=1)]
    """Inputs that share a scale and a zero point; the last group may be short."""
    bits: Annotated[int, Field(strict=True, ge=MIN_BITS, le=MAX_BITS)] = 4
    symmetric: bool = False
    """No zero points, but a scale from the largest magnitude."""
    activation_bits: Literal[4, 8, 16] = 16
    """Below 16: activations are rounded token by token, as those of a QUIK layer are."""
    level_clip: Annotated[Fixed, names_of_level_clips("symmetric")] = None
    """"symmetric", or one in numbers: as in the rule of a QUIK layer. Left out: activations are rounded asymmetrically."""
    method: Literal["gptq", "rtn"] = "gptq"
    order: Literal["hessian", "stored"] = "stored"
    """GPTQ: round columns by falling diagonal of the Hessian ("act order"), or as they are stored. Groups are of columns in the
    order of rounding, unless they are static."""
    static_groups: bool = False
    """GPTQ: scales and zero points from the original weights, of columns as they are stored. Otherwise each group's are found
    when its turn comes, from weights that have absorbed the error of those before."""

    @model_validator(mode="after")
    def _groups_are_found_at_panels(self) -> "GroupRule":
        if self.method == "gptq" and not self.static_groups and self.group_size % 16:
            raise ValueError(
                f"GPTQ finds groups of a multiple of 16 inputs as it comes to them, not of {self.group_size}; "
                "use such a size, or static_groups"
            )
        if self.method == "rtn" and (self.order != "stored" or self.static_groups):
            raise ValueError('order and static_groups are of method "gptq"; method "rtn" has neither')
        return self

    @model_validator(mode="after")
    def _activations_can_have_the_level_clip(self) -> "GroupRule":
        fixed_level_clip(self.level_clip, self.activation_bits)
        return self

    @model_serializer(mode="wrap")
    def _without_a_level_clip_that_is_not_there(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # A rule without one reads in JSON as it did before there was any.
        fields = serialize(self)
        if self.level_clip is None:
            fields.pop("level_clip", None)
        return fields

    @property
    def weight_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    @property
    def sweeps(self) -> int:
        """No coordinate descent goes over codes in groups."""
        return 0

    def needs_data(self) -> bool:
        """Whether the rule wants statistics of activations: GPTQ does."""
        return self.method == "gptq"

    def wanted_outliers(self, inputs: int, hidden_size: int | None = None) -> int:
        """None."""
        del inputs, hidden_size
        return 0
