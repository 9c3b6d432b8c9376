"""The tests of `quikjax bench`, by the names that llama-bench gives them. Without JAX."""

import dataclasses
import re

from quikjax.errors import QuikError

_NAME = re.compile(r"(?:pp(\d+))?\+?(?:tg(\d+))?(?:\s*@\s*d?(\d+))?")


@dataclasses.dataclass(frozen=True)
class Test:
    """Read `prompt` tokens and decode `new` ones, `batch` texts at a time, behind `depth` tokens in the cache."""

    prompt: int
    new: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As in llama-bench.

        >>> Test(512, 128, 1024).name
        'pp512+tg128 @ d1024'
        """
        parts = [f"{kind}{count}" for kind, count in (("pp", self.prompt), ("tg", self.new)) if count]
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


def parse_test(text: str, batch: int = 1) -> Test:
    """A test by its name.

    Raises:
        QuikError: it is none.

    >>> parse_test("pp512+tg128@1024"), parse_test("tg32", batch=8)
    (Test(prompt=512, new=128, depth=1024, batch=1), Test(prompt=0, new=32, depth=0, batch=8))
    """
    found = _NAME.fullmatch(text.strip())
    prompt, new, depth = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
    if not prompt and not new:
        raise QuikError(f'there is no test "{text}"; give pp512, tg128 or pp512+tg128, with @ 1024 for a depth')
    return Test(prompt, new, depth, batch)
