"""The product's problem as its kernel sees it: static properties, global arrays by name, and a thread block's share of a tile."""

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from quikjax.pallas_kernels.quik_matmul.tiles import COMPUTE, MatmulTiles
from quikjax.pallas_kernels.quik_matmul.unsplit import Form


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static properties that a kernel is specialized to."""

    tiles: MatmulTiles
    bits: int
    grid: tuple[int, int]
    base_steps: int
    outlier_steps: int
    has_bias: bool
    out_dtype: Any
    # First row among the weights, true and padded number of outputs of each result.
    members: tuple[tuple[int, int, int], ...]
    direct: bool
    has_residual: bool
    fed: bool  # weights of 4 bits, which come in words (`feed.py`)
    unsplit: Form | None


class Operands:
    """The kernel's global arrays by name."""

    def __init__(self, problem: Problem, refs: tuple[Any, ...]):
        rest = list(refs)
        unsplit = problem.unsplit
        self.unsplit = tuple(rest[: unsplit.count]) if unsplit else ()
        del rest[: len(self.unsplit)]
        self.tokens: Any = None if unsplit else rest.pop(0)
        self.qweight, self.scale = rest.pop(0), rest.pop(0)
        quantized, outliers = problem.bits < 16, problem.outlier_steps > 0
        self.x_scale: Any = rest.pop(0) if quantized and not unsplit else None
        self.x_zero: Any = rest.pop(0) if quantized and not unsplit else None
        self.reduced: Any = rest.pop(0) if quantized else None
        self.x_outliers: Any = rest.pop(0) if outliers and not unsplit else None
        self.w_outliers: Any = rest.pop(0) if outliers else None
        self.bias: Any = rest.pop(0) if problem.has_bias else None
        self.residual: Any = rest.pop(0) if problem.has_residual else None
        self.ys = rest


class Walk:
    """One thread block's share of a tile: the tile's place, and the steps along K that are its own."""

    def __init__(self, problem: Problem, loop: plgpu.NDLoopInfo):
        tiles, splits = problem.tiles, problem.tiles.splits
        i, j = plgpu.planar_snake(loop.index[0], problem.grid, 0, tiles.strip)
        self.first_m, self.first_n = i * tiles.m, j * COMPUTE * tiles.n
        self.splits = splits
        self.part, self._reverse = parts_of(problem)
        self.base = (problem.base_steps - self.part + splits - 1) // splits
        self.outliers = (problem.outlier_steps - self._reverse + splits - 1) // splits
        self.before = loop.local_index * (problem.base_steps + problem.outlier_steps) if splits == 1 else 0

    def base_step(self, k: Any) -> Any:
        return self.part + k * self.splits

    def outlier_step(self, k: Any) -> Any:
        return self._reverse + k * self.splits


def parts_of(problem: Problem) -> tuple[Any, Any]:
    """Which of a tile's base steps and which of its outlier steps are this thread block's: the first of every `splits`."""
    splits = problem.tiles.splits
    part: Any = lax.axis_index("part") if splits > 1 else 0
    # Outlier steps are dealt from the other end, so that no part gets the odd step of both.
    return part, splits - 1 - part
