"""llama4-triton: Triton kernels for Llama 4, and the model that stitches them together.

    from llama4_triton import rms_norm, route, Llama4

Names are imported on first use (PEP 562), so importing the package loads neither torch nor
Triton. The one exception: a process started with TRITON_INTERPRET=1 asked for Triton's
interpreter, and its shim (kernels/interpreter.py) must be in place before any kernel file is
imported, so it is installed here.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "gather_rows": "kernels.gather_rows",
    "rms_norm": "kernels.rms_norm",
    "add_rms_norm": "kernels.rms_norm",
    "PagedKV": "kernels.paged_kv",
    "RopeTable": "kernels.rope_and_cache",
    "Temperature": "kernels.rope_and_cache",
    "rope_and_cache": "kernels.rope_and_cache",
    "convert_layout": "kernels.convert_layout",
    "Routing": "kernels.routing",
    "route": "kernels.routing",
    "sort_by_expert": "kernels.routing",
    "router": "kernels.router",
    "Experts": "kernels.expert_weights",
    "Projection": "kernels.expert_weights",
    "quantize_experts": "kernels.expert_weights",
    "grouped_gemm_swiglu": "kernels.grouped_gemm",
    "grouped_gemm_combine": "kernels.grouped_gemm_combine",
    "moe": "kernels.moe",
    "swiglu": "kernels.swiglu",
    "quantize_rowwise": "kernels.quantize",
    "quantize_groupwise": "kernels.quantize",
    "rms_norm_quantize": "kernels.rms_norm_quantize",
    "fp8_matmul": "kernels.fp8_matmul",
    "PrefillSchedule": "kernels.attention_schedule",
    "prefill_schedule": "kernels.attention_schedule",
    "attention_prefill": "kernels.attention_prefill",
    "attention_decode": "kernels.attention_decode",
    "use": "kernels._paths",
    "prepare": "kernels.prepared",
    "Llama4": "model.llama4",
    "Llama4Config": "model.config",
    "Parity": "model.presets",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if os.environ.get("TRITON_INTERPRET") == "1":
    importlib.import_module(f"{__name__}.kernels.interpreter").install()
