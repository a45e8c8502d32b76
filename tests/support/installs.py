"""This project's wheel, and a Python that has this environment's packages but not the project."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["bare_python", "built_wheel", "pip"]

ROOT = Path(__file__).resolve().parents[2]


def bare_python(folder: Path) -> Path:
    """A new environment that sees this one's packages, but none of its editable installs."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    parents = [p for p in sys.path if p.endswith("site-packages")]
    (site / "parent.pth").write_text("\n".join(parents))
    return python


def built_wheel(folder: Path) -> Path:
    """Build from a copy: setuptools would leave build/ and an egg-info in the checkout."""
    unrelated = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=unrelated)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, folder / "checkout")
    return next(folder.glob("*.whl"))


def pip(*args: str | Path, python: str | Path = sys.executable) -> None:
    """Run pip, away from the checkout."""
    command = [python, "-m", "pip", *args]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"pip {' '.join(map(str, args))}: {result.stderr}")
