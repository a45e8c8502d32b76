"""The commands `export-hf-kernel` and `extract`: the kernels for use without this project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_console import errors, out

__all__ = ["app"]

app = typer.Typer()


@app.command("export-hf-kernel")
def export_hf_kernel(
    out_: Annotated[Path, typer.Option("--out", help="a new folder, or an empty one")],
    name: Annotated[str, typer.Option(help="of the kernel, lower case")] = "llama4-triton",
    version: Annotated[int, typer.Option(help="of its interface, for get_kernel")] = 1,
) -> None:
    """Write the kernels as a repository for Hugging Face's `kernels` package."""
    with errors("export-hf-kernel"):
        from llama4_triton.engines.hf_export import LAYERS, export_hf_kernel

        id = export_hf_kernel(out_, name=name, version=version)
        out.print(
            f"{out_}: version {version} of {name}, layers {', '.join(LAYERS)}, operators in "
            f"torch.ops.{id}",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def extract(
    op: Annotated[str, typer.Argument(metavar="OP", help="an operator, as rms_norm")],
    file: Annotated[Path | None, typer.Option("--out", help="default: the terminal")] = None,
) -> None:
    """Write one operator, its kernels and checks as one file that needs torch and Triton only."""
    with errors("extract"):
        from llama4_triton.engines.extract import extract

        text = extract(op)
        if file is None:
            typer.echo(text, nl=False)
        else:
            file.write_text(text, encoding="utf-8")
