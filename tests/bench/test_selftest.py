"""The first run on a GPU, rehearsed on a fake one: what fails is named, and the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.fake_gpu import FakeGpu

from llama4_triton.bench import selftest, selftest_command, worker
from llama4_triton.bench.ops import OPS
from llama4_triton.bench.runner import NoWorker, Request, Result, Runner
from llama4_triton.bench.selftest import (
    INSTALLATION_CASES,
    Report,
    gpu_requests,
    installation_requests,
    memcheck_requests,
    run_selftest,
)
from llama4_triton.kernels import _paths

pytestmark = pytest.mark.interpreter_only  # the fake GPU is Triton's interpreter

FAKE = "support.fake_gpu:FakeGpu"
TESTS = Path(__file__).parents[1]


def variables(faults=None):
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    faults = json.dumps(faults or {})
    return {"PYTHONPATH": path, "LLAMA4_FAKE_FAULTS": faults, "OMP_NUM_THREADS": "1"}


def requests(*ids, **options):
    return [Request(id=id, **{"repeats": 3, "replays": 2, **options}) for id in ids]


# With child processes.


@pytest.fixture(scope="module")
def rehearsal():
    """Every way to fail in one run: three children, two of which do not survive."""
    ids = (
        "gather_rows-small-bf16",  # wrong
        "rms_norm-small-bf16",  # hangs
        "add_rms_norm-small-bf16",  # ok: the same kernel with another config
        "swiglu-small-bf16",  # no memory
        "quantize_rowwise-small-K640",  # illegal access
        "quantize_rowwise-small-fp32",  # ok
    )
    faults = {
        "_gather_rows_kernel *": "wrong",
        "_rms_norm_kernel HAS_RESIDUAL=False *": "hang",
        "_swiglu_kernel *": "oom",
        "_quantize_rowwise_kernel BLOCK_K=1024 *": "illegal",
    }
    seen = []
    report = run_selftest(
        requests(*ids), backend=FAKE, timeout=2.0, variables=variables(faults),
        progress=lambda done, total, request, result: seen.append((done, total, request, result)),
    )  # fmt: skip
    return report, {result.request.id: result for result in report.results}, seen


def test_each_case_gets_its_own_status_and_the_rest_goes_on(rehearsal):
    report, results, _ = rehearsal
    assert {id: result.status for id, result in results.items()} == {
        "gather_rows-small-bf16": "wrong",
        "rms_norm-small-bf16": "hang",
        "add_rms_norm-small-bf16": "ok",
        "swiglu-small-bf16": "oom",
        "quantize_rowwise-small-K640": "crash",
        "quantize_rowwise-small-fp32": "ok",
    }
    assert report.counts() == {"ok": 2, "wrong": 1, "hang": 1, "crash": 1, "oom": 1}
    assert report.verdict == "failed" and len(report.failed) == 4
    assert report.environment["gpu"] == "Fake GPU"


def test_a_hang_and_a_crash_name_kernel_config_and_grid(rehearsal):
    _, results, _ = rehearsal
    hang, crash = results["rms_norm-small-bf16"], results["quantize_rowwise-small-K640"]
    at = "_rms_norm_kernel HAS_RESIDUAL=False BLOCK_H=2048 num_warps=8 grid (3,)"
    assert hang.at == at and hang.launches == [at]
    assert hang.message == f"nothing for 2 s in {at}" and 2.0 <= hang.seconds < 20.0
    assert crash.at == "_quantize_rowwise_kernel BLOCK_K=1024 num_warps=4 grid (3,)"
    assert crash.message.startswith("the process was ended by SIGSEGV")
    assert results["swiglu-small-bf16"].at.startswith("_swiglu_kernel BLOCK_F=1024")
    assert "Tried to allocate 1.00 TiB." in results["swiglu-small-bf16"].message
    assert "more" not in results["swiglu-small-bf16"].message


def test_a_wrong_result_says_how_wrong(rehearsal):
    wrong = rehearsal[1]["gather_rows-small-bf16"]
    assert wrong.worst == ("different", 1.0, 0.0) and "element (0, 0): got 101" in wrong.message
    fine = rehearsal[1]["add_rms_norm-small-bf16"]
    measure, value, bound = fine.worst
    assert measure in ("element", "frobenius", "row", "bias") and 0 < value < bound
    assert fine.at == "" and len(fine.launches) == 1


def test_progress_comes_before_and_after_each_case(rehearsal):
    seen = rehearsal[2]
    assert [done for done, *_ in seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert {total for _, total, *_ in seen} == {6}
    assert [result is None for *_, result in seen] == [True, False] * 6


def test_the_report_is_json_as_documented(rehearsal, tmp_path):
    report = rehearsal[0]
    report.write(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    documented = selftest.__doc__.partition("one JSON object:")[2]
    assert data["schema"] == 1 and data["verdict"] == "failed" and data["record"] is None
    for name in (*data, *data["cases"][0]):
        assert f" {name}" in documented, name
    by_id = {case["id"]: case for case in data["cases"]}
    assert by_id["rms_norm-small-bf16"]["op"] == "rms_norm"
    assert by_id["rms_norm-small-bf16"]["at"].startswith("_rms_norm_kernel")
    assert by_id["gather_rows-small-bf16"]["max_error"] == 1.0


@pytest.mark.long
def test_memcheck_runs_the_child_under_the_tool_and_reads_its_verdict(tmp_path):
    """A stand-in for compute-sanitizer that says it counted errors."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n"
        f'echo "$1 $2 $3 $4 $PYTORCH_NO_CUDA_MEMORY_CACHING" > {tmp_path}/seen\n'
        'shift 4\n"$@"\nexit 86\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    report = run_selftest(
        memcheck_requests("gather_rows-small-bf16"), backend=FAKE, timeout=10.0,
        sanitizer=str(tool), variables=variables(),
    )  # fmt: skip
    assert (tmp_path / "seen").read_text().split() == [
        "--tool", "memcheck", "--error-exitcode", "86", "1",
    ]  # fmt: skip
    assert [result.status for result in report.results] == ["ok", "error"]
    assert report.results[1].message == selftest.MEMCHECK_MESSAGE and report.verdict == "failed"


