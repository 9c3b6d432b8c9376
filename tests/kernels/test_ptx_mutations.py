"""Programs that are wrong on purpose: the interpreter must say so, or it proves nothing about those that it passes.

Each mutation changes the PTX of one kernel as a compiler's or a programmer's mistake would.
"""

import re
from collections.abc import Callable

import absent_gpu
import pytest
from ptx.cases import Product, ProductRun, Row, RowRun, Split, SplitRun, product_run, row_run, split_run
from ptx.machine import OPPOSITE
from ptx.parser import Fault

from quikjax.pallas_kernels.quik_matmul.tiles import MatmulTiles
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles
from quikjax.pallas_kernels.split_quantize.producers import Identity, RmsNorm

pytestmark = pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))

Mutation = Callable[[str], str]


def _without(pattern: str, count: int = 0) -> Mutation:
    """Take out the statements that match, all or the first `count`."""
    return lambda ptx: re.sub(rf"(?m)^\s*{pattern}[^;]*;", "", ptx, count=count)


def _last_without(pattern: str) -> Mutation:
    def mutate(ptx: str) -> str:
        *_, last = re.finditer(rf"(?m)^\s*{pattern}[^;]*;", ptx)
        return ptx[: last.start()] + ptx[last.end() :]

    return mutate


def _replaced(pattern: str, text: str) -> Mutation:
    return lambda ptx: re.sub(pattern, text, ptx)


def _other_swizzle(ptx: str) -> str:
    """Read with a swizzle of 64 bytes (2 in the descriptor's top bits) what was copied with one of 128 (1)."""

    def changed(match: re.Match[str]) -> str:
        number = int(match[2])
        assert number >> 62 == 1
        return match[1] + str(number ^ (3 << 62))

    return re.sub(r"(\t(?:or|add)\.[bs]64 \t%rd\d+, %rd\d+, )(46116862\d{11})", changed, ptx)


_COPIED = r"mbarrier\.try_wait\.parity\.shared\.b64 P1,[^;]*;"
_ANNOUNCED, _ARRIVED = r"mbarrier\.arrive\.expect_tx\.shared", r"mbarrier\.arrive\.release\.cta"

PRODUCT: dict[str, Mutation] = {
    "no proxy fence before the store": _without(r"fence\.proxy\.async"),
    "no wait for the tensor core": _without(r"wgmma\.wait_group"),
    "a wait that leaves one product": _replaced(r"(wgmma\.wait_group\.sync\.aligned\s+)0", r"\g<1>1"),
    "another swizzle": _other_swizzle,
    "a slot that is never given back": _without(_ARRIVED, 1),
    "the last slot of a tile is never given back": _last_without(_ARRIVED),
    "bytes that nobody announces": _without(_ANNOUNCED, 1),
    "no wait for the copies": _replaced(_COPIED, "setp.eq.b32 P1, 0, 0;"),
    "no barrier between warps and store": _replaced(r"(fence\.proxy\.async[^;]*;)[^;]*bar\.sync[^;]*;", r"\1"),
    "a tile overwritten before it is stored": _without(r"cp\.async\.bulk\.wait_group\.read"),
    "a kernel that ends before its stores": _without(r"cp\.async\.bulk\.wait_group \t"),
}
SPLIT: dict[str, Mutation] = {
    "no barrier between partial results and their sum": _without(_ARRIVED),
    "no wait for what other warpgroups leave": _replaced(_COPIED, "setp.eq.b32 P1, 0, 0;"),
    "bytes that nobody announces": _without(_ANNOUNCED, 1),
    "codes rounded towards zero": _replaced(r"cvt\.rni\.f32", "cvt.rzi.f32"),
}


ROW: dict[str, Mutation] = {
    "no proxy fence behind the codes": _without(r"fence\.proxy\.async"),
    "a warpgroup that does not wait for the other's codes": _replaced(_COPIED, "setp.eq.b32 P1, 0, 0;"),
    "codes of another part's steps": _replaced(r"@there (st\.shared)", r"\1"),
}


@pytest.fixture(scope="module")
def product() -> ProductRun:
    """Several tiles, five steps on a ring of three, outliers, a store for each warpgroup by the copy engine."""
    return product_run(Product(66, 192, 576, 36, 4, 4, True, MatmulTiles(64, 64, 3, 1, 1), cores=1))


@pytest.fixture(scope="module")
def split() -> SplitRun:
    return split_run(Split(3, 576, 36, 8, RmsNorm(1e-5), SplitTiles(2, 2)))


@pytest.fixture(scope="module")
def row() -> RowRun:
    return row_run(Row(Product(1, 72, 1384, 84, 4, 4, False, MatmulTiles(64, 8, 3, 1, 2)), Identity()))


def test_the_programs_are_right_as_they_are(product: ProductRun, split: SplitRun, row: RowRun) -> None:
    assert all(product.error(timing) <= 1 and split.problems(timing) == [] == row.problems(timing) for timing in OPPOSITE)


@pytest.mark.parametrize("name", PRODUCT)
def test_a_wrong_product_is_found(product: ProductRun, name: str) -> None:
    ptx = PRODUCT[name](product.compiled.ptx)
    assert ptx != product.compiled.ptx
    found = []
    for timing in OPPOSITE:
        try:
            found.append(product.error(timing, product.compiled.with_ptx(ptx)) > 1)
        except Fault:
            found.append(True)
    assert any(found)


@pytest.mark.parametrize("name", SPLIT)
def test_a_wrong_split_is_found(split: SplitRun, name: str) -> None:
    assert _is_found(split, SPLIT[name])


@pytest.mark.parametrize("name", ROW)
def test_a_wrong_row_is_found(row: RowRun, name: str) -> None:
    assert _is_found(row, ROW[name])


def _is_found(run: SplitRun | RowRun, mutate: Mutation) -> bool:
    ptx = mutate(run.compiled.ptx)
    assert ptx != run.compiled.ptx
    found = []
    for timing in OPPOSITE:
        try:
            found.append(bool(run.problems(timing, run.compiled.with_ptx(ptx))))
        except Fault:
            found.append(True)
    return any(found)


def test_sums_that_arrive_unannounced_are_found() -> None:
    """A K split over a cluster: the leader must wait for what the other part sends."""
    run = product_run(Product(8, 120, 640, 36, 4, 4, False, MatmulTiles(64, 8, 4, 1, 2)))
    ptx = _without(r"mbarrier\.arrive\.expect_tx\.release\.cluster", 1)(run.compiled.ptx)
    assert ptx != run.compiled.ptx
    for timing in OPPOSITE:
        with pytest.raises(Fault):
            run.error(timing, run.compiled.with_ptx(ptx))
    # Elements past the end of few rows are stored by nobody.
    everyone = re.sub(r"@(\w+) (st\.global)", r"\2", run.compiled.ptx)
    assert everyone != run.compiled.ptx
    with pytest.raises(Fault, match=r"past the end|in no array"):
        run.error(OPPOSITE[0], run.compiled.with_ptx(everyone))
