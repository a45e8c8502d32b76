"""Hugging Face safetensors checkpoints of the text model.

A checkpoint is somebody else's file. Every header is read and checked against the config before
the first byte of tensor data is read or allocated: names, shapes, data types, offsets, total
size, and that no path leaves the directory. Pickle files (.bin, .pt, .pth) are refused; nothing
here unpickles. Error messages show names, shapes and sizes, never other contents of a file.

Names: the multimodal release has the text model under `language_model.`; the text-only class does
not. Vision tensors are skipped by prefix. Layout of the experts: `experts.gate_up_proj` is
(E, H, 2F), gate first, and `experts.down_proj` is (E, F, H), transposed against every nn.Linear.
Checkpoints in compressed-tensors' style have them one by one, in e4m3: fp8_checkpoint.py.

File format: 8 bytes little-endian header length, a JSON header, the data without holes
(github.com/huggingface/safetensors).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .config import Llama4Config
from .fp8_checkpoint import FLOATS, dtypes_of, model_tensors, stored_names, stored_shapes
from .safetensors_file import (
    MAX_TENSORS,
    CheckpointError,
    Tensor,
    parse_json,
    read_header,
    read_tensor,
    show,
)

__all__ = [
    "CheckpointError",
    "Tensor",
    "expected_shapes",
    "file_in",
    "load_config",
    "load_model",
    "load_state",
    "scan",
]

INDEX_NAME = "model.safetensors.index.json"
VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_SHARDS = 1000
MAX_TOTAL_BYTES = 2**42

_Model = TypeVar("_Model", bound=nn.Module)


def expected_shapes(config: Llama4Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model by its text-only name, in the order of a forward pass."""
    H, D = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    E, ffn = config.num_local_experts, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, H)}

    def mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, H)
        shapes[f"{prefix}.up_proj.weight"] = (width, H)
        shapes[f"{prefix}.down_proj.weight"] = (H, width)

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (H,)
        for name, shape in {"q": (q, H), "k": (kv, H), "v": (kv, H), "o": (H, q)}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        shapes[f"{layer}.post_attention_layernorm.weight"] = (H,)
        if config.is_moe_layer(i):
            shapes[f"{layer}.feed_forward.router.weight"] = (E, H)
            shapes[f"{layer}.feed_forward.experts.gate_up_proj"] = (E, H, 2 * ffn)
            shapes[f"{layer}.feed_forward.experts.down_proj"] = (E, ffn, H)
            mlp(f"{layer}.feed_forward.shared_expert", ffn)
        else:
            mlp(f"{layer}.feed_forward", config.intermediate_size_mlp or 0)
    shapes["model.norm.weight"] = (H,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, H)
    return shapes


def load_config(directory: str | Path) -> Llama4Config:
    """The model's config from `directory`/config.json.

    Raises:
        CheckpointError: no readable JSON object there.   ConfigError: not a Llama 4 config.
    """
    directory = _directory(directory)
    data = _read_json(file_in(directory, "config.json"), MAX_CONFIG_BYTES)
    return Llama4Config.from_hf(data)


def scan(
    directory: str | Path, config: Llama4Config, *, max_bytes: int = MAX_TOTAL_BYTES
) -> dict[str, Tensor]:
    """Find and check every tensor of the text model without reading or allocating its data.

    Args:
        max_bytes: the most that all files together may declare, vision included.
    Returns:
        Text-only name -> where it is, in the order of `expected_shapes`; of e4m3 weights with
        their scales, and experts one by one if the files have them so.
    Raises:
        CheckpointError: see the module.
    """
    directory = _directory(directory)
    shards, weight_map = _shards(directory)
    expected = expected_shapes(config)
    known = stored_shapes(expected)
    found: dict[str, Tensor] = {}
    total = count = 0
    for path in shards:
        header = read_header(path)
        count += len(header)
        total += sum(tensor.nbytes for tensor in header.values())
        if count > MAX_TENSORS:
            raise CheckpointError(f"checkpoint: must have <= {MAX_TENSORS} tensors, got more")
        if total > max_bytes:
            raise CheckpointError(
                f"checkpoint: declared bytes must be <= {max_bytes}, got {total} so far"
            )
        for name, tensor in header.items():
            if weight_map is not None and weight_map.get(name) != path.name:
                raise CheckpointError(
                    f"checkpoint: {show(name)} must be listed in {INDEX_NAME} under the file "
                    f"that holds it ({show(path.name)}), got another entry or none"
                )
            if name.startswith(VISION_PREFIXES):
                continue
            key = name.removeprefix("language_model.")
            if key in found:
                raise CheckpointError(f"checkpoint: {show(key)} must be given once, got it twice")
            if key == "lm_head.weight" and config.tie_word_embeddings:
                _check(tensor, expected["model.embed_tokens.weight"])
                continue
            if key not in known:
                hint = " (of FP8, weight_scale of projections is known)" if "_scale" in key else ""
                raise CheckpointError(
                    f"checkpoint: tensors must belong to the config's model, got {show(name)}{hint}"
                )
            _check(tensor, known[key], dtypes_of(key))
            found[key] = tensor
        for name, file in (weight_map or {}).items():
            if file == path.name and name not in header:
                raise CheckpointError(
                    f"checkpoint: {show(path.name)} must hold {show(name)} as {INDEX_NAME} "
                    "says, got no such tensor"
                )
    names = stored_names(expected, found)
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"checkpoint: every tensor must be there, got none named {show(missing[0])} and "
            f"{len(missing) - 1} more missing"
        )
    return {name: found[name] for name in names}


