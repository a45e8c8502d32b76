"""doctor: without a GPU, on a GPU that is not there, and what it finds wrong."""

from __future__ import annotations

import json
import types

import pytest
import torch
import triton

from llama4_triton.bench import doctor, selftest
from llama4_triton.bench.doctor import driver_verdict, examine, gpu_facts, kernel_paths, versions
from llama4_triton.kernels import _launch, _paths, _records
from llama4_triton.kernels._environment import environment
from llama4_triton.kernels._launch import DeviceProperties

pytestmark = pytest.mark.no_kernels


def by_topic():
    return {finding.topic: finding for finding in examine()}


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Records and the cache in a folder of the test's own."""
    monkeypatch.setenv("LLAMA4_TRITON_HOME", str(tmp_path / "home"))
    environment.cache_clear()
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        yield tmp_path
    monkeypatch.undo()
    environment.cache_clear()
    _records._covered.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """An H100 as torch describes one; returns a function that changes it."""

    def make(capability=(9, 0), driver="570.124.06"):
        known = DeviceProperties(
            sm_count=132, capability=capability, shared_bytes=232_448, bandwidth=3.35e12
        )
        about = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: about.name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        monkeypatch.setattr(_launch, "device_properties", lambda device: known)
        monkeypatch.setattr(_records, "driver_version", lambda: driver)
        _records._covered.cache_clear()

    make()
    return make


def test_without_a_gpu_it_says_so(no_gpu):
    found = by_topic()
    assert found["GPU"].value == "none" and found["GPU"].verdict == "note"
    assert "Triton's interpreter" in found["GPU"].why
    assert found["torch"].value == torch.__version__ and found["triton"].value == triton.__version__
    assert found["ptxas"].value.startswith("CUDA 1")
    assert not [finding for finding in examine() if finding.verdict == "fault"]
    assert set(kernel_paths()) == set(_paths.OPS)


def test_versions_are_those_of_what_runs():
    from llama4_triton import __version__

    facts = versions()
    assert facts["llama4-triton"] == __version__ and len(facts["source"]) == 64
    major, minor = map(int, facts["ptxas"].split("."))
    assert major >= 12 and minor >= 0


