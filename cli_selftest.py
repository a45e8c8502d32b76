"""The commands `selftest` and `doctor`: is what is installed right, and right on this GPU?

Exit codes of selftest: 0 passed, 1 failed, 2 could not run, 130 interrupted (the report is written
all the same). cli.py adds these commands to the program.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .cli_console import err, errors, fail, out
from .cli_model import device

__all__ = ["app"]

app = typer.Typer()


@app.command()
def selftest(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="every operator and shipped configuration on this GPU")
    ] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="name the first layer and operator that departs")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="with --bisect: a model in HF format, read as float32")
    ] = None,
    only: Annotated[str, typer.Option(help="cases whose id matches this shell pattern")] = "*",
    report: Annotated[Path | None, typer.Option("--out", help="write a JSON report")] = None,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="seconds without a sign of life: a hang")
    ] = 60.0,
    backend: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Check operators against the reference; without --gpu a minute on Triton's interpreter."""
    from llama4_triton.bench.runner import NoWorker
    from llama4_triton.bench.selftest_command import bisect_models, run_operators

    with errors("selftest"):
        if checkpoint is not None and not bisect:
            fail("selftest: --checkpoint must come with --bisect")
        if gpu:
            _require_gpu("selftest --gpu")
            report = report or Path("llama4-triton-selftest.json")
        if report is not None and not report.absolute().parent.is_dir():
            fail(f"selftest: --out must be in a folder that exists, got {report}")
        if bisect:
            code = bisect_models(device(), checkpoint, out)
        else:
            try:
                code = run_operators(
                    backend or ("cuda" if gpu else "interpreter"),
                    gpu=gpu, only=only, file=report, timeout=timeout, out=out, err=err,
                )  # fmt: skip
            except NoWorker as error:
                fail(str(error))
    if code:
        raise typer.Exit(code)


def _require_gpu(what: str) -> None:
    import torch

    if not torch.cuda.is_available():
        fail(f"{what}: torch {torch.__version__} must see a GPU, got none (see doctor)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        fail(f"{what}: TRITON_INTERPRET must be unset, or kernels do not run on the GPU")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what is installed, whether it fits the GPU, and which path each operator takes here."""
    with errors("doctor"):
        from dataclasses import asdict

        from llama4_triton.bench.doctor import examine, kernel_paths

        findings, paths = examine(), kernel_paths()
        if as_json:
            rows = {op: {"path": path, "why": why} for op, (path, why) in paths.items()}
            out.print_json(data={"findings": [asdict(f) for f in findings], "paths": rows})
            return
        table = Table(title="what is here", title_justify="left")
        for column in ("", "", "", "why"):
            table.add_column(column, overflow="fold")
        colours = {"ok": "green", "note": "yellow", "fault": "red"}
        for f in findings:
            verdict = f"[{colours[f.verdict]}]{f.verdict}[/]"
            table.add_row(escape(f.topic), escape(f.value), verdict, escape(f.why))
        out.print(table)
        table = Table(title="operators", title_justify="left")
        for column in ("operator", "path", "why"):
            table.add_column(column, overflow="fold")
        for op, (path, why) in paths.items():
            table.add_row(op, path, escape(why))
        out.print(table)
