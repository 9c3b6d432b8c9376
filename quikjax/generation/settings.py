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
_MOST_PENALTY = 10  # a length to this power, and a score times it, are still float32 numbers


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
    already in the text by it and multiplies negative ones (arXiv 1909.05858), 1 leaves them. `no_repeat_ngram` forbids tokens
    that would write a sequence of so many tokens a second time, 0 forbids none. `min_new_tokens` forbids stop tokens before so
    many tokens were added.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            QuikError: naming the setting and what it may be.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise QuikError(f"{field.name} is a number, not {described(value)}")
        counts = (
            ("top_k", "top-k keeps that many tokens"),
            ("no_repeat_ngram", "no-repeat-ngram is the length of what is not repeated in tokens"),
            ("min_new_tokens", "min-new-tokens is how many are added at least"),
        )
        for name, meaning in counts:
            value = getattr(self, name)
            if not math.isfinite(value) or int(value) != value or value < 0:
                raise QuikError(f"{meaning}, a whole number, not {value}; 0 sets no limit")
        if not (0 <= self.temperature < math.inf):
            raise QuikError(f"the temperature is 0 (the most likely token, always) or more, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise QuikError(f"top-p is a probability above 0 and up to 1, not {self.top_p:g}")
        if not 0 <= self.min_p <= 1:
            raise QuikError(f"min-p is a share of the highest probability, from 0 to 1, not {self.min_p:g}")
        if not 0 < self.repetition_penalty < math.inf:
            raise QuikError(f"the repetition penalty is above 0, 1 for none, not {self.repetition_penalty:g}")
        if self.greedy and (self.top_k or self.top_p < 1 or self.min_p):
            raise QuikError("top-k, top-p and min-p choose among tokens to draw; give a temperature above 0 as well")

    def check_room(self, max_new_tokens: int) -> None:
        """Raise `QuikError` if a text must be longer than it may be."""
        if self.min_new_tokens > max_new_tokens:
            raise QuikError(f"min-new-tokens is {self.min_new_tokens}, and at most {max_new_tokens} may be added; ask for more")

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
            np.int32(self.min_new_tokens),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """Beam search: of each text the `count` most likely continuations are followed side by side.

    A continuation that has ended is judged by the sum of its tokens' log-probabilities over `length ** length_penalty`, its stop
    token counted (arXiv 1609.08144): 0 is the sum itself, which favours short texts, 1 the mean. The search of a text ends when
    `count` continuations have ended (`early_stopping` true), or when no open one is expected to become better than the worst of
    those (false: at the length that it has; "never": at the length that would suit it best). The terms are transformers'.
    Where there are fewer texts than are asked for (of one forced token there is one), the rest are empty and score -inf.
    """

    count: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            QuikError: naming the setting and what it may be.
        """
        if isinstance(self.count, bool) or not isinstance(self.count, numbers.Integral) or self.count < 2:
            raise QuikError(f"a search follows 2 beams or more, not {self.count}; without beams a text is greedy or drawn")
        if isinstance(self.length_penalty, bool) or not isinstance(self.length_penalty, numbers.Real):
            raise QuikError(f"the length penalty is a number, not {described(self.length_penalty)}")
        if not abs(self.length_penalty) <= _MOST_PENALTY:
            raise QuikError(f"the length penalty is from -{_MOST_PENALTY} to {_MOST_PENALTY}, not {self.length_penalty}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise QuikError(f"early_stopping is True, False or 'never', not {self.early_stopping!r}")

    def check(self, samples: int, sampling: Sampling, *, stop_strings: bool, logprobs: bool, deterministic: bool) -> None:
        """Raise `QuikError` if a search is asked for what it does not give."""
        if not sampling.greedy:
            raise QuikError("beams are searched and not drawn; leave the temperature at 0, or the beams out")
        if samples > self.count:
            raise QuikError(f"a search with {self.count} beams finds so many texts of a prompt, not {samples}")
        if stop_strings:
            raise QuikError("beams are compared as tokens and have no text before they end; give stop tokens, or no beams")
        if logprobs:
            raise QuikError("log-probabilities are of tokens chosen one by one; a search gives each text's score")
        if deterministic:
            raise QuikError("beams of a text are decoded together; deterministic is for tokens chosen one by one")
