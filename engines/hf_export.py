"""The kernels as a repository for Hugging Face's `kernels` package.

    OUT/README.md                           the model card
    OUT/build/torch-cuda/__init__.py        the functions, and `layers`
    OUT/build/torch-cuda/kernels/*.py       the files of kernels/, byte for byte
    OUT/build/torch-cuda/metadata.json
    OUT/build/torch-cpu/                    the same for Triton's interpreter: finds ../torch-cuda

`kernels` loads a build as a top-level module with the name of its `id`, and asks that its operators
be `torch.ops.<id>`: kernels/_library.py takes that name by itself. The id ends with a hash of all
that is exported, so that different builds and the installed package live in one process; the same
build at two paths has one id and shares its operators.

Variants: `torch-cuda` is what a CUDA build of torch loads. `torch-cpu` holds no second copy: it is
for the interpreter, from a local folder. The older name `torch-universal` would serve both, but
also offers the kernels to GPUs they are not for, and is to go (huggingface/kernels#190).
Source: https://huggingface.co/docs/kernels/kernel-requirements.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import textwrap
from pathlib import Path

import llama4_triton

__all__ = ["LAYERS", "export_hf_kernel"]

LAYERS = ("Llama4TextMoe", "Llama4TextRMSNorm", "Llama4TextMLP")
SOURCES = Path(__file__).parents[1] / "kernels"
NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"

CUDA = {"type": "cuda", "archs": ["7.5+PTX"]}  # Triton compiles for the GPU there is
CPU = {"type": "cpu"}

INIT = '''"""Triton kernels for Llama 4, from llama4-triton {version}."""

import os
{elsewhere}
if os.environ.get("TRITON_INTERPRET") == "1":
    from .kernels.interpreter import install

    install()  # before any kernel is imported: Triton's interpreter computes bf16 wrongly without

{imports}

__all__ = {names}
'''

ELSEWHERE = """from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "torch-cuda")]
if not (Path(__path__[0]) / "kernels").is_dir():
    raise ImportError(
        "{name}: build/torch-cuda must lie beside build/torch-cpu, which is only for Triton's "
        "interpreter: clone the whole repository, or use a CUDA build of torch"
    )
"""

CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernels
- triton
- llama4
---

# {name}

Triton kernels for Llama 4 on NVIDIA GPUs, H100 first: routing, grouped expert GEMM, FP8 matmul,
chunked and long-context attention. Written by llama4-triton {version}; version {number} of this
repository. For inference. Needs Python 3.10, torch 2.11, Triton 3.6 and kernels 0.14, or newer.

```python
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping
from kernels import replace_kernel_forward_from_hub
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

kernel = get_local_kernel(Path("."))  # or get_kernel("<owner>/{name}", version={number})
y = kernel.rms_norm(x, weight, 1e-5)

replace_kernel_forward_from_hub(Llama4TextMoe, "Llama4TextMoe")
layer = LocalLayerRepository(repo_path=Path("."), layer_name="Llama4TextMoe")
with use_kernel_mapping({{"Llama4TextMoe": {{"cuda": layer}}}}):
    model = kernelize(model, mode=Mode.INFERENCE, device="cuda")
```

Layers of transformers' Llama 4, whose activation must be SiLU: {layers}.

Functions, whose docstrings say what they compute, in which layouts and with which roundings
(`build/torch-cuda/kernels/reference.py` has the same in plain PyTorch):
{functions}.

The operators are registered as `torch.ops.{id}`. On a machine without a GPU
they run on Triton's interpreter (TRITON_INTERPRET=1): right, and slow.
"""


def export_hf_kernel(out: Path, *, name: str = "llama4-triton", version: int = 1) -> str:
    """Write a kernel repository to `out`, and return its id, the namespace of its operators.

    Args:
        out: a folder that is empty or does not exist.
        name: of the kernel, lower case; dashes become underscores in the id.
        version: of its interface, for `get_kernel`; the Hub keeps it as the branch v<version>.
    Raises:
        ValueError: name, version, or `out` is not empty.
    The same sources, name and version give the same bytes.
    """
    op = "export-hf-kernel"
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{op}: name must be lower case, as llama4-triton, got {name!r}")
    if version < 0:
        raise ValueError(f"{op}: version must be >= 0, got {version}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{op}: out must be an empty folder or a new one, got {out}")

    exports = _functions()
    kernels = {f"kernels/{file.name}": file.read_bytes() for file in sorted(SOURCES.glob("*.py"))}
    cuda = {"__init__.py": _init(exports, "").encode(), **kernels}
    cpu = {"__init__.py": _init(exports, ELSEWHERE.format(name=name)).encode()}
    hashed = _digests({**cuda, "name": name.encode(), "version": str(version).encode()})
    short = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]
    id = f"{name.replace('-', '_')}_{short}"

    files = {"README.md": _card(name, version, id, exports).encode()}
    for variant, backend, content in (("torch-cuda", CUDA, cuda), ("torch-cpu", CPU, cpu)):
        metadata = {
            "id": id,
            "name": name,
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": backend,
            "digest": {"algorithm": "sha256", "files": _digests(content)},
        }
        content = {**content, "metadata.json": (json.dumps(metadata, indent=2) + "\n").encode()}
        files |= {f"build/{variant}/{path}": data for path, data in content.items()}
    for path, data in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    return id


def _functions() -> dict[str, list[str]]:
    """By module of kernels/, the names that the package offers of it."""
    names: dict[str, list[str]] = {}
    for name, module in llama4_triton._EXPORTS.items():
        folder, _, file = module.partition(".")
        if folder == "kernels":
            names.setdefault(file, []).append(name)
    return {module: sorted(names[module]) for module in sorted(names)}


def _init(exports: dict[str, list[str]], elsewhere: str) -> str:
    imports = ["from .kernels import layers"]
    for file, offered in exports.items():
        imports.append(f"from .kernels.{file} import {', '.join(offered)}")
    names = sorted({"layers"}.union(*exports.values()))
    return INIT.format(
        version=llama4_triton.__version__,
        elsewhere=elsewhere,
        imports="\n".join(imports),
        names=json.dumps(names, indent=4),
    )


def _card(name: str, version: int, id: str, exports: dict[str, list[str]]) -> str:
    functions = sorted(n for names in exports.values() for n in names if n[0].islower())
    return CARD.format(
        name=name,
        number=version,
        id=id,
        version=llama4_triton.__version__,
        layers=", ".join(f"`{layer}`" for layer in LAYERS),
        functions=textwrap.fill(", ".join(f"`{function}`" for function in functions), 100),
    )


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    """sha256 of each file in base64, as metadata.json wants it."""
    return {
        path: base64.b64encode(hashlib.sha256(data).digest()).decode()
        for path, data in sorted(files.items())
    }
