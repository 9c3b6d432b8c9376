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


STRAY = "PRMT R73, R73, 0x7610, R27"


def _then(*lines: str) -> list[str]:
    """What is found where a permutation takes the upper half of R73 from the accumulator R27, and `lines` follow the wait."""
    listing = "\n".join(line if line.startswith(".L") else f"        /*00f0*/ {line} ;" for line in lines)
    return touched_too_early(CODE.replace("{late}", listing).format(early=f"        /*00f0*/ {STRAY} ;", other="", left=0))


def test_a_half_that_nobody_reads_is_no_touch() -> None:
    assert _code(early=STRAY) == []
    assert _then("PRMT R74, R73, 0x8880, RZ", "I2FP.F32.S32 R75, R74") == []
    assert _then("PRMT R74, R73, 0x9991, RZ") == []
    assert _then("MOV R73, RZ", "I2FP.F32.S32 R75, R73") == []  # written anew
    assert _then("@P0 BRA `(.L_x_9)", "EXIT", ".L_x_9:", "PRMT R74, R73, 0x1, R73") == []
    assert _then("PRMT R74, R80, 0x5410, R73") == []


def test_a_half_that_somebody_reads_is_a_touch() -> None:
    assert _then("I2FP.F32.S32 R75, R73") == [f"I2FP.F32.S32 R75, R73 looks at what {STRAY} took of R27"]
    assert _then("PRMT R74, R73, 0xaaa2, RZ") == [f"PRMT R74, R73, 0xaaa2, RZ looks at what {STRAY} took of R27"]
    assert _then("PRMT R74, R80, 0x7654, R73") != []
    assert _then("STS [R3], R73") == [f"STS [R3], R73 looks at what {STRAY} took of R27"]
    assert _then("@P0 MOV R73, RZ", "I2FP.F32.S32 R75, R73") != []  # sometimes written
    # Through a branch, back to what stands before.
    assert _then("BRA `(.L_x_2)", ".L_x_1:", "I2FP.F32.S32 R75, R73", "EXIT", ".L_x_2:", "BRA `(.L_x_1)") != []
    assert _then("BRA `(.L_x_2)", ".L_x_1:", "I2FP.F32.S32 R75, R73", ".L_x_2:", "MOV R73, RZ", "BRA `(.L_x_1)") == []


def test_only_a_half_may_stray() -> None:
    assert _code(early="PRMT R27, R73, 0x7610, R3") == ["PRMT R27, R73, 0x7610, R3 touches R27"]
    assert _code(early="PRMT R73, R73, 0x7654, R27") == ["PRMT R73, R73, 0x7654, R27 touches R27"]
    assert _code(early="PRMT R73, R73, 0x4210, R27") == ["PRMT R73, R73, 0x4210, R27 touches R27"]
    assert _code(early="PRMT R73, R73, R9, R27") == ["PRMT R73, R73, R9, R27 touches R27"]


def test_a_wait_may_leave_the_last_group() -> None:
    assert _code(late="I2FP.F32.S32 R5, R27", left=1) == ["I2FP.F32.S32 R5, R27 touches R27"]