def test_a_driver_that_only_another_torch_can_use(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(_records, "driver_version", lambda: "550.54.15")
    assert "there is a driver 550.54.15, but torch sees no GPU" in by_topic()["GPU"].why


def test_a_gpu_with_all_that_it_needs(gpu):
    found = by_topic()
    assert found["GPU"].value == "NVIDIA H100 80GB HBM3"
    assert found["GPU"].why == "sm_90, 132 SMs, 232,448 B of shared memory per block, 80 GiB"
    assert found["GPU"].verdict == "ok"
    assert found["driver for that machine code"].value == "570.124.06"
    assert "float8_e4m3fn" not in found
    assert found["selftest record"].value == "none"
    why = "run llama4-triton selftest --gpu; until then off: last_arriver, warp_specialisation"
    assert found["selftest record"].why == why


def test_an_older_gpu(gpu):
    gpu(capability=(8, 0))
    assert "UnsupportedArchitectureError" in by_topic()["float8_e4m3fn"].why
    gpu(capability=(7, 0))
    assert by_topic()["GPU"].verdict == "fault"


def test_a_record_that_covers_this_gpu(gpu, monkeypatch):
    monkeypatch.setitem(_paths.OPS, "moe", frozenset({"tma", "pdl", "warp_specialisation"}))
    found = by_topic()["selftest record"]
    assert found.verdict == "note" and found.why.endswith(
        "until then off: pdl, warp_specialisation"
    )
    assert "without pdl, warp_specialisation" in kernel_paths()["moe"][1]
    file = _records.write_record(torch.device("cuda", 0), ["pdl"])
    found = by_topic()["selftest record"]
    assert (found.value, found.verdict) == (str(file), "ok")
    assert found.why == "this GPU passed; on: pdl"
    assert "without warp_specialisation" in kernel_paths()["moe"][1]
    gpu(driver="575.51.03")  # another driver: nothing is known of it
    assert by_topic()["selftest record"].value == "none"


# driver, ptxas -> verdict, part of the reason
DRIVERS = [
    ("570.124.06", "12.8", "ok", "needs 525.60.13"),
    ("525.60.13", "12.8", "note", "older than CUDA 12.8's own driver 570.26"),
    ("525.60.12", "12.8", "fault", "the driver must be 525.60.13 or newer"),
    ("575.51.03", "13.1", "fault", "the driver must be 580.65.06 or newer"),
    ("580.65.06", "13.1", "note", "590.44.01"),
    ("580.65.06", "13.9", "ok", "needs 580.65.06"),
    ("570.26", "14.0", "note", "not known"),
    ("", "12.8", "note", "not known"),
    ("CUDA 12040", "12.8", "ok", "runs CUDA 12"),
    ("CUDA 12080", "13.0", "note", "not known"),
]


@pytest.mark.parametrize("driver, release, verdict, why", DRIVERS)
def test_the_driver_against_ptxas(driver, release, verdict, why):
    found = driver_verdict(driver, release)
    assert found.verdict == verdict and why in found.why


def test_the_cache(no_gpu, home, monkeypatch):
    assert by_topic()["Triton cache"].why == "empty: the first call of each kernel compiles"
    (home / "cache" / "KEY").mkdir(parents=True)
    (home / "cache" / "KEY" / "kernel.cubin").touch()
    found = by_topic()["Triton cache"]
    assert (found.verdict, found.why) == ("ok", "1 binaries")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert by_topic()["Triton cache"].verdict == "fault"


def test_settings(no_gpu, monkeypatch):
    for name, value in (("DEBUG", "1"), ("NO_JIT", "1"), ("PATH", "moe=safe")):
        monkeypatch.setenv(f"LLAMA4_TRITON_{name}", value)
    environment.cache_clear()
    found = by_topic()
    assert "every launch waits" in found["LLAMA4_TRITON_DEBUG"].why
    assert "is an error" in found["LLAMA4_TRITON_NO_JIT"].why
    assert found["LLAMA4_TRITON_PATH"].value == "moe=safe"


def test_an_untested_triton(no_gpu, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert by_topic()["triton"].verdict == "note"


def test_facts_of_a_gpu_for_a_report(gpu, monkeypatch):
    said = {"nvidia-smi": "1980, 2619, 1980, 2619\n"}
    output = doctor._output
    monkeypatch.setattr(doctor, "_output", lambda c: said.get(c[0]) or output(c))
    facts = gpu_facts(torch.device("cuda", 0))
    assert facts["clocks_mhz"] == {
        "clocks.sm": 1980, "clocks.mem": 2619, "clocks.max.sm": 1980, "clocks.max.mem": 2619
    }  # fmt: skip
    assert facts["capability"] == [9, 0] and facts["memory_bytes"] == 80 * 2**30
    said["nvidia-smi"] = "[N/A], 2619, 1980, 2619\n"
    assert gpu_facts(torch.device("cuda", 0))["clocks_mhz"] is None
    documented = selftest.__doc__.partition("one JSON object:")[2]
    for name in set(facts) - {"llama4-triton", "ptxas"}:
        assert name in documented, name


@pytest.fixture
def cli(monkeypatch):
    testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
    from llama4_triton.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: testing.CliRunner().invoke(app, list(args))


def test_the_command(no_gpu, cli):
    result = cli("doctor")
    assert result.exit_code == 0
    for text in (torch.__version__, "GPU", "none", "attention_decode", "the default"):
        assert text in result.output
    data = json.loads(cli("doctor", "--json").output)
    assert {f["topic"]: f["value"] for f in data["findings"]}["GPU"] == "none"
    assert data["paths"]["moe"]["path"] == "fast"
