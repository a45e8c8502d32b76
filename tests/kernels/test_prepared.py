"""Prepared calls: other values, other tensors, what is refused; on every executor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.op_calls import VARIANTS, op_call

from llama4_triton.bench.case import tensors_of
from llama4_triton.kernels import _environment, _launch, _paths
from llama4_triton.kernels._paths import use
from llama4_triton.kernels.moe import moe
from llama4_triton.kernels.prepared import prepare
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm
from llama4_triton.kernels.swiglu import swiglu

# Kernels that take longer to compile, or to interpret, than they say more than others.
SHORT = {"add_rms_norm", "convert_layout", "route", "rope_and_cache"}
CASES = [
    pytest.param(
        op, variant, id=f"{op}-{variant}", marks=() if op in SHORT else pytest.mark.long
    )
    for op in sorted(_paths.OPS)
    for variant in range(VARIANTS)
]  # fmt: skip


def _bits(value):
    return [
        x.contiguous().view(torch.uint8) if x.is_floating_point() else x for x in tensors_of(value)
    ]


def _same(got, want):
    got, want = _bits(got), _bits(want)
    assert len(got) == len(want) > 0
    assert all(torch.equal(have, wanted) for have, wanted in zip(got, want, strict=True))


def _other(x):
    """Another tensor of x's layout: floats in another order, integers as they are."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    bits, other = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (x, y))
    other.copy_(bits.roll(1, 0) if x.is_floating_point() and x.ndim else bits)
    return y


def _replaced(value, tensors, name=""):
    """`value` with the tensors of these names."""
    if isinstance(value, torch.Tensor):
        return tensors.get(name, value)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        parts = {f: _replaced(getattr(value, f), tensors, f"{name}.{f}") for f in fields}
        return dataclasses.replace(value, **parts)
    return value


def _on(device, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _on(device, part) for name, part in value.items()}
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{f: _on(device, getattr(value, f)) for f in fields})
    return value


@pytest.mark.parametrize("op, variant", CASES)
def test_every_operator(op, variant, device):
    call = op_call(op, 5, torch.bfloat16, variant)
    inputs, options = _on(device, call.inputs), _on(device, call.options)
    step = prepare(call.function, **inputs, **options)
    assert step.names and step.program.steps
    first = [x.clone() for x in tensors_of(step.result)]
    _same(first, call.function(**inputs, **options))

    # Twice the same tensors, once others, and these once more.
    memory = [x.data_ptr() for x in tensors_of(step.result)]
    assert step() is step.result
    _same(step.result, first)
    mine = {name: _other(step.tensor(name)) for name in step.names}
    theirs = {name: _other(step.tensor(name)) for name in step.names}
    given = {name: _replaced(value, theirs, name) for name, value in (inputs | options).items()}
    want = call.function(**given)
    for again in ({}, mine), ({}, {}):
        _same(step(**again[1]), want)
        _same(list(mine.values()), list(theirs.values()))  # what is written in place
    assert memory == [x.data_ptr() for x in tensors_of(step.result)]


def _norm_inputs(device, T=4, H=40):
    return [torch.randn(*shape, device=device) for shape in ((T, H), (T, H), (H,))]


def test_several_operators_are_one_step(device):
    def layer(both, residual, weight):
        """Views of `both` are made here, and follow it."""
        F = both.shape[1] // 2
        z = swiglu(both[:, :F], both[:, F:])
        return add_rms_norm(z, residual, weight, 1e-5)

    x, residual, weight = _norm_inputs(device)
    both = torch.randn(4, 80, device=device)
    step = prepare(layer, both, residual, weight)
    assert [len(step.program.steps), step.names] == [2, ("both", "residual", "weight")]
    both.copy_(both.flip(0))
    _same(step(), layer(both, residual, weight))
    other = torch.randn(4, 80, device=device)
    _same(step(both=other, residual=x), layer(other, x, weight))
    assert step.tensor("both") is other and step.tensor("weight") is weight
    later = torch.randn(5, 80, device=device)[1:]  # not at the start of its storage
    _same(step(both=later), layer(later, x, weight))


def test_tensors_from_elsewhere_stay(device):
    x, _, weights = _norm_inputs(device, H=80)
    step = prepare(lambda x: rms_norm(x, weights[40:], 1e-5), x[:, :40])
    x.mul_(3)
    weights.add_(1)
    _same(step(), rms_norm(x[:, :40], weights[40:], 1e-5))


