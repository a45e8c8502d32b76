"""A report of compiled code that passes every gate, to be changed by tests."""

from __future__ import annotations

from llama4_triton.autotune import sass
from llama4_triton.autotune.compile import CompiledReport
from llama4_triton.autotune.launches import Binary

__all__ = ["BINARY", "FACTS", "GOOD", "IR_LOOP", "LOOP"]

LOOP = sass.Loop(
    instructions=100,
    issue_cycles=200,
    tensor={"QGMMA.64x128x32.F32.E4M3.E4M3 SS": 4},
    dots=1.0,
    waits=1,
    wait_depth=1,
    copies={"LDGSTS.128": 8},
    copy_depth=4,
    loads={},
    fp32_adds=64,
)
IR_LOOP = sass.IrLoop(
    dots=1, copies=(("128x128xf8E4M3FN", 16_384),), loads=(("i32", 4),), groups=2, pending=4
)
FACTS = sass.Facts(
    registers=168,
    stack=0,
    local=0,
    spills=0,
    instructions=1000,
    tensor=LOOP.tensor,
    sass=dict.fromkeys(sass.SASS, 0) | {"wgmma": 4, "cp.async": 24},
    ptx=dict.fromkeys(sass.PTX, 0),
    main_loops=(LOOP,),
    ir_loops=(IR_LOOP,),
)
BINARY = Binary(kernel="m:_k", config=(), signature=("*bf16:16",), num_warps=8, num_stages=4)
GOOD = CompiledReport(
    binary=BINARY, arch="sm_90", shared=232_448, scratch=0, symbol="k", key="0", facts=FACTS
)
