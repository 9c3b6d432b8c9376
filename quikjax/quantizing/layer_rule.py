"""Fields and checks that rules for every packed format have in common."""

import abc
import re

from pydantic import BaseModel, ConfigDict, Field, field_validator


class LayerRule(BaseModel, abc.ABC):
    """Which layers a rule is for, and what every way to quantize them asks. Unknown fields are refused.

    A rule also has `weight_bits`, `activation_bits`, `method` and `sweeps`, as fields or as properties.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str
    """Regular expression, searched in the dotted path: `model.layers.0.mlp.down_proj.weight`, `params.Dense_0.kernel`."""
    damping: float = Field(0.01, gt=0)
    """GPTQ: added to the Hessian's diagonal, relative to its mean."""
    column_block: int = Field(128, gt=0, multiple_of=16)
    in_axes: tuple[int, ...] | None = None
    """Input axes of the kernel. Left out: `(1,)` for a published `weight` `[out, in]`, `(0,)` for a Flax `kernel` `[in, out]`."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @abc.abstractmethod
    def needs_data(self) -> bool:
        """Tell whether the rule wants statistics of activations."""

    @abc.abstractmethod
    def wanted_outliers(self, inputs: int, hidden_size: int | None = None) -> int:
        """`outlier_count`, also where that is more than there are columns."""

    def outlier_count(self, inputs: int, hidden_size: int | None = None) -> int:
        """Count the columns kept in 16 bits among `inputs`, in a model of width `hidden_size`: at most all of them."""
        return min(self.wanted_outliers(inputs, hidden_size), inputs)
