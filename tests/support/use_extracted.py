"""What a user does with extracted files; run by test_extract.py in a bare Python.

    TRITON_INTERPRET=1 python3 use_extracted.py FOLDER

FOLDER has one file per operator. All are imported, and some are run in fp32, at odd sizes, against
plain torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

torch.set_num_threads(1)
torch.manual_seed(0)
close = dict(rtol=1e-5, atol=1e-5)  # fp32, sums of at most 48 terms near 1 in another order


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


assert importlib.util.find_spec("llama4_triton") is None, "the project is on the path"
lone = {path.stem: load(path) for path in sorted(Path(sys.argv[1]).glob("*.py"))}

x, weight = torch.randn(3, 37), torch.randn(37)
expected = rms_norm(x, (37,), weight, 1e-5)
torch.testing.assert_close(lone["rms_norm"].rms_norm(x, weight, 1e-5), expected, **close)
gate, up = torch.randn(2, 3, 37)
torch.testing.assert_close(lone["swiglu"].swiglu(gate, up), silu(gate) * up, **close)
rows = torch.tensor([2, 0, 2], dtype=torch.int32)
assert torch.equal(lone["gather_rows"].gather_rows(x, rows), x[rows.long()])

T, E, H, F, top_k = 5, 3, 40, 24, 2
x, logits = torch.randn(T, H), torch.randn(T, E)
gate_up, down = torch.randn(E, H, 2 * F) / H**0.5, torch.randn(E, F, H) / F**0.5
top, ids = logits.topk(top_k)
routing = lone["route"].route(logits, top_k)
assert torch.equal(routing.expert_ids.long(), ids)
torch.testing.assert_close(routing.expert_weights, top.sigmoid(), **close)

z = torch.empty(T, top_k, F)
for t in range(T):
    for k in range(top_k):
        halves = (top[t, k].sigmoid() * x[t] @ gate_up[ids[t, k]]).chunk(2)
        z[t, k] = silu(halves[0]) * halves[1]
out = torch.stack([sum(z[t, k] @ down[ids[t, k]] for k in range(top_k)) for t in range(T)])
for name in ("grouped_gemm_swiglu", "grouped_gemm_combine"):
    module = lone[name]
    routing = module.sort_by_expert(ids.int(), top.sigmoid(), E)
    experts = module.Experts.from_hf(gate_up, down)
    slots = routing.row_slot.long()  # of each row in expert order
    in_order = z.view(T * top_k, F)[slots]
    if name == "grouped_gemm_swiglu":
        result = module.grouped_gemm_swiglu(x, experts, routing)
        torch.testing.assert_close(result[: len(in_order)], in_order, **close)
    else:
        result = module.grouped_gemm_combine(in_order, experts, routing)
        torch.testing.assert_close(result, out, **close)
experts = lone["moe"].Experts.from_hf(gate_up, down)
result = lone["moe"].moe(x, experts, top_k=top_k, logits=logits)
torch.testing.assert_close(result, out, **close)

# One sequence of 19 tokens, of which the last 3 are new; 4 heads on 2 KV heads, pages of 8 tokens.
q, k, v = torch.randn(3, 4, 16), torch.randn(24, 2, 16), torch.randn(24, 2, 16)
pages = dict(k_cache=k.view(3, 8, 2, 16), v_cache=v.view(3, 8, 2, 16))
table, lens = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([19], dtype=torch.int32)
wide = [y[:19].repeat_interleave(2, dim=1).transpose(0, 1) for y in (k, v)]
mask = torch.arange(19)[None, :] <= torch.arange(16, 19)[:, None]
expected = scaled_dot_product_attention(q.transpose(0, 1), *wide, mask).transpose(0, 1)
module = lone["attention_prefill"]
kv = module.PagedKV(**pages, block_table=table)
result, _ = module.attention_prefill(q, kv, torch.tensor([0, 3], dtype=torch.int32), lens)
torch.testing.assert_close(result, expected, **close)
module = lone["attention_decode"]
kv = module.PagedKV(**pages, block_table=table)
result, _ = module.attention_decode(q[2:], kv, lens)
torch.testing.assert_close(result, expected[2:], **close)

for name, call in (
    ("rms_norm", lambda m: m.rms_norm(torch.ones(1, 8).bfloat16(), torch.ones(8).bfloat16(), 0.0)),
    ("quantize_rowwise", lambda m: m.quantize_rowwise(torch.ones(1, 8))),
):
    try:
        call(lone[name])
    except ValueError as error:
        assert "tensors must be fp32 or fp16, got torch." in str(error), error
    else:
        raise SystemExit(f"{name}: the stock interpreter computed what it cannot")
print(len(lone))
