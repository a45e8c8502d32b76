"""The command line `llama4-triton`: the commands that run the model; cli_diff.py, cli_export.py,
cli_kernels.py, cli_plan.py and cli_selftest.py have the others.

Errors that the user can act on are one line on stderr and exit code 2; `demo` exits with 1 if a
row of its parity table fails. Without a GPU the commands turn Triton's interpreter on, before any
kernel file is imported: right, and slow.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from . import cli_diff, cli_export, cli_kernels, cli_plan, cli_selftest
from .cli_console import err, errors, fail, out
from .cli_model import (
    Checkpoint,
    DType,
    ParityName,
    device,
    executor,
    load,
    torch_dtype,
    weights_bytes,
)

__all__ = ["app"]

app = typer.Typer(
    name="llama4-triton",
    help="Triton kernels for Llama 4: run the model, check it, look at the kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_diff.app)
app.add_typer(cli_kernels.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_selftest.app)
app.add_typer(cli_export.app)


@app.callback()
def _root() -> None:
    """Keeps the commands named even while there is only one."""


@app.command()
def demo() -> None:
    """Run a tiny Scout and a tiny Maverick end to end and compare them with the reference."""
    start = time.perf_counter()
    with errors("demo"):
        where = device()
        from llama4_triton.model.demo import PROMPT, demo_configs, run_demo
        from llama4_triton.model.tokenizer import load_tokenizer

        out.print(f"kernels run on: {executor(where)}")
        tokenizer = load_tokenizer(None)
        out.print(f"prompt: {escape(repr(PROMPT))}")
        failed = 0
        for name, config in demo_configs().items():
            with (
                tempfile.TemporaryDirectory(prefix="llama4-triton-") as folder,
                out.status(name) as status,
            ):
                result = run_demo(
                    name, config, tokenizer, Path(folder), device=where, status=status.update
                )
            out.print(
                f"{name}: {result.prompt_tokens} prompt tokens, "
                f"{len(result.generation.tokens[0])} generated across a boundary of chunks of "
                f"{config.attention_chunk_size}, {result.seconds:.1f} s",
                soft_wrap=True,
            )
            table = Table()
            for column in ("fp32, kernels against reference", "max |diff|", "threshold", ""):
                table.add_column(column, justify="left" if column[:4] in ("fp32", "") else "right")
            for row in result.rows:
                verdict = "[green]ok[/]" if row.ok else "[red]FAIL[/]"
                table.add_row(row.what, f"{row.max_abs_diff:.1e}", f"{row.threshold:.0e}", verdict)
                failed += not row.ok
            out.print(table)
            out.print(f"generated (random weights): {escape(repr(result.text))}\n")
        seconds = time.perf_counter() - start
        out.print(f"{'all rows ok' if not failed else f'{failed} rows failed'}, {seconds:.0f} s")
    if failed:
        raise typer.Exit(1)


@app.command()
def run(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
    dtype: DType = DType.bfloat16,
    parity: ParityName = "default",
) -> None:
    """Generate text from a Llama 4 checkpoint."""
    with errors("run"):
        where = device()
        import torch

        from llama4_triton.model.checkpoint import load_config
        from llama4_triton.model.generate import Sampling, generate
        from llama4_triton.model.plan import require_fit
        from llama4_triton.model.tokenizer import load_tokenizer

        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        config = load_config(checkpoint)
        size = weights_bytes("run", checkpoint, config, dtype)
        tokenizer = load_tokenizer(checkpoint)
        ids = tokenizer.encode(prompt, bos=True)
        require_fit(
            config, [len(ids) + max_new_tokens], dtype=torch_dtype(dtype), device=where,
            weights_bytes=size,
        )  # fmt: skip
        model = load(checkpoint, config, dtype, where, parity)
        tokens: list[int] = []
        with err.status(f"prefill of {len(ids)} tokens on {executor(where)}") as status:

            def on_token(_row: int, token: int) -> None:
                tokens.append(token)
                status.update(f"{len(tokens)}/{max_new_tokens} tokens")

            with torch.inference_mode():
                generate(
                    model,
                    [ids],
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    on_token=on_token,
                )
        out.print(escape(prompt + tokenizer.decode(tokens)), highlight=False, soft_wrap=True)


@app.command()
def logits(
    checkpoint: Checkpoint,
    input: Annotated[Path, typer.Option(help=".npz with input_ids (B, S), attention_mask (B, S)")],
    output: Annotated[Path, typer.Option(help=".npz to write: logits (B, S, V) float32")],
    dtype: DType = DType.float32,
    blocks: Annotated[str, typer.Option(help="columns per forward call, such as 7,9,1")] = "",
    parity: ParityName = "default",
) -> None:
    """Write the logits of token ids, fed through the KV cache in blocks."""
    with errors("logits"):
        where = device()
        import numpy as np
        import torch

        from llama4_triton.model.checkpoint import load_config
        from llama4_triton.model.generate import logits_of
        from llama4_triton.model.plan import require_fit

        arrays = _read_npz(input)
        if "pixel_values" in arrays:
            fail("logits: pixel_values need the vision encoder, which this version does not have")
        if "input_ids" not in arrays:
            fail(f"logits: input must have input_ids, got {sorted(arrays)}")
        ids = torch.from_numpy(arrays["input_ids"].astype(np.int64))
        mask = arrays.get("attention_mask")
        config = load_config(checkpoint)
        size = weights_bytes("logits", checkpoint, config, dtype)
        if ids.ndim == 2:
            require_fit(
                config, [ids.shape[1]] * len(ids), dtype=torch_dtype(dtype), device=where,
                weights_bytes=size,
            )  # fmt: skip
        model = load(checkpoint, config, dtype, where, parity)
        result = logits_of(
            model,
            ids,
            None if mask is None else torch.from_numpy(mask),
            blocks=_blocks(blocks),
        )
        with output.open("wb") as file:
            np.savez(file, logits=result.numpy())
        out.print(f"{escape(str(output))}: logits {tuple(result.shape)} float32")


def _read_npz(path: Path) -> dict[str, Any]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"logits: input must be an .npz of plain arrays, got {path}") from error


def _blocks(text: str) -> Sequence[int] | None:
    if not text:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"logits: blocks must be integers such as 7,9,1, got {text!r}") from None
