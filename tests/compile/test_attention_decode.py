"""Forms of attention_decode that the models' steps do not ask for, compiled for sm_90 and gated.

Both layouts and kinds of scales of e4m3, rows of a verification, head_dim 64 and 256, and pages of
less than a key tile and of more, and rows without pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.attention import dense_rows

from llama4_triton.autotune.compile import CompileFailed
from llama4_triton.autotune.gates import requirements, violations
from llama4_triton.autotune.recorder import record
from llama4_triton.bench.e4m3_cache import E4M3
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.paged_kv import PagedKV

pytestmark = pytest.mark.compiled_only

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32


@dataclass(frozen=True, kw_only=True)
class Form:
    D: int = 128
    page_size: int = 64
    max_q_len: int = 1
    group: int = 5
    cache: torch.dtype = E4M3
    kind: str = "head"
    layout: str = "transposed_v"
    blocks: int = 2  # per SM, at least

    @property
    def in_e4m3(self):
        """Whether e4m3 is what the tensor cores multiply."""
        return self.cache == E4M3 and self.layout == "transposed_v"

    def launch(self):
        launches = record(self._call).launches
        return next(x for x in launches if x.name == "_attention_decode_kernel")

    def _call(self):
        def empty(*shape, dtype=F32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        B, pages, Hkv = 4, 256, 2
        nhd = (pages, self.page_size, Hkv, self.D)
        transposed = (pages, Hkv, self.D, self.page_size)
        scales = nhd[:3] if self.kind == "token" else (Hkv,)
        has_scale = self.cache == E4M3
        kv = PagedKV(
            k_cache=empty(*nhd, dtype=self.cache),
            v_cache=empty(*(nhd if self.layout == "nhd" else transposed), dtype=self.cache),
            block_table=empty(B, 128, dtype=I32),
            k_scale=empty(*scales) if has_scale else None,
            v_scale=empty(*scales) if has_scale else None,
            layout=self.layout,
        ) if self.layout != "dense" else dense_rows(B, Hkv, self.D)  # fmt: skip
        several = dict(cu_seqlens_q=empty(B + 1, dtype=I32), max_q_len=self.max_q_len)
        attention_decode(
            empty(B * self.max_q_len, self.group * Hkv, self.D, dtype=BF16), kv,
            empty(B, dtype=I32), chunk_size=8192, **(several if self.max_q_len > 1 else {}),
        )  # fmt: skip


FORMS = {
    "e4m3": Form(blocks=3),
    "e4m3-token": Form(kind="token", blocks=3),
    "e4m3-nhd": Form(layout="nhd"),
    "e4m3-nhd-token": Form(layout="nhd", kind="token"),
    "e4m3-page-16": Form(page_size=16),
    "e4m3-page-256": Form(page_size=256),
    "e4m3-D64": Form(D=64),
    "e4m3-rows-32": Form(max_q_len=4, blocks=1),
    "e4m3-rows-64": Form(max_q_len=8, blocks=1),
    "bf16": Form(cache=BF16, layout="nhd"),
    "bf16-D64": Form(cache=BF16, layout="nhd", D=64),
    "bf16-D256": Form(cache=BF16, layout="nhd", D=256, blocks=1),
    "bf16-page-16": Form(cache=BF16, layout="nhd", page_size=16),
    "bf16-page-256": Form(cache=BF16, layout="nhd", page_size=256),
    "bf16-group-16": Form(cache=BF16, layout="nhd", group=16),
    "bf16-rows-32": Form(cache=BF16, layout="nhd", max_q_len=4, blocks=1),
    "bf16-rows-64": Form(cache=BF16, layout="nhd", max_q_len=8, blocks=1),
    "bf16-transposed": Form(cache=BF16),
    "bf16-dense": Form(cache=BF16, layout="dense"),
    "bf16-dense-rows-32": Form(cache=BF16, layout="dense", max_q_len=4, blocks=1),
}


@pytest.fixture(scope="module")
def reports(compile_lane):
    launches = {name: form.launch() for name, form in FORMS.items()}
    found = compile_lane(list(launches.values()))
    return {name: (launch, found[launch.binary()]) for name, launch in launches.items()}


@pytest.mark.parametrize("name", FORMS)
def test_passes_every_gate(reports, name):
    launch, report = reports[name]
    assert not isinstance(report, CompileFailed), str(report)
    required = requirements(launch)
    assert required.wgmma and required.pipelined and required.max_stack == 0
    assert required.e4m3 == FORMS[name].in_e4m3
    assert not violations(report, required), str(report)


@pytest.mark.parametrize("name", FORMS)
def test_blocks_per_sm(reports, name):
    """What docs/attention.md promises."""
    assert reports[name][1].occupancy.blocks >= FORMS[name].blocks
