"""The first run on a GPU: every operator and shipped configuration against the reference.

    report = run_selftest(gpu_requests(only="*"), backend="cuda", timeout=60.0)
    report.write(Path("selftest.json"))

Each case: against the reference in float64; ten runs with equal bits; a CUDA graph, captured and
replayed three times on new values. `small` cases ask for every binary that ships; a few `real` ones
for grids, offsets and memory of full size. Path `fast` throughout, `safe` once per operator, and
what nothing models without a GPU forced on for the operators that have it. Where compute-sanitizer
is installed, `small` cases run under its memcheck as well, as far as the time allows.

The report is one JSON object:

    schema       1
    tool         "llama4-triton <version>"
    started      UTC, ISO 8601;    seconds: duration
    verdict      "passed", "failed" or "interrupted"
    environment  gpu (null: none), capability, driver, cuda, torch, triton, python, source (hash of
                 kernels/), sm_count, shared_bytes, memory_bytes, clocks_mhz (null: not known),
                 compute_sanitizer (null: not installed)
    counts       cases by status
    record       the file that says that this GPU passed; null: none was written
    cases        id, op, path, features (forced on), tool ("" or "memcheck"),
                 status    ok | wrong | hang | crash | oom | error | skipped
                 message   what went wrong;   at: the launch under way, kernel, config and grid
                 seconds, launches ("kernel config grid" each), and of the error closest to its
                 bound: measure, max_error, bound (text where it is not finite)
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .runner import STATUSES, NoWorker, Request, Result, Runner

__all__ = [
    "REAL_CASES",
    "Report",
    "compute_sanitizer",
    "gpu_requests",
    "installation_requests",
    "memcheck_requests",
    "run_selftest",
]

BUDGET_S = 600.0  # cases that have not begun by then are skipped
MEMCHECK_TIMEOUT = 4.0  # times that of a case: instrumented kernels are slow
UNSUPPORTED = "unsupported"  # a skipped case that begins so is no failure

# Of full size, and small enough that 24 GB hold inputs and a float64 reference.
REAL_CASES = (
    "gather_rows-embedding-T16384",
    "rms_norm-T16384",
    "add_rms_norm-T16384",
    "swiglu-F16384-T4096",
    "rope_and_cache-scout-local-tp1-T1024",
    "rope_and_cache-global-tp8-T1024",
    "rope_and_cache-scout-local-e4m3-token-transposed-tp8-T1024",
    "convert_layout-transposed_v-e4m3-tp8",
    "quantize_rowwise-T4096-K16384",
    "quantize_groupwise-T4096-K16384",
    "rms_norm_quantize-T4096",
    "add_rms_norm_quantize-T4096",
    "router-maverick-E128-T4096-row",
    "router-scout-E16-T16",
    "fp8_matmul-scout-tp1-qkv-T4096-promoted",
    "fp8_matmul-scout-tp1-qkv-T4096-fast",
    "fp8_matmul-scout-tp1-shared_down-T1-promoted",
    "route-maverick-T16384-skewed",
    "sort_by_expert-maverick-T4096-one-hot",
    "grouped_gemm_swiglu-scout-tp8-T1024-skewed",
    "grouped_gemm_combine-scout-tp8-T4096-one-hot",
    "grouped_gemm_combine-scout-tp8-T4096-uniform-k2",
    "moe-scout-tp8-T1024-one-per-expert",
    "moe-scout-tp8-T1-one-hot",
    "moe-scout-tp8-T64-skewed-e4m3_channel",
    "moe-scout-tp8-T1024-uniform-e4m3_block",
    "moe-scout-tp8-T16-uniform-int4_group",
    "prefill_schedule-prefill-B1-T16384-16k-local",
    "attention_prefill-scout-tp8-prefill-B1-T1024-1k-global",
    "attention_prefill-scout-tp8-prefill-B1-T1024-1k-global-e4m3-head",
    "attention_prefill-scout-tp8-mixed-B8-T207-128k-local",
    "attention_decode-scout-tp8-decode-B1-T1-128k-global",
    "attention_decode-scout-tp8-decode-B64-T64-8k-local",
    "decode_schedule-scout-tp8-decode-B64-T64-8k-local",
    "merge_attention-real-T64-R8-bf16",
)
# Without a GPU: that the installation works. One case of each operator that interprets fast.
INSTALLATION_CASES = (
    "gather_rows-small-bf16",
    "rms_norm-small-bf16",
    "add_rms_norm-small-bf16",
    "swiglu-small-bf16",
    "rope_and_cache-small-scout-local-T5",
    "convert_layout-small-transposed_v-e4m3",
    "quantize_rowwise-small-K640",
    "quantize_groupwise-small-K640",
    "rms_norm_quantize-small-bf16",
    "add_rms_norm_quantize-small-bf16",
    "fp8_matmul-small-T17",
    "router-small-E16-T37-like-T4",
    "route-small-E16-T37-skewed",
    "sort_by_expert-small-E16-like-T64",
    "grouped_gemm_swiglu-small-m64-vllm",
    "grouped_gemm_combine-small-m64-vllm",
    "moe-small-top2",
    "prefill_schedule-small-local",
    "attention_prefill-small-rows-16-local",
    "attention_decode-small-many-splits-global",
    "decode_schedule-small-global",
    "merge_attention-small-T3-R2-bf16",
)

Progress = Callable[[int, int, Request | None, Result | None], None]


def installation_requests(only: str = "*") -> list[Request]:
    """What Triton's interpreter runs in seconds."""
    from .ops import cases

    ids = {case.id for case in cases("small", only)}
    return [Request(id=id, repeats=2, replays=0) for id in INSTALLATION_CASES if id in ids]


