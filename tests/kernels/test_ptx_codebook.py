"""The compiled PTX of the product with 4-bit codebooks, executed on a CPU (`ptx/`), against its equation."""

import absent_gpu
import numpy as np
import pytest
from ptx.codebook_cases import Codebook, wrong

from quikjax.pallas_kernels.codebook_matmul.mosaic import CodebookMatmulTiles

pytestmark = pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))

F16, F32 = np.float16, np.float32
T = CodebookMatmulTiles

# rows, outputs, inputs, block, bias, tiles (m, stages, splits), entries, absmax, activations, output
CODEBOOKS = [
    Codebook(3, 200, 320, 64, True, T(8, 3, 1)),  # the last tiles are short both ways
    Codebook(17, 72, 640, 192, False, T(32, 4, 2), absmax=F32, out=F32),
    Codebook(2, 9, 1024, 64, False, T(8, 8, 8)),  # an odd number of outputs
    Codebook(1, 128, 256, 64, False, T(8, 2, 1)),
    Codebook(8, 136, 1024, 128, True, T(8, 2, 3), entries=15),
    Codebook(16, 264, 512, 64, True, T(16, 3, 4), dtype=F16, out=F16),
    Codebook(64, 64, 1152, 1152, False, T(64, 2, 2), entries=7, dtype=F16, out=F16),
]


# `make gpu-compile`, and so each run of CI, executes all of them.
@pytest.mark.parametrize(
    "case", [*CODEBOOKS[:3], *(pytest.param(case, marks=pytest.mark.slow) for case in CODEBOOKS[3:])], ids=str
)
def test_product_with_a_codebook(case: Codebook) -> None:
    assert wrong(case) == []
