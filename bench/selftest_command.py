"""What `llama4-triton selftest` prints and how it ends; selftest.py and bisect.py do the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .runner import Request, Result
from .selftest import (
    Report,
    compute_sanitizer,
    gpu_requests,
    installation_requests,
    memcheck_requests,
    run_selftest,
)

if TYPE_CHECKING:
    from llama4_triton.model.config import Llama4Config

__all__ = ["bisect_models", "run_operators"]

INTERRUPTED = 130
TOKENS = 27  # of a tiny model's prompt: two blocks across a chunk's end, then one token
BLOCKS = (17, 9, 1)


def run_operators(
    backend: str,
    *,
    gpu: bool,
    only: str,
    file: Path | None,
    timeout: float,
    out: Console,
    err: Console,
) -> int:
    """Run the cases, print the verdict, write the report; return the exit code.

    Raises:
        ValueError: no case matches.   NoWorker: the child process does not start.
    """
    sanitizer = compute_sanitizer() if gpu else None
    requests = gpu_requests(only) if gpu else installation_requests(only)
    if sanitizer:
        requests += memcheck_requests(only)
    if not requests:
        raise ValueError(f"selftest: only must match a case, got {only!r}")
    where = "this GPU" if gpu else "Triton's interpreter on the CPU (says nothing about a GPU)"
    out.print(f"{len(requests)} cases on {where}", highlight=False, soft_wrap=True)

    with err.status("starting") as status:

        def progress(done: int, total: int, request: Request | None, result: Result | None) -> None:
            if result is None and request is not None:
                status.update(f"{done}/{total} {request.id} {request.path} {request.tool}")
            elif result is not None and result.status not in ("ok", "skipped"):
                said = f"{result.status} {result.request.id}: {result.message}"
                err.print(escape(said), highlight=False, soft_wrap=True)

        report = run_selftest(
            requests, backend=backend, timeout=timeout, sanitizer=sanitizer, progress=progress
        )
    if gpu and only == "*" and report.verdict == "passed":
        _record(report)
    if file is not None:
        report.write(file)
        out.print(f"report: {escape(str(file))}", highlight=False, soft_wrap=True)
    _print(report, out)
    return INTERRUPTED if report.interrupted else int(report.verdict != "passed")


def _record(report: Report) -> None:
    from llama4_triton.kernels._records import write_record

    device = torch.device("cuda", torch.cuda.current_device())
    summary = report.as_dict() | {"cases": len(report.results)}
    report.record = str(write_record(device, report.features, summary))


def _print(report: Report, out: Console) -> None:
    if report.failed:
        table = Table()
        for column in ("case", "path", "status", "what"):
            table.add_column(column, overflow="fold")
        for result in report.failed:
            request = result.request
            path = " ".join(filter(None, (request.path, request.tool, *request.features)))
            table.add_row(request.id, path, result.status, escape(result.message))
        out.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    out.print(f"{report.verdict}: {counts}; {report.seconds:.0f} s", highlight=False)
    if report.record:
        out.print(f"record: {escape(report.record)}", highlight=False, soft_wrap=True)


def bisect_models(device: torch.device, checkpoint: Path | None, out: Console) -> int:
    """Bisect a checkpoint, or a tiny Scout and a tiny Maverick; return the exit code."""
    from llama4_triton.model.llama4 import Llama4
    from llama4_triton.model.reference import Llama4 as Reference

    from .bisect import bisect, tiny_models

    departed = 0
    for name in [str(checkpoint)] if checkpoint else list(tiny_models()):
        if checkpoint:
            from llama4_triton.model.checkpoint import load_config, load_model

            config = load_config(checkpoint)
            model, reference = (
                load_model(checkpoint, each, config=config, dtype=torch.float32, device=device)
                for each in (Llama4, Reference)
            )
        else:
            config, state = tiny_models()[name]
            model, reference = (each(config) for each in (Llama4, Reference))
            for each in (model, reference):
                each.load_state_dict(state)
                each.to(device).eval()
        found = bisect(model, reference, _steps(config))
        table = Table(title=escape(name), title_justify="left")
        for column in ("hidden state, kernels against reference", "max |diff|", "threshold", ""):
            table.add_column(column)
        for row in found.rows:
            verdict = "[green]ok[/]" if row.ok else "[red]FAIL[/]"
            table.add_row(row.what, f"{row.max_abs_diff:.1e}", f"{row.threshold:.0e}", verdict)
        out.print(table)
        if found.first is None:
            out.print(f"{found.calls} operator calls, none departs", highlight=False)
        else:
            departed += 1
            out.print(f"first to depart: {escape(str(found.first))}", soft_wrap=True)
    return int(departed > 0)


def _steps(config: Llama4Config) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (TOKENS,), generator=generator).tolist()
    return [tokens[sum(BLOCKS[:i]) : sum(BLOCKS[: i + 1])] for i in range(len(BLOCKS))]
