"""The commands about kernels rather than text; none but `selftest --gpu` needs a GPU.

What a model launches is recorded at full size; what it asks for is compiled for the architecture
that is named; cli.py adds these commands to the program.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .cli_console import err, errors, fail, out

if TYPE_CHECKING:
    from llama4_triton.bench.shapes import TextShape

__all__ = ["Model", "Numbers", "TensorParallel", "app", "shape_of"]

app = typer.Typer()


class Model(str, enum.Enum):
    scout = "scout"
    maverick = "maverick"


class Numbers(str, enum.Enum):
    bf16 = "bf16"
    fp8 = "fp8"


class Architecture(str, enum.Enum):
    sm_75 = "sm_75"
    sm_80 = "sm_80"
    sm_86 = "sm_86"
    sm_89 = "sm_89"
    sm_90 = "sm_90"
    sm_100 = "sm_100"
    sm_120 = "sm_120"


TensorParallel = Annotated[int, typer.Option("--tp", help="GPUs of tensor parallelism: 1, 2, 4, 8")]


@app.command()
def warm(
    cache: Annotated[Path, typer.Option(help="folder to use as TRITON_CACHE_DIR")],
    model: Model = Model.scout,
    tp: TensorParallel = 1,
    dtype: Annotated[Numbers, typer.Option(help="of the dense projections")] = Numbers.bf16,
    arch: Architecture = Architecture.sm_90,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> None:
    """Compile, without a GPU, every binary that a model will ask for into a Triton cache."""
    with errors("warm"):
        _require_compiler("warm")
        from llama4_triton.autotune.compile import CompiledReport
        from llama4_triton.bench.warm import warm as fill

        shape = shape_of(model, tp)
        with err.status("recording the launches of the full-size model") as status:
            done = 0

            def on_done(*_: object) -> None:
                nonlocal done
                done += 1
                status.update(f"{done} binaries")

            results = fill(
                shape,
                tp,
                cache=cache,
                arch=arch.value,
                fp8=dtype is Numbers.fp8,
                jobs=jobs,
                on_done=on_done,
            )
        failed = [b for b, result in results.items() if not isinstance(result, CompiledReport)]
        for binary in failed:
            out.print(f"FAIL {escape(str(binary))}: {escape(str(results[binary]))}")
        out.print(
            f"{len(results) - len(failed)} binaries for {arch.value} in {escape(str(cache))}; on "
            "the GPU set TRITON_CACHE_DIR to it, and LLAMA4_TRITON_NO_JIT=1 to refuse any other",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(1)


@app.command("compile")
def compile_command(
    folder: Annotated[Path, typer.Option("--out", help="folder for the binaries and manifest")],
    arch: Architecture = Architecture.sm_90,
    jobs: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> None:
    """Compile every shipped kernel without a GPU, judge the machine code, write a manifest."""
    with errors("compile"):
        _require_compiler("compile")
        folder.mkdir(parents=True, exist_ok=True)
        from llama4_triton.autotune.compile import compile_all
        from llama4_triton.autotune.manifest import write_manifest
        from llama4_triton.bench.variants import all_launches

        with err.status("recording the launches of full-size models"):
            launches, refused = all_launches(arch.value)
        total = len({launch.binary() for launch in launches})
        with err.status(f"0 of {total} binaries") as status:
            done = 0

            def on_done(*_: object) -> None:
                nonlocal done
                done += 1
                status.update(f"{done} of {total} binaries")

            results = compile_all(launches, arch.value, jobs=jobs, on_done=on_done)
        rows = write_manifest(launches, results, folder, arch.value)
        red = [row for row in rows if row["gate"] != "pass"]
        for reason in refused:
            out.print(f"refused: {escape(reason)}", highlight=False, soft_wrap=True)
        for row in red:
            said = "; ".join(row["faults"])
            out.print(f"FAIL {escape(row['name'])}: {escape(said)}", soft_wrap=True)
        out.print(
            f"{len(rows)} binaries for {arch.value}, {len(red)} with a red gate: "
            f"{escape(str(folder / 'manifest.json'))}",
            soft_wrap=True,
        )
    if red:
        raise typer.Exit(1)


class Part(str, enum.Enum):
    code = "code"
    work = "work"
    steps = "steps"
    all = "all"


@app.command()
def evidence(
    part: Annotated[Part, typer.Option(help="machine code, work at real sizes, or steps")] = (
        Part.all
    ),
    arch: Annotated[Architecture, typer.Option(help="of the machine code")] = Architecture.sm_90,
    jobs: Annotated[int, typer.Option(min=1, help="processes that compile")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows there")] = None,
) -> None:
    """What is known without a GPU, with the verdict of every gate; exit code 1 if one is red."""
    with errors("evidence"):
        _require_compiler("evidence")
        from llama4_triton.bench import evidence as rows_of
        from llama4_triton.bench.targets import targets

        found: dict[str, list[dict[str, Any]]] = {}
        if part in (Part.code, Part.all):
            with err.status("compiling what ships"):
                found["code"] = rows_of.machine_code(arch.value, jobs=jobs)
            out.print(_code_table(found["code"], arch.value))
        if part in (Part.work, Part.all):
            with err.status("counting what is touched at real sizes (minutes)"):
                found["work"] = rows_of.work_in_child()
            out.print(_work_table(found["work"]))
            out.print("L2 and DRAM: modelled, not measured (bench/l2.py says how)")
            found["targets"] = targets()
            out.print(_targets_table(found["targets"]))
        if part in (Part.steps, Part.all):
            with err.status("recording full-size steps"):
                found["steps"] = rows_of.steps()
            out.print(_steps_table(found["steps"]))
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        judged = [row for name in ("code", "work") for row in found.get(name, [])]
        red = [row for row in judged if row["faults"]]
        for row in red:
            out.print(f"FAIL {escape(row.get('name') or row['id'])}: {escape(str(row['faults']))}")
        out.print(f"{len(judged)} rows judged, {len(red)} with a red gate")
    if red:
        raise typer.Exit(1)


def _code_table(rows: list[dict[str, Any]], arch: str) -> Table:
    table = Table(title=f"machine code for {arch}", title_justify="left")
    table.add_column("binary", overflow="fold")
    for name in ("regs", "spills", "shared B", "blocks/SM", "tensor cores", "waits/dots", "gates"):
        table.add_column(name, justify="left" if name in ("tensor cores", "gates") else "right")
    for row in rows:
        ok = "[green]pass[/]" if not row["faults"] else "[red]FAIL[/]"
        if "registers" not in row:  # it does not compile
            table.add_row(row["name"], *[""] * 6, ok)
            continue
        tensor = " ".join(f"{form} x{count}" for form, count in row["tensor_core"].items())
        table.add_row(
            row["name"],
            str(row["registers"]),
            str(row["spills"]),
            f"{row['shared']:,}",
            f"{row['occupancy']} ({row['limiter']})",
            tensor or "-",
            f"{row['waits']}/{row['dots']:g}",
            ok,
        )
    return table


def _targets_table(rows: list[dict[str, Any]]) -> Table:
    title = "design targets on an H100; floors are modelled, nothing is measured"
    table = Table(title=title, title_justify="left")
    table.add_column("case", overflow="fold")
    for name in ("tokens", "active experts", "MB", "floor us", "to beat", "target", "measured"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            str(row["tokens"]),
            "-" if row["active"] is None else str(row["active"]),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['floor_us']:.1f}",
            "-" if row["to_beat"] is None else f"{row['to_beat']:g}",
            f"{row['target']:g} {row['unit']}",
            "-" if row["measured"] is None else f"{row['measured']:g}",
        )
    return table


def _work_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="work at real sizes, against what is compulsory", title_justify="left")
    table.add_column("operator and workload", overflow="fold")
    for name in ("launches", "programs (idle)", "MB", "unique", "requested", "DRAM", "padded"):
        table.add_column(name, justify="right")
    table.add_column("gates")
    for row in rows:
        ratios = (row[f"{name}_ratio"] for name in ("unique", "requested", "dram", "padded"))
        table.add_row(
            row["id"],
            str(len(row["kernels"])),
            f"{row['programs']:,} ({row['idle']:,})",
            f"{row['compulsory'] / 1e6:,.1f}",
            *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios),
            "[green]pass[/]" if not row["faults"] else "[red]FAIL[/]",
        )
    return table


def _steps_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="one step of a whole model, per GPU", title_justify="left")
    table.add_column("workload", overflow="fold")
    for name in ("layers", "Triton launches", "GEMMs", "copies", "allocations", "MB allocated"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["id"],
            str(row["layers"]),
            str(sum(row["launches"].values())),
            str(row["gemms"]),
            str(row["copies"]),
            str(row["allocations"]),
            f"{row['allocated_bytes'] / 1e6:,.1f}",
        )
    return table


def shape_of(model: Model, tp: int) -> TextShape:
    from llama4_triton.bench.shapes import MODELS, PARALLEL

    if tp not in PARALLEL:
        fail(f"--tp must be one of {', '.join(map(str, PARALLEL))}, got {tp}")
    (shape,) = (shape for shape in MODELS if shape.name == model.value)
    return shape


def _require_compiler(command: str) -> None:
    import triton

    if triton.knobs.runtime.interpret:
        fail(f"{command}: TRITON_INTERPRET must be unset (an interpreted kernel has no code)")
