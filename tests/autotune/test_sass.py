"""Reading machine code, PTX and IR: excerpts of real output with known facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama4_triton.autotune import sass

pytestmark = pytest.mark.no_kernels

DATA = Path(__file__).parent / "data"
# A promoted FP8 loop as Triton 3.7.1 and cuobjdump print it for sm_90; shortened, jumps adapted.
FP8_LOOP = (DATA / "fp8_loop.sass").read_text()
FP8_PTX = (DATA / "fp8_loop.ptx").read_text()
FP8_IR = (DATA / "fp8_loop.ttgir").read_text()
USAGE = FP8_LOOP[: FP8_LOOP.index("        /*0000*/")]


def instructions(*texts):
    """SASS with an instruction every 16 bytes."""
    return USAGE + "".join(
        f"        /*{16 * i:04x}*/   {text} ;  /* 0x0 */\n" for i, text in enumerate(texts)
    )


def test_facts_of_an_fp8_loop():
    facts = sass.read(cuobjdump=FP8_LOOP, ptx=FP8_PTX, ttgir=FP8_IR)
    assert (facts.registers, facts.stack, facts.local) == (40, 16, 8)
    assert facts.spills == 2 and facts.instructions == 16
    assert facts.tensor == {"QGMMA.64x16x32.F32.E4M3.E4M3 SS": 2}
    assert facts.sass["wgmma"] == 2 and facts.sass["mma.sync"] == 0
    assert facts.ptx["add.f32"] == 2 and facts.ptx["wgmma commit"] == 1
    assert facts.ptx["float atomic"] == 1 and facts.ptx["inexact division"] == 1
    (loop,) = facts.main_loops
    assert loop.instructions == 10 and loop.dots == 1.0
    assert loop.waits == 1 and loop.wait_depth == 0 and not loop.serialised
    assert loop.copies == {"LDGSTS.128": 1, "LDGSTS.32": 1} and loop.copy_depth == 8
    assert loop.loads == {"LDG.U16": 1} and loop.load_bytes == 2
    assert loop.fp32_adds == 1
    assert sass.kernel_symbol(FP8_LOOP) == "fp8_matmul"


def test_control_bits():
    """Stall counts by hand: 0xfc8 -> 4, 0xfcc -> 6, 0xfe2 -> 1, 0xfe6 -> 3, 0xfc4 -> 2, 1."""
    (loop,) = sass.read_main_loops(FP8_LOOP)
    assert loop.issue_cycles == 4 + 6 + 1 + 3 + 2 + 1


def test_ir_says_what_an_iteration_moves():
    (loop,) = sass.read_ttgir_loops(FP8_IR)
    assert loop.dots == 1
    assert loop.copies == (("16x128xf8E4M3FN", 2048), ("64x128xf8E4M3FN", 8192))
    assert loop.loads == (("i32", 4), ("64xf32", 256)) and loop.load_bytes == 260
    assert (loop.groups, loop.pending) == (2, 8)
    # 8 groups pending are 4 iterations, and a fifth is issued: 6 stages.
    assert loop.bytes_in_flight(6) == 5 * (2048 + 8192)


def test_tma_is_sized_by_its_destination():
    ir = (DATA / "tma_loop.ttgir").read_text()
    (loop,) = sass.read_ttgir_loops(ir)
    assert loop.copies == (("128x64xbf16", 16_384),) and loop.dots == 1
    assert loop.bytes_in_flight(4) == 3 * 16_384


def test_only_innermost_ir_loops_count():
    ir = """
    scf.for %t = %c0 to %n step %c1 : i32 {
      %x = tt.load %p : tensor<64x!tt.ptr<f32>, #b> loc(#loc1)
      scf.for %k = %c0 to %K step %c1 : i32 {
        %d = tt.dot %a, %b, %c : tensor<16x16xf16> loc(#loc1)
      } loc(#loc2)
      %e = tt.dot %a, %b, %c : tensor<16x16xf16> loc(#loc1)
    } loc(#loc2)
    """
    (loop,) = sass.read_ttgir_loops(ir)
    assert loop.dots == 1 and loop.loads == ()


RS = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR4].tnspB, R24"
SS = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], RZ, !UPT"
TENSOR = {
    RS: "HGMMA.64x128x16.F32.BF16 RS",
    SS: "HGMMA.64x64x16.F32.BF16 SS",
    "HMMA.16816.F32.BF16 R32, R36.reuse, R28, R32": "HMMA.16816.F32.BF16",
    "QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4": "QMMA.16832.F32.E4M3.E4M3",
    "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], tmem[UR14], idesc[UR15], UP0": "UTCHMMA",
    "IMAD R1, R2, R3, R4": None,
}


@pytest.mark.parametrize("text", TENSOR)
def test_tensor_core_instructions_are_named(text):
    facts = sass.read(cuobjdump=instructions(text), ptx="", ttgir="")
    assert facts.tensor == ({TENSOR[text]: 1} if TENSOR[text] else {})


def test_serialised_code_waits_after_each_instruction():
    ptx = "wgmma.mma_async.sync.aligned.m64n64k16.f32;\n" * 2 + "wgmma.commit_group;\n"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    (good,) = sass.read_main_loops(instructions(SS, SS, wait, "@P0 BRA 0x0", "EXIT"), ptx)
    assert good.dots == 1 and good.waits == 1 and not good.serialised
    (bad,) = sass.read_main_loops(instructions(SS, wait, SS, wait, "@P0 BRA 0x0", "EXIT"), ptx)
    assert bad.dots == 1 and bad.waits == 2 and bad.serialised
    (unrolled,) = sass.read_main_loops(
        instructions(SS, SS, wait, SS, SS, wait, "@P0 BRA 0x0", "EXIT"), ptx
    )
    assert unrolled.dots == 2 and not unrolled.serialised


def test_dots_of_two_shapes():
    """Two kinds of dots in a loop, of 2 and 1 instructions each: 3 instructions are 2 dots."""
    ptx = (
        "wgmma.mma_async.sync.aligned.m64n64k16.f32;\n" * 2
        + "wgmma.commit_group;\n"
        + "wgmma.mma_async.sync.aligned.m64n128k16.f32;\nwgmma.commit_group;\n"
    )
    (loop,) = sass.read_main_loops(instructions(SS, SS, RS, "@P0 BRA 0x0", "EXIT"), ptx)
    assert loop.dots == 2


def test_a_spinning_wait_out_of_line_is_no_loop_of_its_own():
    """What waits for a barrier is moved behind the kernel and branches back into the loop."""
    code = instructions(
        "MOV R1, R2",  # 00
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",  # 10: the loop begins
        "@!P0 BRA 0x70",  # 20
        SS,  # 30
        "@P1 BRA 0x10",  # 40
        "LDG.E R1, desc[UR4][R2.64]",  # 50
        "EXIT",  # 60
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",  # 70: out of line
        "@!P0 BRA 0x70",  # 80
        "BRA 0x30",  # 90
    )
    (loop,) = sass.read_main_loops(code)
    assert loop.instructions == 7 and loop.loads == {}
    assert loop.tensor == {TENSOR[SS]: 1}


def test_nested_loops():
    code = instructions(
        "LDG.E.64 R1, desc[UR4][R2.64]",  # 00: outer
        SS,  # 10: inner
        "@P1 BRA 0x10",  # 20
        "@P2 BRA 0x0",  # 30
        "LDG.E.64 R1, desc[UR4][R2.64]",  # 40: a loop without tensor cores
        "BRA.U UP0, 0x40",  # 50
        "EXIT",
    )
    (loop,) = sass.read_main_loops(code)
    assert loop.instructions == 2 and loop.loads == {}


def test_widths():
    loads = ("LDG.E", "LDG.E.64", "LDG.E.128.CONSTANT", "LDG.E.U8", "LD.E.S16")
    body = [f"{load} R1, desc[UR4][R2.64]" for load in loads]
    (loop,) = sass.read_main_loops(instructions(SS, *body, "@P1 BRA 0x0", "EXIT"))
    assert loop.loads == {"LD.S16": 1, "LDG.128": 1, "LDG.32": 1, "LDG.64": 1, "LDG.U8": 1}
    assert loop.load_bytes == 4 + 8 + 16 + 1 + 2


@pytest.mark.parametrize("text", ["", USAGE + USAGE], ids=["none", "two"])
def test_usage_must_be_of_one_kernel(text):
    with pytest.raises(ValueError, match="cuobjdump must print the usage of one kernel"):
        sass.read_usage(text)
