"""torch.ops.llama4_triton: every operator by opcheck, and the two ways that a call can take.

The way without torch's dispatcher and the operator itself must agree in every bit, follow `use`,
and refuse what needs a gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from support.op_calls import VARIANTS, op_call
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama4_triton.bench.case import tensors_of
from llama4_triton.kernels import _launch, _library, _paths, _program
from llama4_triton.kernels._paths import use
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import rms_norm
from llama4_triton.kernels.swiglu import swiglu

pytestmark = pytest.mark.interpreter_only

OPS = sorted(_paths.OPS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONG = pytest.mark.long
CASES = [(dtype, variant) for dtype in DTYPES for variant in range(VARIANTS)]
E4M3 = torch.float8_e4m3fn


class Flat(TorchDispatchMode):
    """The calls of flat operators below public functions: (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _library.NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _flat_call(op, call):
    """The flat operator of that name, and what `call` gives it."""
    with Flat() as flat:
        call()
    (found,) = [found for found in flat.calls if found[0]._schema.name.endswith(f"::{op}")]
    return found


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    """On six inputs: three types, optional arguments on and off."""
    assert len(CASES) >= 6
    for dtype, variant in CASES:
        operator, args = _flat_call(op, op_call(op, 3, dtype, variant))
        # What is written may hold anything, and NaN is not equal to itself.
        written = [bool(a.alias_info and a.alias_info.is_write) for a in operator._schema.arguments]
        args = tuple(
            torch.zeros_like(arg) if is_written and arg is not None else arg
            for arg, is_written in zip(args, written, strict=True)
        )
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if not any(x.dtype == E4M3 for x in tree_leaves(args) if isinstance(x, torch.Tensor)):
            # It multiplies inputs, which torch cannot do in e4m3.
            checks.append("test_schema")
        torch.library.opcheck(operator, args, test_utils=checks)


def _bits(result):
    """Everything that a public function returns, as integers; dataclasses of tensors as well."""
    leaves = [x.contiguous() for x in tensors_of(result)]
    return [x.view(torch.uint8) if x.is_floating_point() else x for x in leaves]


def _same(got, want):
    got, want = _bits(got), _bits(want)
    assert got and len(got) == len(want)
    assert all(torch.equal(have, wanted) for have, wanted in zip(got, want, strict=True))


def _all_of(call, result):
    """What it returned, and what it may have written."""
    return [result, call.inputs.get("kv"), call.inputs.get("out")]


def _nothing(kernel, grid, *args, **kwargs):
    """In the place of a launch, where only what surrounds it is looked at."""


@pytest.fixture
def programs(monkeypatch):
    """How many launches each program had that was run; none is known at the start."""
    for of_operator in _library.programs.values():
        of_operator.clear()
    run, entered = _program.Program.run, []

    def counting(program, given):
        entered.append(len(program.steps))
        return run(program, given)

    monkeypatch.setattr(_program.Program, "run", counting)
    return entered


SHORT = {"rms_norm", "convert_layout", "router", "moe", "rope_and_cache", "attention_decode"}


@pytest.mark.parametrize("op", [pytest.param(op, marks=() if op in SHORT else LONG) for op in OPS])
def test_every_way_has_the_same_bits(op, device, programs):
    """The operator; its implementation, alone and while its program is written; the program."""
    for variant in range(VARIANTS):
        dtype = DTYPES[-1 - variant]
        first = op_call(op, 5, dtype, variant)
        with Flat() as flat:
            want = _all_of(first, first())
        assert not programs
        for again in range(4):
            call = op_call(op, 5, dtype, variant)
            with torch.inference_mode() if again == 3 else contextlib.nullcontext():
                _same(_all_of(call, call()), want)
            # Of each flat operator that the public function calls.
            assert len(programs) == len(flat.calls) * max(0, again - 1)
        programs.clear()
        _library.programs[op].clear()


def test_a_program_serves_other_values(device, programs):
    for _ in range(4):
        call = op_call("add_rms_norm", 6)
        call.inputs["x"].copy_(torch.randn(6, 33))
        with Flat():
            want = call()
        _same(call(), want)
    assert programs == [1, 1]


def test_integers_given_for_floats_are_floats(device, programs):
    """As torch's dispatcher takes them: a temperature's floor_scale is an integer in configs."""
    for _ in range(3):
        for op, name in (("rope_and_cache", "temperature"), ("attention_decode", "temperature")):
            call, same = (op_call(op, 5, torch.bfloat16, 1) for _ in range(2))
            wanted = call.options[name]
            call.options[name] = dataclasses.replace(wanted, floor_scale=int(wanted.floor_scale))
            _same(_all_of(call, call()), _all_of(same, same()))
        x, weight = torch.randn(3, 8), torch.randn(8)
        _same(rms_norm(x, weight, 1), rms_norm(x, weight, 1.0))
    # Six calls of each layout, of decode's schedule as well, whichever the numbers are.
    assert len(programs) == 4 * 4


def test_layouts_have_programs_of_their_own(device, programs):
    weight = torch.randn(20)
    wide = torch.randn(4, 2, 20)
    for x in [wide[:, 0], wide[:, 1], wide[:, 0].contiguous(), wide[1:, 0]] * 3:
        with Flat():
            want = rms_norm(x, weight, 1e-5)
        _same(rms_norm(x, weight, 1e-5), want)
    assert programs == [1] * 4


def test_one_tensor_given_twice_has_no_program(device, programs):
    x = torch.randn(3, 24)
    for _ in range(4):
        with Flat():
            want = swiglu(x, x)
        assert torch.equal(swiglu(x, x), want)
    assert not programs


def test_a_fill_is_no_program(device, programs):
    for _ in range(4):
        x_q, scale = quantize_rowwise(torch.empty(3, 0))
        assert x_q.shape == (3, 0) and scale.tolist() == [1.0, 1.0, 1.0]
    assert not programs


def test_the_path_is_followed_and_programs_are_of_one_gpu(device, programs):
    call = op_call("moe", 3)
    for _ in range(3):
        fast = call()
    assert programs == [3]
    with use(moe="reference"):
        call()
    small = dataclasses.replace(_launch.SM_90, sm_count=2, shared_bytes=65_536)
    with _launch.assume_device(small):
        call()
    assert programs == [3]
    _same(call(), fast)
    with use(moe="safe"):
        _same(call(), fast)  # there is no difference as long as no selftest has passed
    assert programs == [3, 3, 3]


def test_what_looks_at_launches_sees_them(device):
    """An interceptor gets every launch, whatever is remembered."""
    call, taken = op_call("rms_norm", 3), []
    call(), call(), call()
    with _launch.intercept(lambda kernel, grid, *args, **kwargs: taken.append(grid)):
        call()
    assert taken == [(3,)]


# Whatever is no plain call goes to the registered operator.


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op):
    """Shapes and types of the results, at a size that nobody computes."""
    call = op_call(op, 3)
    with _launch.intercept(_nothing):
        want = [(x.shape, x.dtype) for x in tensors_of(_all_of(call, call()))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = _map_tensors(call.inputs, mode.from_tensor)
        got = tensors_of([call.function(**fake, **call.options), fake.get("kv"), fake.get("out")])
    assert all(type(x) is FakeTensor for x in got)
    assert [(x.shape, x.dtype) for x in got] == want


def _map_tensors(value, function):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_tensors(part, function) for name, part in value.items()}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(
            value, **{name: _map_tensors(getattr(value, name), function) for name in names}
        )
    return value


