"""How a packed model uses its codes: are all of them used, and how many weights stand at the ends?"""

import dataclasses
import math

import numpy as np

from quikjax.checkpoint import Reader
from quikjax.reports.artifact import pattern_of
from quikjax.weights.formats import is_packed
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import SparseWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesUse:
    """The codes of all layers of one kind.

    `counts[i]` is how many weights have code `lowest + i`. `at_the_ends` is the share with the smallest or the largest code,
    clipped ones among them; `entropy` is in bits per weight, to be held against the bits that are stored.
    """

    pattern: str
    bits: int
    lowest: int
    counts: tuple[int, ...]

    @property
    def at_the_ends(self) -> float:
        """The share of weights with the smallest code of the symmetric range or below, or the largest."""
        total = sum(self.counts)
        largest = 2 ** (self.bits - 1) - 1
        outside = sum(count for index, count in enumerate(self.counts) if abs(index + self.lowest) >= largest)
        return outside / total if total else 0.0

    @property
    def entropy(self) -> float:
        """Bits per weight that the codes' frequencies would need."""
        total = sum(self.counts)
        return -math.fsum(count / total * math.log2(count / total) for count in self.counts if count)


def codes_use(reader: Reader) -> tuple[list[CodesUse], dict[str, list[int]]]:
    """The use of codes by kind of layer, and the outlier columns of every packed weight by path. Reads every block once.

    Raises:
        QuikError: what is on disk is not what was saved.
    """
    counts: dict[tuple[str, int], np.ndarray] = {}
    outliers: dict[str, list[int]] = {}
    for name in reader.parts:
        for path, leaf in reader.read_part(name).items():
            if is_packed(leaf):
                columns = np.asarray(leaf.columns)
                outliers[path] = np.sort(columns[len(columns) - (leaf.inputs - leaf.base) :]).tolist()
            if isinstance(leaf, SparseWeight):
                leaf = leaf.expanded()
            # Which value a codebook's code stands for is not told by its number.
            if not isinstance(leaf, QuikWeight):
                continue
            half = 2 ** (leaf.weight_bits - 1)
            found = np.bincount(np.asarray(leaf.qweight).astype(np.int16).reshape(-1) + half, minlength=2 * half)
            key = (pattern_of(name, path), leaf.weight_bits)
            counts[key] = counts.get(key, np.zeros(2 * half, np.int64)) + found
    uses = [
        CodesUse(pattern=pattern, bits=bits, lowest=-(2 ** (bits - 1)), counts=tuple(int(n) for n in found))
        for (pattern, bits), found in counts.items()
    ]
    return uses, outliers
