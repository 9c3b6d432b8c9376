"""The rule for codebook weights: a data type, a block and an algorithm, each chosen independently of the others."""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quikjax.algorithms import codebooks
from quikjax.algorithms.codebooks import MAX_BITS, MIN_BITS, DataType
from quikjax.errors import QuikError
from quikjax.weights.codebook import AbsmaxFormat


class CodebookRule(BaseModel):
    """How one kind of layer is written in a data type of k bits, block by block. Weights only; unknown fields are refused.

    In a recipe it is told from the rule of a QUIK layer by its `data_type`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str
    """Regular expression, searched in the dotted path."""
    data_type: DataType
    bits: Annotated[int, Field(strict=True, ge=MIN_BITS, le=MAX_BITS)] = 4
    exponent_bits: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Of "float"; left out, 2 of 3 bits and 3 of more, as in the paper's main runs."""
    block: Annotated[int, Field(strict=True, ge=1)] | Literal["tensor"] = 64
    """Weights that share one absmax, counted along the rows of the matrix; the last block may be short. Or the whole tensor."""
    absmax: AbsmaxFormat = "float16"
    """How absmax is stored; "double" is 8 bits (QLoRA's double quantization)."""
    centered: bool = False
    """Subtract the tensor's mean first."""
    proxy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The share of input columns kept in 16 bits: those that the producing layer's units with the largest weights write."""
    outlier_dtype: Literal["float16", "bfloat16"] = "float16"
    method: Literal["rtn", "gptq"] = "rtn"
    """Round to the nearest value, or GPTQ, which needs calibration data."""
    damping: float = Field(0.01, gt=0)
    """GPTQ: added to the Hessian's diagonal, relative to its mean."""
    order: Literal["hessian", "stored"] = "hessian"
    """GPTQ: round columns by falling diagonal of the Hessian, or as they are stored."""
    column_block: int = Field(128, gt=0, multiple_of=16)
    in_axes: tuple[int, ...] | None = None
    """Input axes of the kernel, as for a QUIK rule."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _is_a_data_type(self) -> "CodebookRule":
        if self.exponent_bits is not None and self.data_type != "float":
            raise ValueError(f'data type "{self.data_type}" has no exponent_bits; only "float" has')
        try:
            if self.data_type != "quantile":
                codebooks.codebook(self.data_type, self.bits, self.exponent_bits)
        except QuikError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def weight_bits(self) -> int:
        """`k`."""
        return self.bits

    @property
    def activation_bits(self) -> int:
        """16: activations keep their dtype."""
        return 16

    @property
    def sweeps(self) -> int:
        """No coordinate descent goes over a codebook's codes."""
        return 0

    def needs_data(self) -> bool:
        """Whether the rule wants statistics of activations: GPTQ does. Proxy outliers do not."""
        return self.method == "gptq"

    def outlier_count(self, inputs: int, hidden_size: int | None = None) -> int:
        """`ceil(proxy * inputs)` columns in 16 bits, of a layer whose producing layer is known."""
        return min(self.wanted_outliers(inputs, hidden_size), inputs)

    def wanted_outliers(self, inputs: int, hidden_size: int | None = None) -> int:
        """`outlier_count`: a share of the columns never exceeds them."""
        del hidden_size
        # A product such as 0.1 * 30 lies a little above the whole number that is meant.
        return math.ceil(round(self.proxy * inputs, 6))


def wants_proxies(rules: Iterable[Any]) -> bool:
    """Whether any of a recipe's rules keeps proxy outliers."""
    return any(isinstance(rule, CodebookRule) and rule.proxy > 0 for rule in rules)


def is_codebook(value: Any) -> str:
    """Tell the two kinds of rule apart, as an object or as JSON: "codebook" or "quik"."""
    found = "data_type" in value if isinstance(value, dict) else isinstance(value, CodebookRule)
    return "codebook" if found else "quik"
