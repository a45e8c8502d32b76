"""What the compile lane is given: launches, and their reports, compiled once in two processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os

import pytest

from llama4_triton.autotune.compile import compile_all


@pytest.fixture(scope="session")
def compile_lane(tmp_path_factory):
    """`compile_all` for tests: one worker compiles, in two processes, what others then find."""

    def run(launches, arch="sm_90"):
        with contextlib.ExitStack() as stack:
            if "PYTEST_XDIST_WORKER" in os.environ:
                lock = tmp_path_factory.getbasetemp().parent / "compile.lock"
                fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
            return compile_all(launches, arch, jobs=2)

    return run


@pytest.fixture(scope="session")
def shipped(compile_lane):
    """(launch, report) of each binary that the models' steps ask for."""
    from llama4_triton.bench.steps import shipped_launches

    return _paired(compile_lane, shipped_launches())


@pytest.fixture(scope="session")
def main_loops(compile_lane):
    """Those of them that multiply matrices: what a new Triton is looked at first for."""
    from llama4_triton.autotune.gates import KERNELS
    from llama4_triton.bench.steps import shipped_launches

    launches = [launch for launch in shipped_launches() if KERNELS[launch.name].rows]
    return _paired(compile_lane, launches)


@pytest.fixture(scope="session")
def variants(compile_lane):
    """Function from a dtype, or "ragged", to (launch, report) of what else users can ask for."""
    from llama4_triton.bench import variants as bench

    @functools.cache
    def of(kind):
        launches = []
        for variant in bench.variants():
            name = "ragged" if variant.ragged else str(variant.dtype).removeprefix("torch.")
            if name == kind:
                launches += bench.launches_of(variant)
        return _paired(compile_lane, launches)

    return of


def _paired(compile_lane, launches):
    by_binary = {launch.binary(): launch for launch in reversed(launches)}
    results = compile_lane(by_binary.values())
    return [(launch, results[binary]) for binary, launch in by_binary.items()]