def gpu_requests(only: str = "*") -> list[Request]:
    """Every small case and a few real ones on path fast, one case per operator on path safe."""
    from llama4_triton.kernels._paths import OPS as PATHS_OF
    from llama4_triton.kernels._paths import UNMODELLED

    from .ops import cases

    small = list(cases("small", only))
    real = {case.id for case in cases("real", only)}
    requests = [Request(id=case.id) for case in small]
    requests += [Request(id=id) for id in REAL_CASES if id in real]
    first = {case.op: case for case in reversed(small)}
    requests += [Request(id=case.id, path="safe") for case in small if first[case.op] is case]
    for case in small:
        doubtful = PATHS_OF.get(case.op, frozenset()) & UNMODELLED
        requests += [Request(id=case.id, features=(name,)) for name in sorted(doubtful)]
    return requests


def memcheck_requests(only: str = "*") -> list[Request]:
    """Every small case once, for compute-sanitizer."""
    from .ops import cases

    return [
        Request(id=case.id, repeats=1, replays=0, tool="memcheck") for case in cases("small", only)
    ]


def compute_sanitizer() -> str | None:
    """NVIDIA's memory checker, if it is installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin"
    )


@dataclass(kw_only=True, slots=True)
class Report:
    """What ran, on what, and how it went."""

    environment: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    started: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    seconds: float = 0.0
    interrupted: bool = False
    record: str | None = None

    @property
    def failed(self) -> list[Result]:
        """Cases that are neither right nor impossible on this GPU."""
        return [r for r in self.results if r.status != "ok" and not _excused(r)]

    @property
    def verdict(self) -> str:
        if self.interrupted:
            return "interrupted"
        return "passed" if self.results and not self.failed else "failed"

    @property
    def features(self) -> list[str]:
        """What was forced on, and right in every case."""
        tried = {name for r in self.results for name in r.request.features}
        return sorted(tried - {name for r in self.failed for name in r.request.features})

    def counts(self) -> dict[str, int]:
        counted = Counter(result.status for result in self.results)
        return {status: counted[status] for status in STATUSES if counted[status]}

    def as_dict(self) -> dict[str, Any]:
        from llama4_triton import __version__

        return {
            "schema": 1,
            "tool": f"llama4-triton {__version__}",
            "started": self.started,
            "seconds": round(self.seconds, 1),
            "verdict": self.verdict,
            "environment": self.environment,
            "counts": self.counts(),
            "record": self.record,
            "cases": [result.as_dict() for result in self.results],
        }

    def write(self, file: Path) -> None:
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False, default=str)
        file.write_text(text + "\n", encoding="utf-8")


def _excused(result: Result) -> bool:
    """Impossible on this GPU, or an extra for which there was no time."""
    extra = result.request.tool == "memcheck"
    return result.status == "skipped" and (extra or result.message.startswith(UNSUPPORTED))


def run_selftest(
    requests: Sequence[Request],
    *,
    backend: str,
    timeout: float,
    sanitizer: str | None = None,
    variables: Mapping[str, str] | None = None,
    budget: float = BUDGET_S,
    progress: Progress = lambda done, total, request, result: None,
) -> Report:
    """Run `requests` in child processes; Ctrl-C ends the run, not the report.

    Args:
        backend: "cuda", "interpreter" or another of worker.py.
        timeout: seconds without a sign of life after which a case hangs.
        sanitizer: the program compute-sanitizer, for requests whose tool is memcheck.
        variables: environment variables for the child.
        budget: seconds; what has not begun by then is skipped.
        progress: called before each case with no result, and after it with one.
    Raises:
        NoWorker: the child process cannot be started.
    """
    report = Report()
    start = time.monotonic()
    left = list(requests)
    try:
        for tool in dict.fromkeys(request.tool for request in requests):
            memcheck = tool == "memcheck"
            runner = Runner(
                backend,
                timeout=timeout * (MEMCHECK_TIMEOUT if memcheck else 1.0),
                prefix=_memcheck(sanitizer) if memcheck else (),
                environment={**(variables or {}), **(MEMCHECK_VARIABLES if memcheck else {})},
            )
            with runner:
                for request in [r for r in requests if r.tool == tool]:
                    progress(len(report.results), len(requests), request, None)
                    if time.monotonic() - start > budget:
                        result = Result(
                            request=request, status="skipped", message=f"no time: {budget:g} s"
                        )
                    else:
                        result = runner.run(request)
                    report.environment = report.environment or dict(runner.environment)
                    report.results.append(result)
                    left.remove(request)
                    progress(len(report.results), len(requests), request, result)
                runner.stop()
                if memcheck and runner.exit_code == MEMCHECK_FOUND and not report.failed:
                    report.results.append(
                        Result(request=request, status="error", message=MEMCHECK_MESSAGE)
                    )
    except KeyboardInterrupt:
        report.interrupted = True
        report.results += [
            Result(request=request, status="skipped", message="interrupted") for request in left
        ]
    report.seconds = time.monotonic() - start
    return report


# Every tensor gets memory of its own, so that an access beyond it is seen.
MEMCHECK_VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
MEMCHECK_FOUND = 86
MEMCHECK_MESSAGE = "compute-sanitizer counted errors in one of the cases it ran"


def _memcheck(sanitizer: str | None) -> tuple[str, ...]:
    if sanitizer is None:
        raise NoWorker("selftest: compute-sanitizer must be installed for memcheck, got none")
    return (sanitizer, "--tool", "memcheck", "--error-exitcode", str(MEMCHECK_FOUND))
