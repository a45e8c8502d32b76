"""What the commands that run a model share: their options, the device, and loading a checkpoint.

Importing this file loads neither torch nor a kernel: `device` must have turned the interpreter on
before the first kernel file is imported.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .cli_console import err

if TYPE_CHECKING:
    import torch

    from llama4_triton.model.config import Llama4Config
    from llama4_triton.model.llama4 import Llama4

__all__ = [
    "Checkpoint",
    "DType",
    "ParityName",
    "device",
    "executor",
    "load",
    "torch_dtype",
    "weights_bytes",
]


class DType(str, enum.Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Checkpoint = Annotated[Path, typer.Option(help="directory of a Llama 4 checkpoint in HF format")]
ParityName = Annotated[
    str,
    typer.Option(
        "--parity",
        help="engine to follow where engines differ: default, hf, vllm, sglang or meta; with "
        "fields changed: hf,rope_positions=chunk",
    ),
]


def device() -> torch.device:
    """The first GPU, or the CPU with the interpreter turned on."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    from llama4_triton.kernels import interpreter

    interpreter.install()
    return torch.device("cpu")


def executor(device: torch.device) -> str:
    """What runs kernels there, in words."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, Triton's compiler"
    return "no GPU found: Triton's interpreter on the CPU (right, and slow)"


def torch_dtype(dtype: DType) -> torch.dtype:
    import torch

    return getattr(torch, dtype.value)


def weights_bytes(command: str, checkpoint: Path, config: Llama4Config, dtype: DType) -> int:
    """Memory of the checkpoint's weights once loaded; its headers are checked.

    Raises:
        ValueError: e4m3 experts, which the kernels multiply with 16-bit activations, in float32.
    """
    from llama4_triton.model.checkpoint import scan
    from llama4_triton.model.fp8_checkpoint import has_e4m3, loaded_bytes

    tensors = scan(checkpoint, config)
    if dtype is DType.float32 and has_e4m3(tensors, ".experts."):
        raise ValueError(
            f"{command}: --dtype must be bfloat16 or float16 for a checkpoint with e4m3 experts, "
            "got float32"
        )
    return loaded_bytes(tensors, torch_dtype(dtype))


def load(
    checkpoint: Path, config: Llama4Config, dtype: DType, device: torch.device, parity: str
) -> Llama4:
    """The model on the kernels, with a progress bar over the checkpoint's bytes."""
    from llama4_triton.model.checkpoint import load_model
    from llama4_triton.model.llama4 import Llama4
    from llama4_triton.model.presets import parity_of

    followed = parity_of(parity)  # a mistake is said before anything is read
    with _progress("loading") as update:
        return load_model(
            checkpoint,
            Llama4,
            config=config,
            dtype=torch_dtype(dtype),
            device=device,
            progress=update,
            parity=followed,
        )


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
