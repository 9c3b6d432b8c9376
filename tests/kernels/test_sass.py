"""The reading of machine code finds an accumulator that is touched before its wait, and only that."""

from ptx.sass import touched_too_early

CODE = """
        /*0000*/                   IGMMA.64x8x32.S8.S8 R24, R28, gdesc[UR8], R24 ;
        /*0010*/                   IGMMA.64x8x32.S8.S8 R24, R32, gdesc[UR8], R24, gsb0 ;
        /*0020*/              @!P0 LDS.U16 R40, [R41+0x10] ;
{early}
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{left} ;
{late}
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R64, gdesc[UR8], R64, gsb0 ;
{other}
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   I2FP.F32.S32 R24, R24 ;
"""


def _code(early: str = "", late: str = "", other: str = "", left: int = 0) -> list[str]:
    lines = {
        name: f"        /*00f0*/                   {text} ;" if text else ""
        for name, text in {"early": early, "late": late, "other": other}.items()
    }
    return touched_too_early(CODE.format(**lines, left=left))


def test_code_that_waits_is_right() -> None:
    assert _code(early="IADD3 R28, R40, R41, RZ", late="I2FP.F32.S32 R5, R27", other="MOV R6, R24") == []


def test_an_accumulator_before_its_wait_is_found() -> None:
    assert _code(early="I2FP.F32.S32 R5, R27") == ["I2FP.F32.S32 R5, R27 touches R27"]
    assert _code(early="@P0 STS.64 [R3], R26") == ["STS.64 [R3], R26 touches R26"]
    assert _code(early="MOV R24, RZ") == ["MOV R24, RZ touches R24"]
    # R22 to R25 and R70.64, by the width of the access.
    assert _code(early="LDS.128 R22, [R3]") == ["LDS.128 R22, [R3] touches R24"]
    assert _code(other="FADD R1, R2, R70.64") == ["FADD R1, R2, R70.64 touches R70"]


def test_a_half_that_nobody_reads_is_no_touch() -> None:
    assert _code(early="PRMT R73, R73, 0x7610, R27") == []
    assert _code(early="PRMT R27, R73, 0x7610, R3") == ["PRMT R27, R73, 0x7610, R3 touches R27"]
    assert _code(early="PRMT R73, R73, 0x5410, R27") == ["PRMT R73, R73, 0x5410, R27 touches R27"]


def test_a_wait_may_leave_the_last_group() -> None:
    assert _code(late="I2FP.F32.S32 R5, R27", left=1) == ["I2FP.F32.S32 R5, R27 touches R27"]
