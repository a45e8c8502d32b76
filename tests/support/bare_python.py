"""A Python that has this environment's packages and not this project."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

__all__ = ["bare_python"]


def bare_python(folder: Path) -> Path:
    """A new environment that sees this one's packages, but none of its editable installs."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    parents = [p for p in sys.path if p.endswith("site-packages")]
    (site / "parent.pth").write_text("\n".join(parents))
    return python
