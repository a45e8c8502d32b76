"""What the adapter spares transformers, counted: products of experts, and memory of masks."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.tiny_hf import HF_CASES, text_model

from llama4_triton.bench.traffic import measure
from llama4_triton.engines import transformers_attention
from llama4_triton.engines.transformers import patch, unpatch
from llama4_triton.kernels.moe_plan import plan


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()


@pytest.mark.interpreter_only
def test_routed_products_are_those_of_the_chosen_experts():
    """transformers multiplies E times as much; here what is chosen, in whole tiles of rows."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    T, E, H, F = 600, 16, 128, 128
    sizes = dict(hidden_size=H, intermediate_size=F, num_local_experts=E)
    model = Llama4ForCausalLM(Llama4TextConfig(**(HF_CASES["scout"].to_hf() | sizes))).eval()
    layer = model.model.layers[0].feed_forward
    torch.nn.init.normal_(layer.router.weight)
    x, expert = torch.randn(T, H), 6 * H * F  # flops of a row and its expert
    with torch.no_grad(), patch(model, attention=False) as report:
        chosen = layer.router(x)[1].argmax(-1).bincount(minlength=E).tolist()
        report.unpatch()
        with FlopCounterMode(display=False) as stock:
            layer(x)
        patch(model, attention=False)
        traffic = measure(lambda: layer(x))
    assert stock.get_flop_counts()["Global"][torch.ops.aten.bmm] == E * T * expert
    tiles = plan(T=T, H=H, F=F, E=E, top_k=1, dtype=torch.float32)
    assert tiles.up.BLOCK_M == tiles.down.BLOCK_M
    block_m = tiles.up.BLOCK_M
    rows = sum(-(-count // block_m) * block_m for count in chosen)
    assert T < rows < T + E * block_m  # 1 / E of it, and the tiles' tails
    _, up, down = (launch.flops for launch in traffic.launches)
    shared = -(-T // block_m) * block_m
    assert up == (rows + shared) * expert * 2 // 3
    assert down == (rows + rows) * expert // 3  # the shared expert's with each routed tile


@contextlib.contextmanager
def _largest_allocation():
    """The most elements of any tensor that is made inside, outside of parameters."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    with Largest() as largest:
        yield largest


@pytest.mark.no_kernels
def test_masks_take_memory_by_tokens_not_by_their_square():
    """At 4096 tokens, padded: O(B * S) where transformers makes S * S."""
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    model = text_model("scout", "sdpa")
    S = 4096
    inputs = dict(
        config=model.config, inputs_embeds=torch.empty(2, S, 1), past_key_values=None,
        attention_mask=torch.ones(2, S).index_fill_(1, torch.arange(5), 0),
    )  # fmt: skip
    sizes = {}
    for name in ("sdpa", transformers_attention.NAME):
        if name != "sdpa":
            patch(model)
        for make in (create_causal_mask, create_chunked_causal_mask):
            with _largest_allocation() as largest:
                make(**inputs)
            sizes[name, make.__name__] = largest.numel
    assert sizes["sdpa", "create_chunked_causal_mask"] >= S * S
    for make in (create_causal_mask, create_chunked_causal_mask):
        assert sizes[transformers_attention.NAME, make.__name__] <= 2 * S
