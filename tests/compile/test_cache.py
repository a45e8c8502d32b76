"""The cache of reports: nothing is compiled twice, and processes do not disturb each other."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from llama4_triton.autotune import compile as lane
from llama4_triton.autotune.compile import artifacts, compile_all, compile_launch
from llama4_triton.autotune.manifest import write_manifest
from llama4_triton.autotune.recorder import record
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.compiled_only


def launch_of(F=1024, T=16):
    gate = functools.partial(torch.empty, (T, F), dtype=torch.bfloat16, device="cuda")
    (launch,) = record(lambda: swiglu(gate(), gate())).launches
    return launch


def compile_into(folder, launch):
    """In a process of its own: into a cache of its own choice."""
    os.environ["TRITON_CACHE_DIR"] = folder
    return compile_launch(launch, "sm_90")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def disassemblies(monkeypatch):
    """Counts what reaches the disassembler, that is, is not found in the cache."""
    calls = []
    original = lane._disassembled
    monkeypatch.setattr(lane, "_disassembled", lambda cubin: calls.append(1) or original(cubin))
    return calls


def test_a_report_is_made_once(cache, disassemblies):
    launch = launch_of()
    first = compile_launch(launch)
    assert compile_launch(launch) == first and compile_launch(launch_of(T=7)) == first
    assert len(disassemblies) == 1
    compile_launch(launch_of(F=1025))
    assert len(disassemblies) == 2  # an odd size is another binary
    assert set(artifacts(first)) == {"cubin", "ptx", "ttgir"}


def test_equal_binaries_are_compiled_once(cache, disassemblies):
    seen = []
    results = compile_all(
        [launch_of(T=3), launch_of(T=5)], on_done=lambda binary, report: seen.append(binary)
    )
    assert len(results) == len(seen) == len(disassemblies) == 1


def test_a_report_without_its_binary_is_made_again(cache, disassemblies):
    launch = launch_of()
    report = compile_launch(launch)
    shutil.rmtree(artifacts(report)["cubin"].parent)
    assert compile_launch(launch) == report
    assert len(disassemblies) == 2 and artifacts(report)["cubin"].exists()


def test_a_damaged_report_is_made_again(cache, disassemblies):
    launch = launch_of()
    report = compile_launch(launch)
    (path,) = cache.glob(f"*/{lane.REPORT}")
    path.write_text(path.read_text()[:100])
    assert compile_launch(launch) == report and len(disassemblies) == 2


def test_another_reader_means_another_report(cache, disassemblies, monkeypatch):
    compile_launch(launch_of())
    monkeypatch.setattr(lane, "_reader", lambda: "changed")
    compile_launch(launch_of())
    assert len(disassemblies) == 2


def test_two_processes_share_a_cache(cache):
    launch = launch_of()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        one, two = pool.map(compile_into, [str(cache)] * 2, [launch] * 2)
    assert one == two == compile_launch(launch)
    assert len(list(cache.glob(f"*/{lane.REPORT}"))) == 1
    assert not list(cache.glob("*/tmp.*"))


def test_a_manifest_describes_its_files(cache, tmp_path):
    launches = [launch_of(), launch_of(F=1025), launch_of(T=1)]
    rows = write_manifest(launches, compile_all(launches), tmp_path / "out", "sm_90")
    assert [row["specialisation"] for row in rows] == ["aligned", "ragged"]
    for row in rows:
        assert row["gate"] == "pass" and row["faults"] == [] and row["kernel"] == "_swiglu_kernel"
        assert row["dtypes"] == ["bf16"] and row["arch"] == "sm_90" and row["spills"] == 0
        assert (tmp_path / "out" / row["cubin"]).read_bytes()[:4] == b"\x7fELF"
        for kind in ("ptx", "ttgir"):
            assert (tmp_path / "out" / f"{row['name']}.{kind}").stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".cubin") == sorted(
        row["cubin"] for row in rows
    )
    assert (tmp_path / "out" / "manifest.json").exists()


def test_the_manifest_has_what_does_not_compile(tmp_path):
    launch = launch_of()
    failed = {launch.binary(): lane.CompileFailed("_swiglu_kernel on sm_90: no")}
    (row,) = write_manifest([launch], failed, Path(tmp_path), "sm_90")
    assert row["gate"] == "fail" and row["cubin"] is None
    assert row["faults"] == ["_swiglu_kernel on sm_90: no"]
