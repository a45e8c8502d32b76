"""The command `plan`: memory, GPUs and decode floor of a model, and the launches of one step."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .cli_console import errors, fail, out
from .cli_kernels import Model, Numbers, TensorParallel, shape_of

if TYPE_CHECKING:
    from llama4_triton.autotune.recorder import Recording
    from llama4_triton.model.cache_size import CacheFormat
    from llama4_triton.model.config import Llama4Config
    from llama4_triton.model.serving import ServingPlan

__all__ = ["app"]

app = typer.Typer()


class Weights(str, enum.Enum):
    bf16 = "bf16"
    fp8 = "fp8"
    int4 = "int4"


class Scales(str, enum.Enum):
    head = "head"
    token = "token"


@app.command()
def plan(
    model: Model = Model.scout,
    checkpoint: Annotated[
        Path | None, typer.Option(help="directory whose config.json is taken instead of a model")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="sequences")] = 1,
    context: Annotated[int, typer.Option(min=1, help="tokens of each, with the new ones")] = 8192,
    weights: Annotated[Weights, typer.Option(help="of the experts; the rest is bf16")] = (
        Weights.bf16
    ),
    kv: Annotated[Numbers, typer.Option(help="of both pools of the KV cache")] = Numbers.bf16,
    kv_global: Annotated[Numbers | None, typer.Option(help="of the global pool alone")] = None,
    kv_local: Annotated[Numbers | None, typer.Option(help="of the local pool alone")] = None,
    kv_scales: Annotated[Scales, typer.Option(help="of fp8 pools")] = Scales.head,
    gpus: Annotated[int | None, typer.Option(help="default: the fewest that have room")] = None,
    gpu_memory: Annotated[float, typer.Option(help="GB of each")] = 80.0,
    tp: TensorParallel = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="of each sequence in this step")] = 1,
    launches: Annotated[bool, typer.Option("--launches", help="list what the step runs")] = False,
) -> None:
    """What a model and its context need: memory, GPUs, and the time of a decode step at least.

    With --launches instead what one step of a full-size model runs on one of --tp GPUs.
    """
    with errors("plan"):
        if launches:
            if checkpoint is not None:
                fail("plan: --launches must be of a released model, got --checkpoint")
            _launches(model, tp, batch, context, new_tokens)
            return
        if (tp, new_tokens) != (1, 1):
            fail("plan: --tp and --new-tokens must come with --launches; --gpus is for memory")
        if not 0 < gpu_memory < 1e6:
            fail(f"plan: gpu-memory must be in (0, 1e6) GB, got {gpu_memory}")
        from llama4_triton.model.config import MAVERICK, SCOUT
        from llama4_triton.model.serving import serving_plan

        name, config = model.value, SCOUT if model is Model.scout else MAVERICK
        if checkpoint is not None:
            from llama4_triton.model.checkpoint import load_config

            name, config = str(checkpoint), load_config(checkpoint)
        format = _format(kv_global or kv, kv_local or kv, kv_scales)
        made = serving_plan(
            config,
            context=context,
            batch=batch,
            weights=weights.value,
            format=format,
            memory_per_gpu=int(gpu_memory * 1e9),
            gpus=gpus,
        )
        title = f"{name}: {batch} x {context:,} tokens, {weights.value} experts"
        out.print(_memory_table(title, config, made, format, context, batch))
        _print_gpus(made, asked=gpus is not None)
        _print_floor(made)
    if not made.fits:
        raise typer.Exit(1)


def _format(kv_global: Numbers, kv_local: Numbers, scales: Scales) -> CacheFormat:
    import torch

    from llama4_triton.model.cache_size import CacheFormat

    types = {Numbers.bf16: torch.bfloat16, Numbers.fp8: torch.float8_e4m3fn}
    return CacheFormat(
        global_dtype=types[kv_global], local_dtype=types[kv_local], scales=scales.value
    )


def _memory_table(
    title: str,
    config: Llama4Config,
    made: ServingPlan,
    format: CacheFormat,
    context: int,
    batch: int,
) -> Table:
    import torch

    from llama4_triton.model.serving import uniform_bytes

    names = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("GB", justify="right")
    table.add_column("", overflow="fold")
    active = config.parameter_counts()["active_text"] / 1e9
    table.add_row("weights", _gb(made.weights_bytes), f"{active:.1f}e9 parameters meet a token")
    layers = {"global": config.num_global_layers}
    layers["local"] = config.num_hidden_layers - layers["global"]
    kept = {"global": "every token", "local": f"a chunk of {config.attention_chunk_size} at most"}
    for pool, size in made.pools.items():
        what = f"{layers[pool]} layers, {kept[pool]}, {names[format.dtype(pool)]}"
        table.add_row(f"{pool} pool", _gb(size), what)
    cache = sum(made.pools.values())
    table.add_row("KV cache", _gb(cache), "both pools")
    for dtype, word in names.items():
        size = uniform_bytes(config, context, batch, dtype)
        table.add_row(
            f"uniform {word}", _gb(size), f"every token in every layer: {size / cache:.1f} x"
        )
    return table


def _print_gpus(made: ServingPlan, *, asked: bool) -> None:
    memory = f"{made.per_gpu_bytes / 1e9:.1f} of {made.memory_per_gpu / 1e9:.1f} GB on each"
    how = f"{made.tp}-way tensor parallelism"
    if made.groups > 1:
        how += f", experts and context over {made.groups} groups"
    verdict = "enough" if made.fits else "[red]not enough[/]"
    word = f"{verdict}: " if asked else ""
    out.print(
        f"{made.gpus} GPUs, {word}{memory}, activations of {_gb(made.activation_bytes)} GB "
        f"included ({how})",
        soft_wrap=True,
        highlight=False,
    )


def _print_floor(made: ServingPlan) -> None:
    kv_read = sum(made.pools_read.values())
    out.print(
        f"decode floor {made.floor_ms:.2f} ms per step (modelled, not measured): weights "
        f"{_gb(made.routed_read + made.other_read)} GB and KV {_gb(kv_read)} GB read over 3.35 "
        "TB/s of each GPU",
        soft_wrap=True,
        highlight=False,
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}"


def _launches(model: Model, tp: int, batch: int, context: int, new_tokens: int) -> None:
    import torch

    from llama4_triton.bench.shapes import Workload
    from llama4_triton.bench.steps import COPIES_PER_STEP, rank_config, record_step
    from llama4_triton.model.plan import memory_plan

    shape = shape_of(model, tp)
    if new_tokens > context:
        fail(f"plan: new-tokens must be at most context ({context}), got {new_tokens}")
    config = rank_config(shape, tp)
    needs = memory_plan(config, [context] * batch, dtype=torch.bfloat16)
    out.print(f"{model.value}, bf16, one of {tp} GPUs: {needs}", soft_wrap=True)
    workload = Workload(
        shape=shape,
        tp=tp,
        kind="decode" if new_tokens == 1 else "prefill",
        new_tokens=(new_tokens,) * batch,
        cached_tokens=(context - new_tokens,) * batch,
    )
    recording = record_step(workload)
    out.print(_launch_table(recording))
    out.print(
        f"{len(recording.launches)} Triton launches and {len(recording.aten)} cuBLAS GEMMs in "
        f"{config.num_hidden_layers} layers, {COPIES_PER_STEP} small copies to the device, "
        f"{recording.allocated_bytes / 1e6:.1f} MB allocated in {len(recording.allocations)} "
        "pieces, no synchronisation",
        soft_wrap=True,
    )


def _launch_table(recording: Recording) -> Table:
    """Equal calls in one row, in the order of their first."""
    from llama4_triton.autotune.launches import Launch

    rows: dict[tuple[str, str, str], int] = {}
    for call in recording.calls:
        if isinstance(call, Launch):
            tiles = {k: v for k, v in call.constexprs.items() if k.startswith("BLOCK")}
            config = " ".join(f"{k}={v}" for k, v in tiles.items())
            grid = " x ".join(map(str, call.grid))
            key = call.name, grid, f"{config} {call.num_warps} warps {call.num_stages} stages"
        else:
            key = "cuBLAS: " + call.name, "", str(call).partition("(")[2].rstrip(")")
        rows[key] = rows.get(key, 0) + 1
    table = Table()
    table.add_column("times", justify="right")
    for name in ("kernel", "grid", "config, or shapes"):
        table.add_column(name, overflow="fold")
    for (name, grid, config), count in rows.items():
        table.add_row(str(count), name, grid, config)
    return table