def test_parts_of_arguments_have_names(device):
    call = op_call("moe", 5)
    inputs = _on(device, call.inputs)
    step = prepare(moe, **inputs, **call.options)
    parts = [f"{name}.{part}.weight" for name in ("experts", "shared") for part in
             ("gate", "up", "down")]  # fmt: skip
    assert sorted(step.names) == sorted(["x", "w_router", *parts])
    x = _other(inputs["x"])
    _same(step(x=x), moe(**inputs | {"x": x}, **call.options))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(5, 40)), r"x must have .*\[4, 40\].*got .*\[5, 40\]"),
        (dict(x=torch.zeros(40, 4).t()), r"x must have .*\(40, 1\).*got .*\(1, 4\)"),
        (dict(x=torch.zeros(4, 40).half()), r"x must have .*float32.*got .*float16"),
        (dict(x=torch.zeros(161)[1:].view(4, 40)), r"x must have .*, 0\), got .*, 4\)"),
        (dict(x=torch.zeros(4, 40, device="meta")), "x must have .*got .*meta"),
        (dict(y=torch.zeros(4, 40)), "tensors must be named x, residual, weight, got y"),
        (dict(x=torch.ones(4, 40), weight=torch.zeros(41)), "weight must have"),
    ],
    ids=["shape", "strides", "dtype", "alignment", "device", "name", "second"],
)
@pytest.mark.interpreter_only
def test_another_layout_is_refused_and_nothing_changes(change, message):
    x, residual, weight = _norm_inputs("cpu")
    step = prepare(add_rms_norm, x, residual, weight, 1e-5)
    want = [out.clone() for out in step.result]
    with pytest.raises(ValueError, match=f"^prepare: {message}"):
        step(**change)
    _same(step.result, want)
    _same(step(), want)


@pytest.mark.interpreter_only
def test_no_tensor_is_refused():
    step = prepare(rms_norm, torch.ones(2, 8), torch.ones(8), 1e-5)
    with pytest.raises(TypeError, match=r"^prepare: x must be a torch.Tensor, got list"):
        step(x=[1.0])


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    "function, args, why",
    [
        (lambda x, w: rms_norm(x, w, 1e-5) + 1, (X, torch.ones(8)), "aten.add.Tensor"),
        (lambda x, w: rms_norm(x + 1, w, 1e-5), (X, torch.ones(8)), "aten.add.Tensor"),
        (quantize_rowwise, (torch.ones(2, 0),), "aten.fill_.Scalar"),
        (swiglu, (X, X), "one tensor that is given twice"),
        (lambda x, y: swiglu(x[:, :4], y), (X, X[:, 4:]), "two arguments share"),
    ],
    ids=["after", "before", "fill", "twice", "shared"],
)  # fmt: skip
@pytest.mark.interpreter_only
def test_what_cannot_be_repeated_is_refused(function, args, why):
    with pytest.raises(ValueError, match=rf"^prepare: \S+ must launch kernels only, got .*{why}"):
        prepare(function, *args)


@pytest.mark.interpreter_only
def test_what_is_returned_cannot_be_replaced():
    call = op_call("convert_layout", 3, variant=1)
    step = prepare(call.function, **call.inputs, **call.options)
    assert step.names == ("v_cache", "pages") and step.result is call.inputs["out"]
    with pytest.raises(ValueError, match="tensors must be named v_cache, pages, got out"):
        step(out=torch.zeros_like(call.inputs["out"]))


@pytest.mark.interpreter_only
def test_nothing_to_prepare():
    with pytest.raises(ValueError, match="^prepare: args must hold a tensor, got none"):
        prepare(lambda: None)
    with use(rms_norm="reference"), pytest.raises(ValueError, match="must launch kernels only"):
        prepare(rms_norm, X, torch.ones(8), 1e-5)


def test_what_looks_at_launches_sees_them(device, monkeypatch):
    x, residual, weight = _norm_inputs(device)
    step = prepare(add_rms_norm, x, residual, weight, 1e-5)
    taken = []
    with _launch.intercept(lambda kernel, grid, *args, **kwargs: taken.append((grid, args[0]))):
        step(x=_other(x))
    assert taken[0][0] == (4,) and taken[0][1] is step.tensor("x")
    launches = []
    monkeypatch.setattr(_launch, "launch_and_wait", lambda *args: launches.append(args[0].__name__))
    monkeypatch.setenv("LLAMA4_TRITON_DEBUG", "1")
    _environment.environment.cache_clear()
    step()
    monkeypatch.undo()
    _environment.environment.cache_clear()
    assert launches == ["_rms_norm_kernel"]


@pytest.mark.compiled_only
def test_a_compiled_step_launches_without_the_jit(device, monkeypatch):
    x, residual, weight = _norm_inputs(device)
    step = prepare(add_rms_norm, x, residual, weight, 1e-5)
    other = _other(x)
    want = add_rms_norm(other, residual, weight, 1e-5)

    def refuse(*args, **kwargs):
        raise AssertionError("Triton's cache was asked")

    monkeypatch.setattr(type(step.program.steps[0].kernel), "run", refuse)
    _same(step(x=other), want)
