"""Decode kernels with a fault each, to show that the tests which are for it turn red."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from llama4_triton.kernels import _library, attention_decode

__all__ = ["FAULTS", "faulty"]

# id: what the tile of keys says, and what it says instead
FAULTS = {
    "int32-pages": (
        "return page.to(tl.int64), first.to(tl.int64), slot.to(tl.int64)",
        "return page, first, slot",
    ),
    "one-level": ("TWO_LEVELS: tl.constexpr = k.dtype == tl.float8e4nv", "TWO_LEVELS = False"),
}


def _load(name: str, text: str, folder: Path) -> ModuleType:
    """A module of that source, in a file: Triton reads the source of what it compiles."""
    path = folder / f"{name}.py"
    path.write_text(text.replace("from .", "from llama4_triton.kernels."), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def faulty(fault: str) -> Iterator[None]:
    """Launch the kernel with that fault in place of the right one."""
    said, instead = FAULTS[fault]
    right = attention_decode._attention_decode_kernel
    kernels = Path(attention_decode.__file__).parent
    tile = (kernels / "_attention_decode_tile.py").read_text(encoding="utf-8")
    assert tile.count(said) == 1
    text = (kernels / "attention_decode.py").read_text(encoding="utf-8")
    text = text[: text.index("_attention_decode = define(")]  # the operator is there once already
    text = text.replace("from ._attention_decode_tile", "from faulty_decode_tile")
    with tempfile.TemporaryDirectory() as folder:
        _load("faulty_decode_tile", tile.replace(said, instead), Path(folder))
        wrong = _load("faulty_decode", text, Path(folder))
        known = _library.programs["attention_decode"]  # which name the right kernel
        known.clear()
        attention_decode._attention_decode_kernel = wrong._attention_decode_kernel
        try:
            yield
        finally:
            known.clear()
            attention_decode._attention_decode_kernel = right
            del sys.modules["faulty_decode_tile"], sys.modules["faulty_decode"]
