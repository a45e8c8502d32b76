"""The command `diff`: where another engine and this project first depart on a checkpoint.

Exit codes: 0 they agree, 1 they depart, 2 it could not run. cli.py adds it to the program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .cli_console import err, errors, out
from .cli_model import Checkpoint, DType, device, executor, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama4_triton.engines.comparison import Row
    from llama4_triton.engines.diff import Difference

__all__ = ["app"]

app = typer.Typer()

BEFORE, AFTER = 4, 2  # rows that are shown around the first departure


@app.command()
def diff(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="text to run through both")],
    engine: Annotated[str, typer.Option(help="what to compare with")] = "transformers",
    steps: Annotated[int, typer.Option(min=0, help="tokens to go on with, one by one")] = 4,
    dtype: DType = DType.float32,
    parity: Annotated[
        str, typer.Option(help="what this project follows; by default the engine's preset")
    ] = "",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="relative to the largest value; by default 2e-4 in float32, else 4 times the "
            "engine's own error, by a second run in float32",
        ),
    ] = None,
) -> None:
    """Name the first layer and operation where two engines depart, and the likely reason."""
    with errors("diff"):
        where = device()
        from llama4_triton.engines.diff import diff as compare
        from llama4_triton.model.tokenizer import load_tokenizer

        with err.status("reading the tokenizer") as status:
            ids = load_tokenizer(checkpoint).encode(prompt, bos=True)
            found = compare(
                engine, checkpoint, ids, steps=steps, dtype=torch_dtype(dtype),
                parity=parity or None, tolerance=tolerance, device=where, status=status.update,
            )  # fmt: skip
        out.print(
            f"{engine} against the kernels, {dtype.value}: {len(ids)} prompt tokens, "
            f"{len(found.tokens)} steps, {len(found.rows)} operations\n"
            f"kernels run on: {escape(executor(where))}\n{escape(str(found.parity))}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        _print(found)
    if found.first is not None:
        raise typer.Exit(1)


def _print(found: Difference) -> None:
    from llama4_triton.engines.reasons import located

    rows = found.rows
    if found.first is None:
        out.print(_table(_worst(rows)))
        out.print("the engines agree", highlight=False)
        return
    at = rows.index(found.first)
    out.print(_table(rows[max(0, at - BEFORE) : at + 1 + AFTER]))
    place = located(found.first.place, found.config)
    for line in (f"first departure: {place}", f"likely reason: {found.reason}"):
        out.print(escape(line), highlight=False, soft_wrap=True)


def _worst(rows: Sequence[Row]) -> list[Row]:
    """Of each operation the row that comes nearest to its tolerance."""
    worst: dict[str, Row] = {}
    for row in rows:
        kept = worst.setdefault(row.place.op, row)
        if row.error * kept.tolerance > kept.error * row.tolerance:
            worst[row.place.op] = row
    return list(worst.values())


def _table(rows: Sequence[Row]) -> Table:
    table = Table()
    for column in ("step", "layer", "operation"):
        table.add_column(column, no_wrap=True)
    for column in ("|diff|", "allowed", "|value|"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        step, layer, op = row.place
        verdict = "[red]departs[/]" if row.departs else "[green]ok[/]"
        table.add_row(
            str(step), "" if layer is None else str(layer), op, f"{row.error:.1e}",
            f"{row.tolerance:.1e}", f"{row.largest:.1e}", verdict,
        )  # fmt: skip
    return table
