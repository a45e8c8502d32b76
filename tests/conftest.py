"""Executors, the device fixture, and what surrounds every test.

`pytest --executor NAME` picks what executes kernels for the whole process:

* `cuda`: a GPU (the default where there is one);
* `interpreter`: Triton's interpreter with this project's shim (the default elsewhere);
* `ptx`: the compiled sm_90 code, executed on the CPU by the module `ptxrun`, if it is installed;
* `compile`: nothing; only the tests that inspect compiled code run.

A kernel decorated for the interpreter cannot be compiled and the other way round, hence one
executor per process. The tests are the same files, unchanged.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

import pytest
import torch

EXECUTORS = ("cuda", "interpreter", "ptx", "compile")

# When asynchronous copies and tensor-core work take effect, in which order warps run, and whether
# plain accesses of two blocks to one byte are looked for. No one of them sees every fault.
SCHEDULES = {
    "late": dict(mode="late"),
    "late-7": dict(mode="late", seed=7),
    "early": dict(mode="early_loads", seed=3),
    "eager": dict(mode="eager"),
    "races": dict(mode="late", races=True),
}


def pytest_addoption(parser):
    group = parser.getgroup("llama4-triton")
    group.addoption("--executor", choices=EXECUTORS, default=None, help="what executes kernels")
    group.addoption("--long", action="store_true", help="run the tests marked long as well")
    group.addoption(
        "--ptx-schedules",
        default="late",
        help=f"ptx executor: run each test under each of these, of {', '.join(SCHEDULES)}",
    )


def pytest_configure(config):
    executor = config.getoption("--executor")
    if executor is None:
        executor = "cuda" if torch.cuda.is_available() else "interpreter"
        config.option.executor = executor
    if executor == "interpreter":
        from llama4_triton.kernels import interpreter

        interpreter.install()
    elif os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(f"TRITON_INTERPRET=1 contradicts --executor {executor}")
    unknown = set(config.getoption("--ptx-schedules").split(",")) - set(SCHEDULES)
    if unknown:
        raise pytest.UsageError(f"--ptx-schedules must be of {list(SCHEDULES)}, got {unknown}")
    if executor == "ptx" and importlib.util.find_spec("ptxrun") is None:
        raise pytest.UsageError("--executor ptx needs the module ptxrun, which is not installed")
    torch.set_num_threads(1)


def pytest_report_header(config):
    return f"llama4-triton: kernels run on executor {config.getoption('--executor')}"


def pytest_collection_modifyitems(config, items):
    """Deselect what says nothing about the chosen executor; pytest counts it.

    A test without kernels runs interpreted, or in the compiled lanes if it is for those only.
    """
    executor = config.getoption("--executor")
    excluded = {
        "interpreter": {"compiled_only", "gpu_only"},
        "ptx": {"interpreter_only", "no_kernels", "gpu_only"},
        "compile": set(),
        "cuda": {"interpreter_only"},
    }[executor]

    def is_dropped(item):
        if executor == "compile" and not item.get_closest_marker("compiled_only"):
            return True
        if item.get_closest_marker("long") and not config.getoption("--long"):
            return True
        if executor == "ptx" and item.get_closest_marker("compiled_only"):
            return False
        return any(item.get_closest_marker(name) for name in excluded)

    dropped = [item for item in items if is_dropped(item)]
    if dropped:
        kept = set(map(id, dropped))
        items[:] = [item for item in items if id(item) not in kept]
        config.hook.pytest_deselected(items=dropped)


def pytest_generate_tests(metafunc):
    """Run each test that has a device once per schedule that was asked for."""
    config = metafunc.config
    if config.getoption("--executor") == "ptx" and "device" in metafunc.fixturenames:
        names = config.getoption("--ptx-schedules").split(",")
        if metafunc.definition.get_closest_marker("unsanitized"):
            names = names[:1]  # a whole model: its kernels meet every schedule one by one
        metafunc.parametrize("device", names, indirect=True)


@pytest.fixture
def executor(request):
    return request.config.getoption("--executor")


@pytest.fixture
def device(request, executor):
    """The device to make tensors on; kernels launched on it are executed inside this fixture."""
    from support.poison import poisoned_empty

    with contextlib.ExitStack() as stack:
        stack.enter_context(poisoned_empty())
        if executor == "ptx":
            from ptxrun import Options, ptx_device
            from support.proxy_fence import fence_before_barrier

            options = Options(strict=True, **SCHEDULES[getattr(request, "param", "late")])
            stack.enter_context(ptx_device(options, on_launch=fence_before_barrier))
        elif executor == "interpreter" and not request.node.get_closest_marker("unsanitized"):
            from support.sanitizer import sanitize

            stack.enter_context(sanitize())
        yield torch.device("cuda" if executor == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
