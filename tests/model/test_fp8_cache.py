"""The model on e4m3 pools: logits beside those of fp32 pools, and what attention is given."""

from __future__ import annotations

import pytest
import torch
from support.tiny_configs import CASES, build, make_tokens

from llama4_triton.kernels.paged_kv import E4M3
from llama4_triton.model import attention, llama4
from llama4_triton.model.cache import CacheFormat, KVCache, prefill_blocks

pytestmark = pytest.mark.unsanitized


@pytest.fixture
def calls(monkeypatch):
    """(operator, type of q, type of the cache, layout, kind of scales) of every call."""
    seen = set()
    for name in ("attention_prefill", "attention_decode"):
        real = getattr(attention, name)

        def call(q, kv, *args, real=real, name=name, **kwargs):
            seen.add((name, q.dtype, kv.k_cache.dtype, kv.layout, kv.scale_kind))
            return real(q, kv, *args, **kwargs)

        monkeypatch.setattr(attention, name, call)
    return seen


def _logits(model, config, tokens, format, device):
    """Of every token: a prefill in blocks, and a decode step for the last one."""
    cache = KVCache.for_lengths(
        config, [len(tokens)], step_tokens=8, aligned=True, page_size=4, dtype=torch.float32,
        format=format, device=device,
    )  # fmt: skip
    out = []
    for begin, end in [*prefill_blocks(config, len(tokens) - 1), (len(tokens) - 1, len(tokens))]:
        out.append(model(cache.step([tokens[begin:end]], logits="all"), cache))
    return torch.cat(out)


@pytest.mark.parametrize("scales", ["token", "head"])
@pytest.mark.parametrize("layout", ["nhd", "transposed_v"])
def test_logits_are_those_of_fp32_pools_but_for_the_rounding(device, calls, layout, scales):
    """e4m3 has 4 significant bits, 2.6 % rms; of values of K, V and q it moves logits by less.

    Decode wants chunks of whole tiles in layout transposed_v, which those of a tiny model are not:
    its local pool stays in fp32 there.
    """
    config = CASES["all-dense"]  # a router's choice between near ties would be a jump
    model = build(llama4.Llama4, config).to(device)
    (tokens,) = make_tokens(config, [19])
    local = E4M3 if layout == "nhd" else torch.float32
    format = CacheFormat(global_dtype=E4M3, local_dtype=local, scales=scales, layout=layout)
    got = _logits(model, config, tokens, format, device)
    quantized = {call for call in calls if call[2] == E4M3}
    assert quantized == {
        ("attention_prefill", E4M3, E4M3, layout, scales),
        ("attention_decode", torch.float32, E4M3, layout, scales),
    }
    assert (len(calls) > len(quantized)) == (layout == "transposed_v")
    want = _logits(model, config, tokens, None, device)
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < 0.05, error
    assert float((got[-1] - want[-1]).norm() / want[-1].norm()) < 0.05  # by decode alone
