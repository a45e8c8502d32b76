"""Llama 4 text model in plain PyTorch: the definition that `llama4.py` is held against.

Same class and method names as the kernel twin, so that a diff of the two files shows only which
operator replaces which lines. Parameters have the names and layouts of Hugging Face's state dict.
It rounds where transformers' eager code rounds (the scores only with parity="hf"), and reads like
the specification: it loops over sequences and experts, and it synchronises. It never imports
Triton.

Letters: T tokens of all sequences packed end to end, B sequences, H hidden, V vocabulary,
Hq query heads, Hkv key/value heads, D head dimension, E experts, k = top_k, F expert width.
dt is the model's data type. `x` is the output of the last block, `h` the residual stream that it
still has to be added to: every norm does that addition first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .cache import KVCache, LayerKV, Step
from .config import Llama4Config
from .fp8_reference import e4m3_expert
from .presets import Parity, parity_of

__all__ = ["Llama4", "forced_routing", "recorded_routing", "rope_frequencies"]

# expert ids (T, k) int32, most wanted first, and their weights (T, k)
Routing = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised h, h) with h = x + residual; two roundings after the addition's own."""
        h = x if residual is None else residual + x
        return _rms(h, self.eps) * self.weight, h


class Rotary:
    """cos and sin of every token's angles, in fp32.

    Positions count from the start of the chunk by default. RoPE is relative and a RoPE layer
    never looks out of its chunk, so this is exact, and unlike fp32(p) * inv_freq with the
    absolute p, which is what other engines do, it keeps its precision at any length.
    """

    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        self.period = config.attention_chunk_size if parity.rope_positions == "chunk" else None
        self.inv_freq = rope_frequencies(config)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.period is not None:
            positions = positions % self.period
        angles = positions.float()[:, None] * self.inv_freq.to(positions.device)  # (T, D / 2)
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    def __init__(self, config: Llama4Config, layer: int) -> None:
        super().__init__()
        self.config, self.use_rope = config, config.is_rope_layer(layer)
        H, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(H, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=bias)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], kv: LayerKV, step: Step
    ) -> torch.Tensor:
        config, heads = self.config, (x.shape[0], -1, self.config.head_dim)
        q = self.q_proj(x).view(heads)  # (T, Hq, D)
        k = self.k_proj(x).view(heads)  # (T, Hkv, D)
        v = self.v_proj(x).view(heads)  # (T, Hkv, D)
        if self.use_rope:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
            if config.use_qk_norm:
                q, k = _rms(q, config.rms_norm_eps), _rms(k, config.rms_norm_eps)
        elif config.attn_temperature_tuning:
            q = (q * _temperature(config, step.temperature_positions)[:, None, None]).to(q.dtype)
        kv.k_cache.flatten(0, 1)[kv.slot_mapping] = k
        kv.v_cache.flatten(0, 1)[kv.slot_mapping] = v
        chunk_size = (config.attention_chunk_size or 0) if self.use_rope else 0
        out = _attention(q, kv, step, chunk_size)  # (T, Hq, D)
        return self.o_proj(out.flatten(1))


class Router(nn.Linear):
    """Top-k on the raw logits, then the sigmoid of the chosen ones; no softmax anywhere."""

    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)
        self.parity = parity
        self.top_k = config.num_experts_per_tok
        self.forced: Routing | None = None  # set by forced_routing()

    def forward(self, x: torch.Tensor) -> Routing:  # type: ignore[override]
        if self.forced is not None:
            return self.forced
        logits = F.linear(x, self.weight)  # (T, E) rounded to dt
        logits = logits.masked_fill(logits.isnan(), -math.inf)
        # A stable sort gives ties to the lowest expert; torch.topk promises no order.
        top, expert_ids = logits.sort(dim=-1, descending=True, stable=True)
        expert_weights = top[:, : self.top_k].float().sigmoid()
        rounded = expert_weights.to(self.parity.score_rounding(x) or torch.float32)
        return expert_ids[:, : self.top_k].int(), rounded


