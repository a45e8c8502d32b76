"""Installing beside an engine leaves every version that its own resolution picks.

Asks the package index, so it runs only with LLAMA4_TRITON_PIP=1 and --long. pip resolves from
metadata, a few MB; nothing is installed and no wheel is downloaded (docs/engines.md).
"""

from __future__ import annotations

import json
import os
import venv

import pytest
from support.installs import built_wheel, pip

pytestmark = [
    pytest.mark.no_kernels,
    pytest.mark.long,
    pytest.mark.skipif(
        os.environ.get("LLAMA4_TRITON_PIP") != "1",
        reason="asks the package index: set LLAMA4_TRITON_PIP=1",
    ),
]

RESOLVE = ("install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:",
           "--use-feature=fast-deps")  # fmt: skip


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Resolves packages with pip 26, whose dry run reads metadata only."""
    folder = tmp_path_factory.mktemp("pip")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip("install", "--quiet", "pip>=26", python=python)

    def resolved(*packages):
        report = folder / "report.json"
        pip(*RESOLVE, "--report", report, *packages, python=python)
        found = (entry["metadata"] for entry in json.loads(report.read_text())["install"])
        return {metadata["name"]: metadata["version"] for metadata in found}

    return resolved, f"{built_wheel(folder)}[cli,text]"


@pytest.mark.parametrize(
    "engine",
    ["vllm==0.33.0", "sglang==0.5.23", "transformers[torch]==5.23.0"],
    ids=["vllm", "sglang", "transformers"],
)
def test_an_engine_keeps_its_versions(beside, engine):
    resolved, ours = beside
    alone, both = resolved(engine), resolved(engine, ours)
    assert {"torch", "triton", "transformers"} <= set(alone)
    assert {name: both.get(name) for name in alone} == alone
    assert "llama4-triton" in set(both) - set(alone)
