"""The model on e4m3 pools: what attention is given, with attention itself by the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_configs import CASES, build, make_tokens

from llama4_triton.kernels import reference
from llama4_triton.kernels.paged_kv import E4M3
from llama4_triton.model import llama4
from llama4_triton.model.cache import CacheFormat, KVCache, prefill_blocks

pytestmark = pytest.mark.unsanitized


def _wide(kv):
    """The pages as fp32 values, (num_pages, page_size, Hkv, D)."""
    v = kv.v_cache.float()
    if kv.layout == "transposed_v":
        v = reference.convert_layout(v, "nhd")
    k, scales = kv.k_cache.float(), (kv.k_scale[..., None], kv.v_scale[..., None])
    return replace(
        kv, k_cache=k * scales[0], v_cache=v * scales[1], k_scale=None, v_scale=None, layout="nhd"
    )


@pytest.fixture
def calls(monkeypatch):
    """Attention over e4m3 by the reference; the dtypes that it was given."""
    seen = []

    def prefill(q, kv, cu_seqlens_q, seq_lens, *, chunk_size, q_scale):
        seen.append((q.dtype, kv.k_cache.dtype, kv.layout, kv.scale_kind))
        q = q.float() * q_scale[..., None]
        return reference.attention_prefill(
            q, _wide(kv), cu_seqlens_q, seq_lens, chunk_size=chunk_size
        )

    def decode(q, kv, seq_lens, *, chunk_size, q_scale):
        seen.append((q.dtype, kv.k_cache.dtype, kv.layout, kv.scale_kind))
        q = q.float() * q_scale[..., None]
        return reference.attention_decode(q, _wide(kv), seq_lens, chunk_size=chunk_size)

    monkeypatch.setattr(llama4, "attention_prefill", prefill)
    monkeypatch.setattr(llama4, "attention_decode", decode)
    return seen


def _logits(model, config, tokens, format, device):
    cache = KVCache.for_lengths(
        config, [len(tokens)], step_tokens=8, aligned=True, page_size=4, dtype=torch.float32,
        format=format, device=device,
    )  # fmt: skip
    out = []
    for begin, end in [*prefill_blocks(config, len(tokens) - 1), (len(tokens) - 1, len(tokens))]:
        out.append(model(cache.step([tokens[begin:end]], logits="all"), cache))
    return torch.cat(out)


@pytest.mark.parametrize("scales", ["token", "head"])
def test_logits_are_those_of_fp32_pools_but_for_the_rounding(device, monkeypatch, calls, scales):
    """e4m3 has 4 significant bits, 2.6 % rms; of values of K, V and q it moves logits by less.

    Both layouts hold the same values, so the logits are the same bits.
    """
    config = CASES["all-dense"]  # a router's choice between near ties would be a jump
    model = build(llama4.Llama4, config).to(device)
    (tokens,) = make_tokens(config, [19])
    got = {}
    for layout in ("nhd", "transposed_v"):
        format = CacheFormat(global_dtype=E4M3, local_dtype=E4M3, scales=scales, layout=layout)
        got[layout] = _logits(model, config, tokens, format, device)
        assert set(calls) == {(E4M3, E4M3, layout, scales)}
        calls.clear()
    assert torch.equal(got["nhd"], got["transposed_v"])
    monkeypatch.undo()
    want = _logits(model, config, tokens, None, device)
    error = float((got["nhd"] - want).norm() / want.norm())
    assert 1e-4 < error < 0.05, error
