"""The one registry of operator cases: selftest, executed lane, gates and benchmarks share it.

    for case in cases("small"): ...

`real`: Scout and Maverick as one of 1 to 8 GPUs sees them, 1 to 16,384 tokens, contexts up to ten
million. `small`: the same machine code (constexprs, dtypes, divisibility by 16) on few tokens,
experts, heads and keys, so that everything that ships can be run in minutes, on a CPU even; a test
holds that no binary of the real cases is missing. Beside them, each operator once in fp16 and fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import chain
from typing import Literal

from .case import Case, Inputs, Outputs
from .cases_attention import prefill_cases, prefill_schedule_cases
from .cases_cache import convert_cases, rope_cases
from .cases_decode import decode_cases, decode_schedule_cases, merge_cases
from .cases_dense import (
    fp8_matmul_cases,
    gather_cases,
    norm_cases,
    norm_quantize_cases,
    quantize_cases,
    swiglu_cases,
)
from .cases_experts import combine_cases, grouped_swiglu_cases
from .cases_moe import moe_cases
from .cases_routing import route_cases, router_cases, sort_cases

__all__ = ["OPS", "Case", "Inputs", "Outputs", "cases", "find"]

Size = Literal["real", "small"]

# By operator, what yields its cases; two operators of one file share one.
OPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "gather_rows": gather_cases,
    "rms_norm": norm_cases,
    "add_rms_norm": norm_cases,
    "rope_and_cache": rope_cases,
    "convert_layout": convert_cases,
    "router": router_cases,
    "route": route_cases,
    "sort_by_expert": sort_cases,
    "grouped_gemm_swiglu": grouped_swiglu_cases,
    "grouped_gemm_combine": combine_cases,
    "moe": moe_cases,
    "swiglu": swiglu_cases,
    "rms_norm_quantize": norm_quantize_cases,
    "add_rms_norm_quantize": norm_quantize_cases,
    "quantize_rowwise": quantize_cases,
    "quantize_groupwise": quantize_cases,
    "fp8_matmul": fp8_matmul_cases,
    "prefill_schedule": prefill_schedule_cases,
    "attention_prefill": prefill_cases,
    "attention_decode": decode_cases,
    "decode_schedule": decode_schedule_cases,
    "merge_attention": merge_cases,
}


def cases(size: Size, only: str = "*") -> Iterator[Case]:
    """Yield every case of that size whose id matches the shell pattern `only`."""
    if size not in ("real", "small"):
        raise ValueError(f'cases: size must be "real" or "small", got {size!r}')
    every = chain.from_iterable(generator(size) for generator in dict.fromkeys(OPS.values()))
    return (case for case in every if fnmatchcase(case.id, only))


def find(id: str) -> Case:
    """Return the case of that id.

    Raises:
        ValueError: there is none.
    """
    for case in chain(cases("small"), cases("real")):
        if case.id == id:
            return case
    raise ValueError(f"find: id must be that of a case, got {id!r}")