class Experts(nn.Module):
    """gate_up_proj (E, H, 2F), gate first, and down_proj (E, F, H).

    In e4m3 (fp8_reference.py) with gate_up_scale (E, 2F) and down_scale (E, H), fp32.
    """

    gate_up_scale: nn.Parameter | None
    down_scale: nn.Parameter | None

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        E, H, ffn = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(E, H, 2 * ffn))
        self.down_proj = nn.Parameter(torch.zeros(E, ffn, H))
        self.register_parameter("gate_up_scale", None)
        self.register_parameter("down_scale", None)

    def forward(self, x: torch.Tensor, routing: Routing, residual: torch.Tensor) -> torch.Tensor:
        """residual + the sum of each token's experts; the weight multiplies the expert's input."""
        expert_ids, expert_weights = routing
        out = torch.zeros_like(x, dtype=torch.float32)
        for e in range(self.gate_up_proj.shape[0]):
            rows, slots = (expert_ids == e).nonzero(as_tuple=True)
            if len(rows) == 0:
                continue
            if self.gate_up_scale is not None and self.down_scale is not None:
                gate_up = self.gate_up_proj[e].float() * self.gate_up_scale[e]
                down = self.down_proj[e].float() * self.down_scale[e]
                y = e4m3_expert(x[rows], expert_weights[rows, slots], gate_up, down)
                out.index_add_(0, rows, y)
                continue
            xe = (x[rows] * expert_weights[rows, slots, None]).to(x.dtype)
            gate, up = (xe @ self.gate_up_proj[e]).chunk(2, dim=-1)
            out.index_add_(0, rows, ((up * F.silu(gate)) @ self.down_proj[e]).float())
        return residual + out.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: Llama4Config, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """k routed experts, and a shared one that every token meets with weight 1."""

    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        super().__init__()
        self.router = Router(config, parity)
        self.experts = Experts(config)
        self.shared_expert = MLP(config, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.router(x), residual=self.shared_expert(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Llama4Config, layer: int, parity: Parity) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.feed_forward = (
            MoE(config, parity)
            if config.is_moe_layer(layer)
            else MLP(config, config.intermediate_size_mlp or 0)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor | None,
        rope: tuple[torch.Tensor, torch.Tensor],
        kv: LayerKV,
        step: Step,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, h) of the next layer; the hidden state transformers returns is their sum."""
        x, h = self.input_layernorm(x, h)
        x = self.self_attn(x, rope, kv, step)
        x, h = self.post_attention_layernorm(x, h)
        return self.feed_forward(x), h


class Decoder(nn.Module):
    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, parity) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config, parity)

    def forward(self, step: Step, cache: KVCache) -> torch.Tensor:
        x: torch.Tensor = self.embed_tokens(step.input_ids)  # (T, H)
        h: torch.Tensor | None = None
        rope = self.rotary(step.positions)
        for index, layer in enumerate(self.layers):
            x, h = layer(x, h, rope, cache.layer(index, step), step)
        if step.logits_rows is not None and h is not None:
            x, h = x[step.logits_rows], h[step.logits_rows]
        return self.norm(x, h)[0]


class Llama4(nn.Module):
    """The text model.

    Args:
        parity: which engine to follow where they differ: a preset's name ("default", "hf",
            "vllm", "sglang", "meta"), with fields changed, or a `Parity` (presets.py).
    Raises:
        ValueError: an unknown preset, field or choice.
    """

    def __init__(self, config: Llama4Config, *, parity: Parity | str = "default") -> None:
        super().__init__()
        self.parity = parity_of(parity)
        self.config = config = self.parity.applied(config)
        self.model = Decoder(config, self.parity)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def forward(self, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits (N, V) in dt of the tokens `step` asks for; K and V go into `cache`."""
        return self.lm_head(self.model(step, cache))


def rope_frequencies(config: Llama4Config) -> torch.Tensor:
    """inv_freq (D / 2,) in fp32: theta^(-2i/D), with the slow ones divided if RoPE is scaled."""
    D = config.head_dim
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
    if low == high:  # Scout: a hard switch; the blend below would be 0 / 0
        return scaled
    blend = (context / wavelength - low) / (high - low)
    smooth = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, smooth, scaled)


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the interleaved pairs (x[2i], x[2i + 1]) of every head; x (T, heads, D)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def _temperature(config: Llama4Config, positions: torch.Tensor) -> torch.Tensor:
    """Factor on a NoPE layer's query, fp32: it steps up every floor_scale positions."""
    steps = torch.floor((positions.float() + 1.0) / config.floor_scale)
    return torch.log1p(steps) * config.attn_scale + 1.0


def _attention(q: torch.Tensor, kv: LayerKV, step: Step, chunk_size: int) -> torch.Tensor:
    """Causal attention from the pages, (T, Hq, D); with a chunk, only inside the query's chunk."""
    page_size, D = kv.k_cache.shape[1], q.shape[-1]
    group = q.shape[1] // kv.k_cache.shape[2]
    out = torch.empty_like(q)
    cu_seqlens = step.cu_seqlens_q.tolist()
    for b, length in enumerate(step.seq_lens.tolist()):
        rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
        p = torch.arange(length - (rows.stop - rows.start), length, device=q.device)
        start = int(p[0]) // chunk_size * chunk_size if chunk_size else 0
        t = torch.arange(start, length, device=q.device)
        slots = kv.block_table[b, t // page_size].long() * page_size + t % page_size
        k = kv.k_cache.flatten(0, 1)[slots].repeat_interleave(group, dim=1)  # (n, Hq, D)
        v = kv.v_cache.flatten(0, 1)[slots].repeat_interleave(group, dim=1)
        visible = t <= p[:, None]
        if chunk_size:
            visible &= t // chunk_size == p[:, None] // chunk_size
        scores = q[rows].transpose(0, 1) @ k.permute(1, 2, 0) * D**-0.5  # (Hq, rows, n)
        scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
        out[rows] = (scores.softmax(dim=-1) @ v.transpose(0, 1)).transpose(0, 1)
    return out


@contextmanager
def forced_routing(model: nn.Module, routing: Mapping[int, Routing]) -> Iterator[None]:
    """Inside, layer i of `model` (this one or the twin) takes routing[i] instead of its router's.

    In bf16 a rounding difference can send a token to another expert, which changes everything
    after it; an end-to-end comparison must therefore fix the routing.
    """
    routers = {i: model.get_submodule(f"model.layers.{i}.feed_forward.router") for i in routing}
    for i, router in routers.items():
        router.forced = routing[i]  # type: ignore[assignment]
    try:
        yield
    finally:
        for router in routers.values():
            router.forced = None  # type: ignore[assignment]


@contextmanager
def recorded_routing(model: Llama4) -> Iterator[dict[int, Routing]]:
    """The routing of every MoE layer in the last forward call made inside."""
    routing: dict[int, Routing] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        if model.config.is_moe_layer(i):
            router = layer.get_submodule("feed_forward.router")

            def record(_module: nn.Module, _inputs: object, out: Routing, i: int = i) -> None:
                routing[i] = out

            handles.append(router.register_forward_hook(record))
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()
