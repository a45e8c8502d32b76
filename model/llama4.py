"""Llama 4 text model on the project's Triton kernels: a thin forward pass.

The same classes and methods as reference.py, which defines what this must compute; a diff of the
two files shows only which operator replaces which lines. No branch on data type, architecture or
executor: the operators choose; one on whether experts have scales, in `MoE`. Plain dense
projections (QKV, O, dense MLPs, LM head) are torch's, that is cuBLAS on a GPU.

Letters: T tokens of all sequences packed end to end, B sequences, H hidden, V vocabulary,
Hq query heads, Hkv key/value heads, D head dimension, E experts, k = top_k, F expert width.
dt is the model's data type. `x` is the output of the last block, `h` the residual stream that it
still has to be added to: every norm does that addition first.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from llama4_triton.kernels import expert_weights
from llama4_triton.kernels.gather_rows import gather_rows
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.rope import RopeScaling, RopeTable, rope_inv_freq
from llama4_triton.kernels.rope_and_cache import Temperature, rope_and_cache
from llama4_triton.kernels.swiglu import swiglu

from .attention import StepAttention
from .cache import KVCache, LayerKV, Step
from .config import Llama4Config
from .presets import Parity, parity_of

__all__ = ["Llama4"]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised h, h) with h = x + residual; two roundings after the addition's own."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)


class Rotary:
    """The cos/sin table of a step.

    Positions count from the start of the chunk by default, with one table of a chunk's length
    for every step; absolute ones need a table per step, as transformers builds it.
    """

    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        self.period = config.attention_chunk_size if parity.rope_positions == "chunk" else None
        scaling = config.rope_scaling
        self.inv_freq = rope_inv_freq(
            config.rope_theta,
            config.head_dim,
            scaling=RopeScaling(**asdict(scaling)) if scaling else None,
            device=torch.device("cpu"),
        )
        self.table: RopeTable | None = None

    def __call__(self, positions: torch.Tensor) -> RopeTable:
        if self.period is None:
            return RopeTable.for_positions(self.inv_freq.to(positions.device), positions)
        if self.table is None or self.table.cos_sin.device != positions.device:
            self.table = RopeTable.for_chunk(self.inv_freq.to(positions.device), self.period)
        return self.table


class Attention(nn.Module):
    def __init__(self, config: Llama4Config, layer: int) -> None:
        super().__init__()
        self.config, self.use_rope = config, config.is_rope_layer(layer)
        H, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(H, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=bias)
        self.temperature = Temperature(attn_scale=config.attn_scale, floor_scale=config.floor_scale)

    def forward(
        self,
        x: torch.Tensor,
        rope: RopeTable,
        kv: LayerKV,
        step: Step,
        attend: StepAttention,
    ) -> torch.Tensor:
        config, heads = self.config, (x.shape[0], -1, self.config.head_dim)
        q = self.q_proj(x).view(heads)  # (T, Hq, D)
        k = self.k_proj(x).view(heads)  # (T, Hkv, D)
        v = self.v_proj(x).view(heads)  # (T, Hkv, D)
        pages = kv.paged()
        tuned = config.attn_temperature_tuning and not self.use_rope
        queries = rope_and_cache(
            q,
            k,
            v,
            pages,
            step.positions if self.use_rope else step.temperature_positions,
            kv.slot_mapping,
            rope=rope if self.use_rope else None,
            qk_norm_eps=config.rms_norm_eps if self.use_rope and config.use_qk_norm else None,
            temperature=self.temperature if tuned else None,
            quantize_q=attend.quantizes_q(pages),
        )
        out = attend(queries, pages, config.chunk_size(self.use_rope), like=v)
        return self.o_proj(out.flatten(1))


class Router(nn.Linear):
    """Top-k on the raw logits, then the sigmoid of the chosen ones; no softmax anywhere."""

    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        super().__init__(config.hidden_size, config.num_local_experts, bias=False)
        self.parity = parity
        self.forced: tuple[torch.Tensor, torch.Tensor] | None = None  # forced_routing()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:  # type: ignore[override]
        """What the experts' operator routes x by."""
        if self.forced is not None:
            expert_ids, expert_weights = self.forced
            return dict(topk_ids=expert_ids, topk_weights=expert_weights.float())
        return dict(w_router=self.weight, score_dtype=self.parity.score_rounding(x))


class Experts(nn.Module):
    """gate_up_proj (E, H, 2F), gate first, and down_proj (E, F, H).

    In e4m3, from fp8_checkpoint.py, with gate_up_scale (E, 2F) and down_scale (E, H), fp32.
    """

    gate_up_scale: nn.Parameter | None
    down_scale: nn.Parameter | None

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        E, H, ffn = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(E, H, 2 * ffn))
        self.down_proj = nn.Parameter(torch.zeros(E, ffn, H))
        self.register_parameter("gate_up_scale", None)
        self.register_parameter("down_scale", None)

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        """Each token's experts, plus a shared one or a residual; the weight multiplies the input.

        options: of `moe`.
        """
        experts = expert_weights.Experts.from_hf(
            self.gate_up_proj, self.down_proj, self.gate_up_scale, self.down_scale
        )
        return moe(x, experts, top_k=self.top_k, **options)


class MLP(nn.Module):
    def __init__(self, config: Llama4Config, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class MoE(nn.Module):
    """k routed experts, and a shared one that every token meets with weight 1."""

    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        super().__init__()
        self.router = Router(config, parity)
        self.experts = Experts(config)
        self.shared_expert = MLP(config, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mlp, routing = self.shared_expert, self.router(x)
        if self.experts.gate_up_scale is not None:  # the shared expert is not in e4m3
            return self.experts(x, residual=mlp(x), **routing)
        shared = expert_weights.Experts.dense(
            mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        )
        return self.experts(x, shared=shared, **routing)


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
        rope: RopeTable,
        kv: LayerKV,
        step: Step,
        attend: StepAttention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, h) of the next layer; the hidden state transformers returns is their sum."""
        x, h = self.input_layernorm(x, h)
        x = self.self_attn(x, rope, kv, step, attend)
        x, h = self.post_attention_layernorm(x, h)
        return self.feed_forward(x), h


class Decoder(nn.Module):
    def __init__(self, config: Llama4Config, parity: Parity) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, parity) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config, parity)

    def forward(self, step: Step, cache: KVCache) -> torch.Tensor:
        x = gather_rows(self.embed_tokens.weight, step.input_ids)  # (T, H)
        h: torch.Tensor | None = None
        rope = self.rotary(step.positions)
        layers = [cache.layer(index, step) for index in range(len(self.layers))]
        attend = StepAttention(self.config, step, layers)
        for layer, kv in zip(self.layers, layers, strict=True):
            x, h = layer(x, h, rope, kv, step, attend)
        if step.logits_rows is not None and h is not None:
            x, h = gather_rows(x, step.logits_rows), gather_rows(h, step.logits_rows)
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
