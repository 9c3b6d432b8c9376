"""The compiled PTX of the Mosaic kernels, executed on a CPU (`ptx/`), against the definition.

Small shapes that meet every branch of the kernels. Some are executed here; `execute_all.py` (`make gpu-compile`) executes all of
them, more of them, and a real layer.
"""

from collections.abc import Sequence
from typing import Any

import absent_gpu
import numpy as np
import pytest
from ptx.cases import BFLOAT16, Product, Row, Split, wrong

from quikjax.pallas_kernels.quik_matmul.mosaic import DIRECT_ROWS
from quikjax.pallas_kernels.quik_matmul.tiles import MatmulTiles
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles
from quikjax.pallas_kernels.split_quantize.producers import Gelu, Identity, LayerNorm, Relu, RmsNorm, SiluMul

pytestmark = pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))

F16, F32 = np.float16, np.float32
T, S = MatmulTiles, SplitTiles

# rows, outputs, inputs, outliers, weight bits, activation bits, bias, tiles (n, m, stages, strip, splits), output, operands
PRODUCTS = [
    Product(3, 192, 576, 36, 4, 4, True, T(64, 8, 3, 1, 1), residual=True),
    Product(17, 264, 640, 0, 4, 4, False, T(64, 32, 4, 1, 2), also=(40, 128)),
    Product(9, 64, 640, 632, 4, 4, False, T(64, 16, 3, 1, 1)),  # nearly all columns are outliers
    Product(8, 128, 1024, 130, 4, 8, True, T(64, 8, 2, 1, 4)),
    Product(129, 136, 384, 20, 8, 4, True, T(128, 64, 4, 1, 1)),
    Product(40, 192, 640, 64, 8, 8, False, T(64, 16, 3, 2, 1), also=(320,)),
    Product(8, 104, 640, 0, 4, 4, False, T(64, 8, 4, 1, 2), F32),
    Product(64, 48, 512, 36, 4, 16, False, T(64, 64, 4, 1, 1), F16, F16),
    Product(1, 8, 640, 0, 4, 4, False, T(64, 8, 3, 1, 1)),
    Product(2, 40, 640, 36, 4, 4, False, T(64, 8, 3, 1, 3)),
    Product(6, 64, 896, 0, 8, 8, True, T(64, 8, 3, 1, 6)),
    Product(1, 520, 1152, 64, 4, 4, True, T(64, 8, 4, 1, 8)),
    Product(12, 56, 768, 36, 4, 8, True, T(64, 16, 3, 1, 5)),
    Product(7, 72, 1024, 128, 8, 4, False, T(64, 8, 3, 1, 7)),
    Product(130, 120, 384, 0, 4, 4, True, T(128, 128, 5, 8, 1), also=(256, 72)),
    Product(70, 192, 576, 36, 8, 16, False, T(64, 32, 3, 2, 1)),
    Product(3, 192, 576, 36, 4, 4, True, T(64, 8, 3, 1, 1)),
    Product(130, 320, 384, 36, 4, 4, False, T(128, 64, 5, 8, 1)),
    Product(5, 256, 1024, 64, 4, 16, True, T(64, 8, 4, 1, 2)),
    Product(17, 200, 512, 36, 4, 4, True, T(64, 32, 4, 1, 1), F32),
    Product(16, 136, 640, 36, 4, 4, True, T(64, 16, 4, 1, 1), F16, F16),
]

