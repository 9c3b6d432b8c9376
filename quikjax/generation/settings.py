"""Settings of how tokens are drawn, checked as soon as they are given: without JAX, so that a mistake costs no time."""

import dataclasses
import math
import numbers
from typing import TYPE_CHECKING

from quikjax.errors import QuikError
from quikjax.files import described

if TYPE_CHECKING:
    from quikjax.generation.sampling import Values

_MOST_SEED = 2**32 - 1


def check_seed(seed: int) -> None:
    """Raise `QuikError` unless `seed` is one."""
    if not 0 <= seed <= _MOST_SEED:
        raise QuikError(f"a seed is a number from 0 to {_MOST_SEED}, not {seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. The default is greedy: always the most likely one.

    `temperature` divides the logits, 0 is greedy. `top_k` keeps the most likely `k` tokens, 0 all. `top_p` keeps the fewest most
    likely tokens whose probabilities sum to at least `p` (arXiv 1904.09751), 1 all. `min_p` keeps tokens at least `min_p` times
    as likely as the most likely one (arXiv 2407.01082), 0 all. `repetition_penalty` divides positive logits of tokens that are
    already in the text by it and multiplies negative ones (arXiv 1909.05858), 1 leaves them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            QuikError: naming the setting and what it may be.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise QuikError(f"{field.name} is a number, not {described(value)}")
        if int(self.top_k) != self.top_k:
            raise QuikError(f"top-k keeps that many tokens, a whole number, not {self.top_k}")
        if not (0 <= self.temperature < math.inf):
            raise QuikError(f"the temperature is 0 (the most likely token, always) or more, not {self.temperature:g}")
        if self.top_k < 0:
            raise QuikError(f"top-k keeps that many tokens, 0 for all of them, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise QuikError(f"top-p is a probability above 0 and up to 1, not {self.top_p:g}")
        if not 0 <= self.min_p <= 1:
            raise QuikError(f"min-p is a share of the highest probability, from 0 to 1, not {self.min_p:g}")
        if not 0 < self.repetition_penalty < math.inf:
            raise QuikError(f"the repetition penalty is above 0, 1 for none, not {self.repetition_penalty:g}")
        if self.greedy and (self.top_k or self.top_p < 1 or self.min_p):
            raise QuikError("top-k, top-p and min-p choose among tokens to draw; give a temperature above 0 as well")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def values(self) -> "Values":
        """The settings as the arguments of a compiled program."""
        import numpy as np

        from quikjax.generation.sampling import Values

        return Values(
            np.float32(1.0 if self.greedy else self.temperature),
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
        )
