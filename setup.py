"""All metadata of the distribution; pyproject.toml holds the build system and tool settings.

The checkout itself is the package `llama4_triton`: its root `__init__.py` is the package's, and
every folder below is a subpackage. `kernels/` has no `__init__.py` on purpose: as a regular
top-level package in the current folder it would shadow Hugging Face's `kernels`, which
transformers imports (tests/test_package.py holds this).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithoutSetup(build_py):
    """Leaves this file out of the wheel, although it lies in the package's folder."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "setup"]


setup(
    name="llama4-triton",
    version="0.1.0",
    description="Triton kernels for Llama 4: MoE, FP8 and chunked long-context attention",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"llama4_triton": "."},
    packages=[
        "llama4_triton",
        "llama4_triton.autotune",
        "llama4_triton.bench",
        "llama4_triton.engines",
        "llama4_triton.kernels",
        "llama4_triton.model",
    ],
    package_data={"llama4_triton": ["py.typed"]},
    cmdclass={"build_py": BuildWithoutSetup},
    install_requires=["torch>=2.11", "triton>=3.6,<4", "numpy", "safetensors>=0.5"],
    extras_require={
        "cli": ["typer>=0.12", "rich>=13"],
        "text": ["tokenizers>=0.20", "tiktoken>=0.7"],
        "dev": [
            "build",
            "hypothesis",
            "kernels>=0.12",
            "mypy",
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "transformers==5.23.0",
        ],
    },
    entry_points={"console_scripts": ["llama4-triton = llama4_triton.__main__:main"]},
)
