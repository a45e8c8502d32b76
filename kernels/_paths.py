"""Which of its paths each operator takes.

    safe        pointers or cp.async; no programmatic dependent launch, no warp specialisation, no
                merge by the program that arrives last
    fast        what was tuned; the default
    reference   kernels/reference.py: plain PyTorch, slow, and it waits for the device

    use(moe="safe", attention_decode="reference")     from here on, in every thread
    with use(all="safe"): ...                         and what was before is restored at the end
    LLAMA4_TRITON_PATH=safe                           or moe=safe,attention_decode=reference

`fast` leaves out what nothing that runs without a GPU models until a selftest of this very GPU has
covered it: see `features`. The choice is made inside the flat operator, so code that torch.compile
has traced follows it as well; a CUDA graph keeps the path it was captured with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

import torch

from ._environment import environment
from ._records import covered_features

__all__ = [
    "OPS",
    "PATHS",
    "UNMODELLED",
    "assume_covered",
    "features",
    "path",
    "path_report",
    "use",
]

PATHS = ("safe", "fast", "reference")

# What the fast path of each operator uses beyond its safe path: pointers and cp.async.
OPS: dict[str, frozenset[str]] = {
    "gather_rows": frozenset(),
    "rms_norm": frozenset(),
    "add_rms_norm": frozenset(),
    "rope_and_cache": frozenset(),
    "convert_layout": frozenset(),
    "router": frozenset(),
    "route": frozenset(),
    "sort_by_expert": frozenset(),
    "grouped_gemm_swiglu": frozenset(),
    "grouped_gemm_combine": frozenset(),
    "moe": frozenset({"last_arriver", "warp_specialisation"}),
    "swiglu": frozenset(),
    "rms_norm_quantize": frozenset(),
    "add_rms_norm_quantize": frozenset(),
    "quantize_rowwise": frozenset(),
    "quantize_groupwise": frozenset(),
    "fp8_matmul": frozenset(),
    "prefill_schedule": frozenset(),
    "attention_prefill": frozenset(),
    "attention_decode": frozenset(),
    "decode_schedule": frozenset(),
    "merge_attention": frozenset(),
}

# Neither the interpreter nor an executor of compiled code says whether these work on a GPU.
UNMODELLED = frozenset({"pdl", "last_arriver", "warp_specialisation"})

_assumed: frozenset[str] = frozenset()

_lock = threading.Lock()
_chosen: dict[str, tuple[str, str]] | None = None  # op -> path, who chose it; replaced, not changed


def path(op: str) -> str:
    """The path that `op` takes now: "safe", "fast" or "reference"."""
    chosen = _chosen
    return (_current() if chosen is None else chosen)[op][0]


def use(**paths: str) -> AbstractContextManager[None]:
    """Choose the paths of the operators named, in this process; `all` names every one.

    As a plain call it holds from here on. In a `with` statement, what held before the call is
    restored at the end.

    Raises:
        ValueError: there is no such operator or path.
    """
    global _chosen
    with _lock:
        before = _current()
        _chosen = before | _expanded("use", paths, "use()")
    return _Restore(before)


def features(op: str, device: torch.device) -> frozenset[str]:
    """What `op` may use on `device` beyond pointers and cp.async.

    Nothing on the safe and the reference path; on the fast one what the operator declares, less
    what is UNMODELLED and in no selftest record of this GPU, driver and source.
    """
    declared = OPS[op]
    if path(op) != "fast" or not declared:
        return frozenset()
    doubtful = (declared & UNMODELLED) - _assumed
    return declared - (doubtful - covered_features(device) if doubtful else doubtful)


@contextmanager
def assume_covered(features: Iterable[str]) -> Iterator[None]:
    """Turn `features` on as if a selftest had covered them: for the selftest itself."""
    global _assumed
    before, _assumed = _assumed, _assumed | frozenset(features)
    try:
        yield
    finally:
        _assumed = before


def path_report(device: torch.device) -> dict[str, tuple[str, str]]:
    """Of every operator, the path that it takes on `device` and why."""
    report = {}
    for op, (chosen, origin) in _current().items():
        why = {"default": "the default"}.get(origin, f"chosen by {origin}")
        withheld = OPS[op] - features(op, device)
        if chosen == "fast" and withheld:
            why += (
                f"; without {', '.join(sorted(withheld))}: not covered by a selftest of this GPU "
                "(llama4-triton selftest --gpu)"
            )
        elif chosen == "fast" and not OPS[op]:
            why += "; the same as safe"
        report[op] = chosen, why
    return report


class _Restore(AbstractContextManager[None]):
    def __init__(self, before: dict[str, tuple[str, str]]):
        self._before = before

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._before


def _current() -> dict[str, tuple[str, str]]:
    global _chosen
    if _chosen is None:
        defaults = dict.fromkeys(OPS, ("fast", "default"))
        _chosen = defaults | _from_environment(environment().path)
    return _chosen


def _from_environment(text: str) -> dict[str, tuple[str, str]]:
    paths = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, chosen = entry.partition("=")
        paths[op.strip() if equals else "all"] = chosen.strip() if equals else op
    return _expanded("LLAMA4_TRITON_PATH", paths, "LLAMA4_TRITON_PATH")


def _expanded(who: str, paths: dict[str, str], origin: str) -> dict[str, tuple[str, str]]:
    """Spell out `all`; what is named more closely wins."""
    for op, chosen in paths.items():
        if op != "all" and op not in OPS:
            known = ", ".join(sorted(OPS))
            raise ValueError(f"{who}: operator must be all or one of {known}, got {op!r}")
        if chosen not in PATHS:
            raise ValueError(f"{who}: {op} must be one of {', '.join(PATHS)}, got {chosen!r}")
    out = dict.fromkeys(OPS, paths["all"]) if "all" in paths else {}
    out |= {op: chosen for op, chosen in paths.items() if op != "all"}
    return {op: (chosen, origin) for op, chosen in out.items()}