NORM, LAYER_NORM, SILU, GELU, BY_TANH = RmsNorm(1e-5), LayerNorm(1e-5), SiluMul(), Gelu(), Gelu(approximate=True)
# rows, inputs, outliers, bits, producer, tiles (rows, warpgroups), inputs' dtype
SPLITS = [
    Split(1, 8, 0, 8, Identity(), S(1, 1)),
    Split(2, 1384, 84, 4, Identity(), S(1, 1), clip=(17, 1)),
    Split(2, 576, 36, 8, Identity(), S(1, 2), F32),
    Split(1, 2056, 8, 4, NORM, S(1, 4)),
    Split(1, 1024, 1, 4, LAYER_NORM, S(1, 8), F16),
    Split(1, 1376, 86, 8, SILU, S(1, 2)),
    Split(3, 768, 48, 4, GELU, S(2, 2)),
    Split(2, 640, 36, 4, Relu(), S(2, 1)),
    Split(3, 576, 36, 4, Identity(), S(2, 1)),
    Split(2, 576, 36, 4, Identity(), S(1, 1), F16),
    Split(130, 264, 256, 8, Identity(), S(2, 1)),
    Split(3, 576, 36, 8, NORM, S(2, 2)),
    Split(1, 1536, 300, 4, SILU, S(1, 8)),
    Split(1, 1536, 96, 4, BY_TANH, S(1, 3)),
    Split(3, 712, 70, 4, Identity(), S(2, 1), clip=(16, -8)),
    Split(1, 8192, 512, 4, Identity(), S(1, 8)),
    Split(2, 2312, 256, 4, NORM, S(2, 3), F16),
    Split(3, 640, 0, 8, LAYER_NORM, S(2, 2)),
    Split(2, 1536, 300, 4, LAYER_NORM, S(1, 3)),
    Split(5, 640, 64, 8, SILU, S(2, 1), F16),
    Split(2, 1384, 84, 8, GELU, S(1, 1), F16),
]


# Products of one row, which their kernel splits itself.
ROWS = [
    Row(Product(1, 264, 576, 36, 4, 4, True, T(64, 8, 4, 1, 2), residual=True), Identity(), clip=(17, 1)),
    Row(Product(1, 40, 1024, 260, 8, 4, True, T(64, 8, 3, 1, 1), F16, F16), NORM),
    Row(Product(1, 24, 640, 0, 4, 4, False, T(64, 8, 3, 1, 1)), Identity()),
    Row(Product(1, 72, 2056, 8, 4, 4, False, T(64, 8, 4, 1, 3), also=(40, 128)), NORM),
    # More tiles than multiprocessors; symmetric activations.
    Row(Product(1, 520, 1152, 64, 4, 8, True, T(64, 8, 4, 1, 1)), LAYER_NORM, clip=(256, -128)),
    Row(Product(1, 136, 1376, 86, 8, 8, False, T(64, 8, 3, 1, 4), residual=True), SILU),
    Row(Product(1, 56, 576, 0, 4, 4, False, T(64, 8, 3, 1, 1)), Relu()),
    Row(Product(1, 72, 768, 48, 4, 4, True, T(64, 8, 4, 1, 2), residual=True), GELU),
]


def test_the_cases_meet_what_matters() -> None:
    assert {(case.weight_bits, case.bits) for case in PRODUCTS} == {(w, a) for w in (4, 8) for a in (4, 8, 16)}
    assert {case.tiles.splits for case in PRODUCTS} == set(range(1, 9))
    assert {np.dtype(case.out) for case in PRODUCTS} == {BFLOAT16, np.dtype(F16), np.dtype(F32)}
    joined = [case.rows <= DIRECT_ROWS for case in PRODUCTS if case.also]
    assert set(joined) == {True, False}, "few rows are stored from registers, more by the copy engine"
    assert (
        {type(case.producer) for case in SPLITS}
        == {type(case.producer) for case in ROWS}
        == {Identity, RmsNorm, LayerNorm, SiluMul, Gelu, Relu}
    )
    assert {case.product.tiles.splits for case in ROWS} == {1, 2, 3, 4}


def _first(cases: Sequence[Any], count: int) -> list[Any]:
    """The first cases as they are. The others, executed by `make gpu-compile` and so by each run of CI, are left to it."""
    return [*cases[:count], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[count:])]


@pytest.mark.parametrize("case", _first(PRODUCTS, 16), ids=str)
def test_product(case: Product) -> None:
    assert wrong(case) == []


@pytest.mark.parametrize("case", _first(SPLITS, 14), ids=str)
def test_split(case: Split) -> None:
    assert wrong(case) == []


@pytest.mark.parametrize("case", _first(ROWS, 2), ids=str)
def test_row(case: Row) -> None:
    assert wrong(case) == []
