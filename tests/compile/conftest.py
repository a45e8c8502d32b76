"""What the compile lane is given: launches, and their reports, compiled once in two processes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os

import pytest

from llama4_triton.autotune.compile import compile_all


@pytest.fixture(scope="session")
def compile_lane(request, tmp_path_factory):
    """`compile_all` for tests. The first call compiles all that this run needs for sm_90."""

    def run(launches, arch="sm_90"):
        with contextlib.ExitStack() as stack:
            if "PYTEST_XDIST_WORKER" in os.environ:  # one worker compiles what others then find
                lock = tmp_path_factory.getbasetemp().parent / "compile.lock"
                fcntl.flock(stack.enter_context(lock.open("w")), fcntl.LOCK_EX)
            if arch == "sm_90" and not prepared:
                prepared.append(compile_all(_needed(request.session.items), arch, jobs=2))
            return compile_all(launches, arch, jobs=2)

    prepared = []
    return run


def _needed(items):
    """All launches that the fixtures of these tests will ask for: one pool of processes."""
    from support.compile_cases import FAULTS

    fixtures = {name for item in items for name in getattr(item, "fixturenames", ())}
    launches = []
    if "faulty" in fixtures:
        launches += [fault.launch() for fault in FAULTS]
    if "shipped" in fixtures:
        launches += _shipped()
    elif "main_loops" in fixtures:
        launches += _main_loops()
    if "variants" in fixtures:
        launches += [*_variants("float32"), *_variants("ragged")]
    return launches


def _shipped():
    from llama4_triton.bench.steps import shipped_launches

    return shipped_launches()


def _main_loops():
    """Of every kernel that multiplies matrices one binary in each weight format and data type."""
    from llama4_triton.autotune.gates import KERNELS

    found = {}
    for launch in _shipped():
        promise = KERNELS[launch.name]
        if promise.rows or promise.weights_first:
            config = launch.constexprs
            kind = [str(config.get(name)) for name in ("FORMAT", "X_FORMAT", "Z_FORMAT", "SWAP_AB")]
            found.setdefault((launch.name, *kind), launch)
    return list(found.values())


@functools.cache
def _variants(kind):
    from llama4_triton.bench import variants as bench

    return [
        launch
        for variant in bench.variants()
        if kind == ("ragged" if variant.ragged else str(variant.dtype).removeprefix("torch."))
        for launch in bench.launches_of(variant)
    ]


@pytest.fixture(scope="session")
def shipped(compile_lane):
    """(launch, report) of each binary that the models' steps ask for."""
    return _paired(compile_lane, _shipped())


@pytest.fixture(scope="session")
def main_loops(compile_lane):
    """Those of them that multiply matrices: what a new Triton is looked at first for."""
    return _paired(compile_lane, _main_loops())


@pytest.fixture(scope="session")
def variants(compile_lane):
    """Function from a dtype, or "ragged", to (launch, report) of what else users can ask for."""
    return functools.cache(lambda kind: _paired(compile_lane, _variants(kind)))


def _paired(compile_lane, launches):
    by_binary = {launch.binary(): launch for launch in reversed(launches)}
    results = compile_lane(by_binary.values())
    return [(launch, results[binary]) for binary, launch in by_binary.items()]
