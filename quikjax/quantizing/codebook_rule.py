"""The rule for codebook weights: a data type, a block and an algorithm, each chosen independently of the others."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from quikjax.algorithms import codebooks
from quikjax.algorithms.codebooks import MAX_BITS, MIN_BITS, DataType
from quikjax.errors import QuikError
from quikjax.quantizing.layer_rule import LayerRule
from quikjax.weights.codebook import AbsmaxFormat


class CodebookRule(LayerRule):
    """How one kind of layer is written in a data type of k bits, block by block. Weights only.

    In a recipe it is told from the rule of a QUIK layer by its `data_type`.
    """

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
    order: Literal["hessian", "stored"] = "hessian"
    """GPTQ: round columns by falling diagonal of the Hessian, or as they are stored."""

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

    def wanted_outliers(self, inputs: int, hidden_size: int | None = None) -> int:
        """`ceil(proxy * inputs)` columns in 16 bits, of a layer whose producing layer is known."""
        del hidden_size
        # A product such as 0.1 * 30 lies a little above the whole number that is meant.
        return math.ceil(round(self.proxy * inputs, 6))


def wants_proxies(rules: Iterable[Any]) -> bool:
    """Whether any of a recipe's rules keeps proxy outliers."""
    return any(isinstance(rule, CodebookRule) and rule.proxy > 0 for rule in rules)
