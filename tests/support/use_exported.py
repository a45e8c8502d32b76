"""What a user does with exported kernel repositories; run by test_hf_export.py in a bare Python.

    TRITON_INTERPRET=1 python3 use_exported.py FIRST TWIN NEXT CHECKPOINT PACKAGES

FIRST and TWIN are the same build in two folders, NEXT another version of it. PACKAGES is a folder
with the project, which is on no path until all three have been used.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import silu
from transformers import Llama4ForCausalLM
from transformers.models.llama4 import modeling_llama4

from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)

first, twin, following, checkpoint, packages = map(Path, sys.argv[1:])
torch.set_num_threads(1)


def use_functions(kernel):
    """rms_norm and moe against plain torch, at odd sizes; the bits of moe in bf16."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 37), torch.randn(37)
    expected = torch.nn.functional.rms_norm(x, (37,), weight, 1e-5)
    torch.testing.assert_close(kernel.rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-5)

    T, E, H, F = 5, 3, 40, 24
    x, logits = torch.randn(T, H), torch.randn(T, E)
    gate_up, down = torch.randn(E, H, 2 * F) / H**0.5, torch.randn(E, F, H) / F**0.5
    experts = kernel.Experts.from_hf(gate_up, down)
    out = kernel.moe(x, experts, top_k=1, logits=logits)
    expected = torch.empty_like(x)
    for t in range(T):
        score, e = logits[t].max(dim=0)
        gate, up = (score.sigmoid() * x[t] @ gate_up[e]).chunk(2)
        expected[t] = (silu(gate) * up) @ down[e]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    torch.manual_seed(1)
    x, gate_up, down = (torch.randn(s).bfloat16() for s in ((T, H), (E, H, 2 * F), (E, F, H)))
    return kernel.moe(x, kernel.Experts.from_hf(gate_up, down), top_k=2, logits=logits)


def use_layers(repository):
    """Logits of a tiny model before and after kernelize."""
    names = ("Llama4TextMoe", "Llama4TextRMSNorm", "Llama4TextMLP")
    model = Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 7))
    with torch.no_grad():
        before = model(tokens, output_router_logits=True)
    for name in names:
        replace_kernel_forward_from_hub(getattr(modeling_llama4, name), name)
    mapping = {
        name: {"cpu": LocalLayerRepository(repo_path=repository, layer_name=name)} for name in names
    }
    with use_kernel_mapping(mapping, inherit_mapping=False):
        model = kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
    replaced = [m for m in model.modules() if type(m).__name__ in names]
    assert replaced and all(m.forward.__func__.__module__.endswith(".layers") for m in replaced)
    with torch.no_grad():
        after = model(tokens, output_router_logits=True)
    # The project's threshold for logits near 1 in fp32; its models are held to the same.
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=2e-4)
    assert len(after.router_logits) == len(before.router_logits) > 0


try:
    import llama4_triton
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"the project is on the path: {llama4_triton.__file__}")

kernels = [get_local_kernel(path) for path in (first, twin, following)]
assert get_local_kernel(first / "build" / "torch-cuda").moe is kernels[0].moe
bits = [use_functions(kernel) for kernel in kernels]
use_layers(first)

sys.path.append(str(packages))
import llama4_triton  # noqa: E402

bits.append(use_functions(llama4_triton))
bits.append(use_functions(kernels[0]))
assert all(torch.equal(bits[0], other) for other in bits[1:])

ids = [kernel.moe.__module__.split(".")[0] for kernel in (*kernels, llama4_triton)]
assert ids[0] == ids[1] and len(set(ids)) == 3, ids
for namespace in set(ids):
    assert hasattr(getattr(torch.ops, namespace), "moe"), namespace
records = [sys.modules[f"{id}.kernels._records"].source_hash() for id in ids]
assert len(set(records)) == 1, "selftest records of one copy must count for the others"
print(" ".join(ids))