def _interruptible():
    """Behind `nohup` and `&`, SIGINT is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_writes_the_report_and_ends_the_child(tmp_path):
    """The command itself, in a hang, with a signal; the process group is the terminal's."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "llama4_triton", "selftest", "--backend", FAKE]
    faults = {"_rms_norm_kernel HAS_RESIDUAL=True *": "hang"}
    with subprocess.Popen(
        [*command, "--only", "*rms_norm-small-bf16", "--out", str(file), "--timeout", "600"],
        env={**os.environ, **variables(faults), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=_interruptible,
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + 120
            events = []
            while not any('"launch"' in e and "HAS_RESIDUAL=True" in e for e in events):
                assert process.poll() is None and time.monotonic() < end, "no second launch"
                time.sleep(0.05)
                events = [
                    e for f in tmp_path.glob("*/1.events") for e in f.read_text().splitlines()
                ]
            child = json.loads(events[0])["environment"]["pid"]
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    data = json.loads(file.read_text())
    assert data["verdict"] == "interrupted" and data["record"] is None
    assert [(case["status"], case["message"]) for case in data["cases"]] == [
        ("ok", ""),
        ("skipped", "interrupted"),
    ]
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.glob("llama4-triton-selftest-*"))


def test_a_child_that_does_not_start_says_why():
    with (
        Runner(FAKE, timeout=5.0, prefix=("false",)) as runner,
        pytest.raises(
            NoWorker, match="the child process must start, got: the process ended with exit code 1"
        ),
    ):
        runner.run(Request(id="rms_norm-small-bf16"))
    with pytest.raises(NoWorker, match="compute-sanitizer must be installed for memcheck"):
        run_selftest(memcheck_requests("rms*"), backend=FAKE, timeout=5.0)


# The child's side, in this process.


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Ask a worker on the fake GPU; returns (events of the request, whether it was fatal)."""

    def ask(id, faults, **options):
        monkeypatch.setenv("LLAMA4_FAKE_FAULTS", json.dumps(faults))
        events = tmp_path / "events"
        one = worker.Worker(events, FAKE)
        request = dict(id=id, path="fast", features=[], repeats=3, replays=2) | options
        fatal = one.answer(request)
        one.file.close()
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        events.unlink()
        return lines, fatal

    return ask


def test_events_announce_what_comes_next(answer):
    events, fatal = answer("gather_rows-small-bf16", {})
    assert not fatal and [event["event"] for event in events] == [
        "ready", "launch", "landed", "judging", "repeat", "repeat", "capture", "replay", "replay",
        "done",
    ]  # fmt: skip
    assert events[1]["kernel"] == "_gather_rows_kernel" and events[1]["grid"] == [5]
    assert events[-1]["status"] == "ok" and len(events[-1]["errors"]) == 1


@pytest.mark.parametrize(
    "fault, status, message, fatal",
    [
        ("fatal", "crash", "RuntimeError: CUDA error: an illegal memory access", True),
        ("bit", "wrong", "run 2 gave other bits than run 1", False),
        ("stale", "wrong", "replay 1 of the captured graph gave other bits than a call", False),
    ],
)
def test_faults_that_the_child_reports_itself(answer, fault, status, message, fatal):
    """`bit` is within the bounds, and not what the next run gives."""
    pattern = "nothing" if fault == "stale" else "_swiglu_kernel *"
    events, was_fatal = answer("swiglu-small-bf16", {pattern: fault})
    assert events[-1]["status"] == status and events[-1]["message"].startswith(message)
    assert was_fatal is fatal


def test_what_the_gpu_lacks_is_skipped_and_a_bug_is_an_error(answer, monkeypatch):
    from llama4_triton.kernels._check import UnsupportedArchitectureError

    def unsupported(*_):
        raise UnsupportedArchitectureError("fp8_matmul: the device must be sm_89 or newer")

    monkeypatch.setattr(FakeGpu, "launch", unsupported)
    events, _ = answer("rms_norm-small-bf16", {})
    assert events[-1]["status"] == "skipped"
    assert events[-1]["message"] == "unsupported: fp8_matmul: the device must be sm_89 or newer"
    monkeypatch.setattr(FakeGpu, "launch", lambda *_: 1 / 0)
    events, fatal = answer("rms_norm-small-bf16", {})
    assert (events[-1]["status"], fatal) == ("error", False)
    assert events[-1]["message"] == "ZeroDivisionError: division by zero"


def test_path_and_features_are_those_of_the_request(answer, monkeypatch):
    monkeypatch.setitem(_paths.OPS, "gather_rows", frozenset({"pdl", "tma"}))
    seen = []

    def launch(self, kernel, *_):
        seen.append((_paths.path("moe"), _paths.features("gather_rows", self.device)))

    monkeypatch.setattr(FakeGpu, "launch", launch)
    for options in ({}, {"features": ["pdl"]}, {"path": "safe", "features": ["pdl"]}):
        answer("gather_rows-small-bf16", {}, repeats=1, replays=0, **options)
    assert seen == [
        ("fast", {"tma"}),
        ("fast", {"tma", "pdl"}),
        ("safe", frozenset()),
    ]


# What is run, and what is made of it.


def test_a_gpu_runs_every_small_case_and_each_operator_on_its_safe_path(monkeypatch):
    asked = gpu_requests()
    assert {r.id.partition("-")[0] for r in asked if r.path == "safe"} == set(OPS)
    assert sum(r.path == "safe" for r in asked) == len(OPS)
    fast = [r for r in asked if r.path == "fast" and not r.features]
    assert len(fast) == len({r.id for r in fast})
    doubtful = {("last_arriver",), ("warp_specialisation",)}
    assert {r.features for r in asked} == {(), *doubtful}
    assert all(r.id.startswith("moe-small-") for r in asked if r.features)
    assert all((r.repeats, r.replays, r.tool) == (10, 3, "") for r in asked)
    monkeypatch.setitem(_paths.OPS, "gather_rows", frozenset({"pdl", "tma"}))
    forced = [r for r in gpu_requests("gather_rows-*") if r.features]
    assert {r.features for r in forced} == {("pdl",)} and len(forced) == 3
    assert gpu_requests("nothing") == []
    assert [r.id for r in installation_requests()] == list(INSTALLATION_CASES)


def result(status, message="", **options):
    return Result(request=Request(id="moe-x", **options), status=status, message=message)


def test_the_verdict():
    ok, no = result("ok"), result("skipped", "unsupported: sm_80")
    assert Report(results=[ok, no]).verdict == "passed"
    assert Report().verdict == "failed"
    assert Report(results=[ok], interrupted=True).verdict == "interrupted"
    late = result("skipped", "no time: 600 s")
    assert Report(results=[ok, late]).verdict == "failed"
    late.request = Request(id="moe-x", tool="memcheck")
    assert Report(results=[ok, late]).verdict == "passed"
    for status in ("wrong", "hang", "crash", "oom", "error"):
        assert Report(results=[ok, result(status)]).failed[0].status == status
    mixed = [result("ok", features=("pdl",)), result("hang", features=("last_arriver",))]
    assert Report(results=mixed).features == ["pdl"]


def test_an_error_that_is_no_number_is_still_json(tmp_path):
    one = result("wrong")
    one.errors = [{"values": {"max": float("nan"), "rms": 1.0}, "bounds": {"max": 1.0, "rms": 1.0}}]
    Report(results=[one]).write(tmp_path / "report.json")
    case = json.loads((tmp_path / "report.json").read_text())["cases"][0]
    assert (case["measure"], case["max_error"], case["bound"]) == ("max", "nan", 1.0)


def test_cases_that_find_no_time_are_skipped():
    report = run_selftest(requests("rms_norm-small-bf16"), backend=FAKE, timeout=1.0, budget=-1.0)
    assert [(r.status, r.message) for r in report.results] == [("skipped", "no time: -1 s")]
    assert report.verdict == "failed"


@pytest.mark.parametrize(
    "only, statuses, written",
    [("*", ["ok", "ok"], True), ("rms*", ["ok", "ok"], False), ("*", ["ok", "hang"], False)],
)
def test_a_record_is_written_if_all_of_it_passed(tmp_path, monkeypatch, only, statuses, written):
    from rich.console import Console

    from llama4_triton.kernels import _records

    console = Console(file=open(os.devnull, "w"))
    kept = []
    results = [result(status, features=("pdl",)) for status in statuses]
    monkeypatch.setattr(selftest_command, "run_selftest", lambda *_, **__: Report(results=results))
    monkeypatch.setattr(selftest_command, "compute_sanitizer", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def write_record(device, features, report):
        kept.append((device, features, report))
        return tmp_path / "record.json"

    monkeypatch.setattr(_records, "write_record", write_record)
    file = tmp_path / "report.json"
    code = selftest_command.run_operators(
        "cuda", gpu=True, only=only, file=file, timeout=1.0, out=console, err=console
    )
    assert code == (0 if "hang" not in statuses else 1)
    assert bool(kept) is written
    record = str(tmp_path / "record.json") if written else None
    assert json.loads(file.read_text())["record"] == record
    if written:
        device, features, report = kept[0]
        assert device == torch.device("cuda", 0) and features == ["pdl"]
        assert report["cases"] == 2 and report["verdict"] == "passed"