def test_meta_tensors():
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(8, device="meta")
    assert rms_norm(x, weight, 1e-5).device.type == "meta"


def _name(graph):
    return [str(node.target) for node in graph.graph.nodes if "llama4" in str(node.target)]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    x, weight = torch.randn(3, 8), torch.randn(8)
    traced = make_fx(lambda x, w: rms_norm(x, w, 1e-5), tracing_mode=mode)(x, weight)
    assert _name(traced) == ["llama4_triton.rms_norm.default"]
    more = torch.randn(5, 8) if mode == "symbolic" else torch.randn(3, 8)
    assert torch.equal(traced(more, weight), rms_norm(more, weight, 1e-5))


@pytest.mark.parametrize("strict", [False, True], ids=["export", "export-strict"])
def test_export(strict):
    class Norm(torch.nn.Module):
        def forward(self, x, weight):
            return rms_norm(x, weight, 1e-5)

    x, weight = torch.randn(3, 8), torch.randn(8)
    program = torch.export.export(
        Norm(), (x, weight), dynamic_shapes=({0: torch.export.Dim("T", min=2)}, None), strict=strict
    )
    assert _name(program.graph_module) == ["llama4_triton.rms_norm.default"]
    more = torch.randn(7, 8)
    assert torch.equal(program.module()(more, weight), rms_norm(more, weight, 1e-5))


def test_a_function_mode_and_a_subclass_see_the_operator():
    class Named(torch.Tensor):
        seen = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x, weight = torch.randn(3, 8), torch.randn(8)
    rms_norm(x.as_subclass(Named), weight, 1e-5)
    assert "llama4_triton.rms_norm.default" in Named.seen
    with torch.device("cpu"):  # a function mode
        rms_norm(x, weight, 1e-5)


# No gradients.


# Schedules are made of integers, which have none.
@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_schedule")])
def test_a_gradient_is_refused(op):
    """By the public function, by the operator; and not where gradients are off."""
    call = op_call(op, 3, torch.float32)
    floats = [x for x in tensors_of(call.inputs) if x.is_floating_point() and x.dtype != E4M3]
    assert floats
    with torch.no_grad(), _launch.intercept(_nothing):
        operator, args = _flat_call(op, call)
    for x in floats:
        x.requires_grad_()
        message = r" must not require grad, got requires_grad=True \(inference only: call under"
        with pytest.raises(NotImplementedError, match=rf"^{op}: \S+{message}"):
            call()
        if any(x is y for y in tree_leaves(args)):
            with pytest.raises(NotImplementedError, match=rf"^{op}: \w+{message}"):
                operator(*args)
        with torch.no_grad(), _launch.intercept(_nothing):
            call()
        x.requires_grad_(False)
    assert torch.is_grad_enabled()
