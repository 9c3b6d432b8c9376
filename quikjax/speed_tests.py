"""The tests of `quikjax bench`: a decoder's by the names that llama-bench gives them, an encoder's `en128`. Without JAX."""

import dataclasses
import re
from collections.abc import Sequence

from quikjax.errors import QuikError

_NAME = re.compile(r"(?:pp(\d+))?\+?(?:tg(\d+))?(?:\s*@\s*d?(\d+))?")
_ENCODER_NAME = re.compile(r"en(\d+)")


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


@dataclasses.dataclass(frozen=True)
class EncoderTest:
    """Put `batch` texts of `length` tokens each through an encoder, none of them padding."""

    length: int
    batch: int = 1

    @property
    def name(self) -> str:
        """The test as it is typed.

        >>> EncoderTest(128, batch=32).name
        'en128'
        """
        return f"en{self.length}"


def decoder_tests(batches: Sequence[int]) -> list[Test]:
    """The tests of a decoder, where none is named.

    >>> [test.name for test in decoder_tests([1])]
    ['pp512', 'tg128', 'pp512+tg128']
    """
    return [Test(prompt, new, batch=batch) for batch in batches for prompt, new in ((512, 0), (0, 128), (512, 128))]


def encoder_tests(batches: Sequence[int], reach: int) -> list[EncoderTest]:
    """The tests of an encoder that reads `reach` tokens, where none is named.

    >>> [[test.name for test in encoder_tests([1], reach)] for reach in (512, 100, 16)]
    [['en32', 'en128'], ['en32'], ['en16']]
    """
    lengths = [length for length in (32, 128) if length <= reach] or [reach]
    return [EncoderTest(length, batch) for batch in batches for length in lengths]


def parse_test(text: str, batch: int = 1) -> Test | EncoderTest:
    """A test by its name.

    Raises:
        QuikError: it is none.

    >>> parse_test("pp512+tg128@1024"), parse_test("tg32", batch=8)
    (Test(prompt=512, new=128, depth=1024, batch=1), Test(prompt=0, new=32, depth=0, batch=8))
    >>> parse_test("en128", batch=32)
    EncoderTest(length=128, batch=32)
    """
    encoder = _ENCODER_NAME.fullmatch(text.strip())
    if encoder and int(encoder[1]):
        return EncoderTest(int(encoder[1]), batch)
    found = _NAME.fullmatch(text.strip())
    prompt, new, depth = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
    if not prompt and not new:
        raise QuikError(
            f'there is no test "{text}"; give pp512, tg128 or pp512+tg128, with @ 1024 for a depth, or en128 for an encoder'
        )
    return Test(prompt, new, depth, batch)
