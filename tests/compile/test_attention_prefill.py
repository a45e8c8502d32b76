"""Forms of attention_prefill that the models' steps do not ask for, compiled for sm_90 and gated.

e4m3 by both layouts and kinds of scales, head_dim 64, temperature, pages of less than a key tile
and of more, transposed values of 16 bits, and rows without pages.
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
from llama4_triton.kernels.attention_prefill import attention_prefill
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.rope import Temperature

pytestmark = pytest.mark.compiled_only

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class Form:
    D: int = 128
    page_size: int = 64
    T: int = 4096
    q: torch.dtype = E4M3
    cache: torch.dtype = E4M3
    kind: str = "head"
    layout: str = "transposed_v"
    temperature: bool = False

    def launch(self):
        (_, launch) = record(self._call).launches
        return launch

    def _call(self):
        def empty(*shape, dtype=F32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        pages, Hkv, Hq = 256, 2, 10
        nhd = (pages, self.page_size, Hkv, self.D)
        transposed = (pages, Hkv, self.D, self.page_size)
        scales = nhd[:3] if self.kind == "token" else (Hkv,)
        has_scale = self.cache == E4M3
        kv = PagedKV(
            k_cache=empty(*nhd, dtype=self.cache),
            v_cache=empty(*(nhd if self.layout == "nhd" else transposed), dtype=self.cache),
            block_table=empty(2, 128, dtype=torch.int32),
            k_scale=empty(*scales) if has_scale else None,
            v_scale=empty(*scales) if has_scale else None,
            layout=self.layout,
        ) if self.layout != "dense" else dense_rows(2, Hkv, self.D)  # fmt: skip
        scale = Temperature(attn_scale=0.1, floor_scale=8192.0) if self.temperature else None
        attention_prefill(
            empty(self.T, Hq, self.D, dtype=self.q), kv,
            empty(3, dtype=torch.int32), empty(2, dtype=torch.int32),
            q_scale=empty(self.T, Hq) if self.q == E4M3 else None,
            temperature=scale,
        )  # fmt: skip


FORMS = {
    "e4m3": Form(),
    "e4m3-temperature": Form(temperature=True),
    "e4m3-token": Form(kind="token"),
    "e4m3-nhd": Form(layout="nhd"),
    "e4m3-nhd-token": Form(layout="nhd", kind="token"),
    "e4m3-page-128": Form(page_size=128),
    "e4m3-page-16": Form(page_size=16),
    "e4m3-D64": Form(D=64),
    "e4m3-D256": Form(D=256),
    "e4m3-few": Form(T=32),
    "e4m3-few-nhd-token": Form(T=32, layout="nhd", kind="token"),
    "bf16-over-e4m3": Form(q=BF16, layout="nhd"),
    "bf16-over-e4m3-token": Form(q=BF16, kind="token"),
    "bf16-temperature": Form(q=BF16, cache=BF16, layout="nhd", temperature=True),
    "bf16-D64": Form(q=BF16, cache=BF16, layout="nhd", D=64),
    "bf16-D256": Form(q=BF16, cache=BF16, layout="nhd", D=256),
    "bf16-page-128": Form(q=BF16, cache=BF16, layout="nhd", page_size=128),
    "bf16-page-16": Form(q=BF16, cache=BF16, layout="nhd", page_size=16),
    "bf16-transposed": Form(q=BF16, cache=BF16),
    "bf16-dense": Form(q=BF16, cache=BF16, layout="dense"),
    "bf16-dense-D64": Form(q=BF16, cache=BF16, layout="dense", D=64),
    "bf16-dense-rows-64": Form(q=BF16, cache=BF16, layout="dense", T=100),
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
    assert required.e4m3 == (FORMS[name].q == E4M3)
    assert not violations(report, required), str(report)


@pytest.mark.parametrize("name", FORMS)
def test_q_is_read_from_shared_memory(reports, name):
    """The first product of a key tile: a q in registers would serialise it."""
    _, report = reports[name]
    assert any(kind.endswith("SS") for kind in report.facts.tensor), report.facts.tensor