def load_state(
    directory: str | Path,
    config: Llama4Config,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_bytes: int = MAX_TOTAL_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (text-only name, tensor) one by one, after everything has been checked.

    Experts that are e4m3 stay so, each tensor followed by its scales: `gate_up_proj`,
    `gate_up_scale`, `down_proj`, `down_scale` (fp8_checkpoint.py).

    Args:
        dtype: cast to it, all but e4m3 experts; None keeps the file's, and makes bf16 of other
            e4m3 weights.
        progress: called with (bytes read, bytes in all).
    Raises:
        CheckpointError: see the module; before the first tensor, except for a file that shrinks
            and for scales that are not finite and positive.
    """
    tensors = scan(directory, config, max_bytes=max_bytes)  # now, not at the first next()

    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def read(tensor: Tensor) -> torch.Tensor:
        nonlocal done
        values = read_tensor(tensor)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
        return values

    def state() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in expected_shapes(config).items():
            yield from model_tensors(name, shape, tensors, read, dtype=dtype, device=device)

    return state()


def load_model(
    directory: str | Path,
    model_class: Callable[..., _Model],
    *,
    config: Llama4Config | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    max_bytes: int = MAX_TOTAL_BYTES,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> _Model:
    """Build `model_class(config, **options)` without memory and fill it tensor by tensor.

    Args:
        config: None reads the checkpoint's own.
        dtype: of the parameters, but for e4m3 experts and their scales. Only parameters are cast;
            what a model computes in fp32 (RoPE frequencies) it must build on an explicit device,
            as it is made under device "meta". e4m3 experts want bf16 or fp16, and no `.to(dtype)`
            of the model afterwards, which would convert them too.
        progress: called with (bytes read, bytes in all).
    """
    config = load_config(directory) if config is None else config
    state = load_state(
        directory, config, dtype=dtype, device=device, max_bytes=max_bytes, progress=progress
    )
    with torch.device("meta"):
        model = model_class(config, **options)
    for name, tensor in state:
        _assign(model, name, tensor)
    if config.tie_word_embeddings:
        model.get_submodule("lm_head").weight = model.get_parameter("model.embed_tokens.weight")
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    empty += [name for name, b in model.named_buffers() if b.is_meta]
    if empty:
        raise CheckpointError(f"checkpoint: must fill the model, got no values for {empty[0]}")
    return model.eval()


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _check(tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"checkpoint: {show(tensor.name)} must have shape {shape}, got {tensor.shape}"
        )
    if tensor.dtype not in dtypes:
        types = f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
        raise CheckpointError(
            f"checkpoint: {show(tensor.name)} must be {types}, got {tensor.dtype}"
        )


def _directory(directory: str | Path) -> Path:
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: directory must exist, got {str(path)!r}")
    return path.resolve()


def file_in(directory: Path, name: str) -> Path:
    """The regular file `name` of `directory` (resolved); symlinks must not lead out of it.

    One exception: Hugging Face's own cache, where snapshots/<revision>/<name> is a link to
    ../../blobs/<hash>.
    """
    path = directory / name
    # NUL makes resolve() raise; the others make `name` more than a file name.
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"checkpoint: file names must be plain, got {show(name)}")
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError):
        raise CheckpointError(f"checkpoint: {show(name)} must exist, got no such file") from None
    blobs = directory.parent.parent / "blobs" if directory.parent.name == "snapshots" else None
    if target.parent not in (directory, blobs):
        raise CheckpointError(
            f"checkpoint: {show(name)} must lie in its directory, got a link out of it"
        )
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"checkpoint: {show(name)} must be a regular file, got another kind")
    return path


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise CheckpointError(f"checkpoint: {path.name} must be <= {limit} bytes, got more")
    return parse_json(text, path.name)


def _shards(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files to read, and the index's map from tensor to file if there is an index."""
    names = sorted(entry.name for entry in os.scandir(directory))
    if INDEX_NAME not in names:
        found = [name for name in names if name.endswith(".safetensors")]
        if len(found) > 1 and "model.safetensors" in found:
            found = ["model.safetensors"]
        if len(found) == 1:
            return [file_in(directory, found[0])], None
        if not found and any(name.endswith(PICKLE_SUFFIXES) for name in names):
            raise CheckpointError(
                "checkpoint: must be safetensors, got pickle files, which can run code when they "
                "are loaded (convert them with save_pretrained(safe_serialization=True))"
            )
        raise CheckpointError(
            f"checkpoint: must be one .safetensors file or have {INDEX_NAME}, got "
            f"{len(found)} files and no index"
        )
    index = _read_json(file_in(directory, INDEX_NAME), MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise CheckpointError(
            f"checkpoint: {INDEX_NAME} must have an object weight_map of file names, got none"
        )
    files = sorted(set(weight_map.values()))
    if not 1 <= len(files) <= MAX_SHARDS:
        raise CheckpointError(f"checkpoint: must have 1..{MAX_SHARDS} shards, got {len(files)}")
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"checkpoint: shards must be .safetensors files, got {show(file)}"
            )
    return [file_in(directory, file) for file in files], weight_map
