"""Compute an artifact's size from its manifest: exact bytes of what is stored, and what the files take."""

import dataclasses
import math
import os

import jax.numpy as jnp

from quikjax.checkpoint.parts import REST, rebuild
from quikjax.checkpoint.reader import Reader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an artifact. A linear layer is a packed weight anywhere, or a dense matrix inside a transformer block.

    `linear_bits` and `all_bits` count every stored number at its true width (int4 as 4 bits); of packed weights codes, outliers,
    scale, reduced and columns. `linear_parameters` and `all_parameters` count the numbers these stand for. `disk_bytes` are
    those of all files, whose arrays are compressed.
    """

    linear_bits: int = 0
    linear_parameters: int = 0
    all_bits: int = 0
    all_parameters: int = 0
    disk_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter of the linear layers; 0 without any."""
        return self.linear_bits / self.linear_parameters if self.linear_parameters else 0.0

    @property
    def relative_to_fp16(self) -> float:
        """Size of the linear layers relative to 16 bits per parameter; 0 without any."""
        return self.bits_per_weight / 16


def sizes(path: str | os.PathLike[str]) -> Sizes:
    """The sizes of the artifact in directory `path`, from its manifest alone: no array is read.

    Raises:
        QuikError: there is no artifact, or a file is missing, truncated or was added.
    """
    reader = Reader(path, verify=False)
    linear_bits = linear_parameters = all_bits = all_parameters = 0
    for name, part in reader.parts.items():
        stored: list[tuple[int, int, bool]] = []  # bits, parameters, whether it is a linear layer
        for owner, static in part.packed.items():
            data = {path: row for path, row in part.arrays.items() if path.rpartition(".")[0] == owner}
            weight = rebuild(static, {path.rpartition(".")[2]: row for path, row in data.items()}, owner)
            stored.append((weight.bits(), math.prod(weight.shape), True))
        for array, row in part.arrays.items():
            if array.rpartition(".")[0] not in part.packed:
                count = math.prod(row.shape)
                stored.append((count * dtype_bits(row.dtype), count, name != REST and len(row.shape) >= 2))
        all_bits += sum(bits for bits, _, _ in stored)
        all_parameters += sum(count for _, count, _ in stored)
        linear_bits += sum(bits for bits, _, linear in stored if linear)
        linear_parameters += sum(count for _, count, linear in stored if linear)
    return Sizes(
        linear_bits=linear_bits,
        linear_parameters=linear_parameters,
        all_bits=all_bits,
        all_parameters=all_parameters,
        disk_bytes=reader.disk_bytes,
    )


def dtype_bits(dtype: str) -> int:
    """Bits of one stored number.

    >>> dtype_bits("int4"), dtype_bits("bfloat16")
    (4, 16)
    """
    return 4 if dtype == "int4" else jnp.dtype(dtype).itemsize * 8
