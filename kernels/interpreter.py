"""Triton's interpreter, made to compute as sm_90 does (Triton 3.6 to 3.9).

Stock, it truncates fp32 -> bf16, loses carries, NaN and saturation in fp8 casts, and does bf16
arithmetic and dots on the bit patterns. `install()` replaces the builder methods at fault. A bf16
or fp8 value stays what it is in memory, its bit pattern; every operation here is

    encode(operation(decode(bits)))      decode: bits -> float32, exact;  encode: one rounding

Semantics, each read off the PTX which Triton 3.7.1 emits for sm_90:

* casts round to nearest even; to fp8 they saturate (inf -> 448 or 57344), NaN stays NaN; float ->
  int saturates, NaN -> 0; other rounding modes are refused, as are casts and arithmetic that do
  not compile (fp8 + fp8, fp8 > fp8, fp8 -> fp8, fp64 -> fp8);
* bf16 arithmetic rounds after each operation; tl.fma rounds once, in every type; tl.maximum and
  tl.minimum return the operand that is not NaN unless told to propagate;
* tl.dot multiplies exactly and sums in fp32; "tf32" drops the low 13 bits of each operand as wgmma
  does, "ieee" keeps them; an emulation of Hopper's fp8 accumulator is at the end of this file;
* max and argmax over an axis skip NaN; ties go to the lowest index; all NaN -> NaN, lowest index;
* tl.device_assert and Triton's check for int32 overflow (not on int1) are on.

Not modelled: contraction of a * b + c into an fma, the order of sums, fp16 accumulators within one
dot (rounded once per dot), approximate exp2 and division, the sign of a NaN and of max(-0, +0),
bf16 atomics (they raise), shared memory, pipelines, and everything else about time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["decode", "emulate_hopper_fp8_accumulator", "encode", "install", "is_installed"]

SUPPORTED = ((3, 6), (3, 9))  # Triton versions, first and last
NEVER_PROMOTED = 2**30  # sm_90's default of max_num_imprecise_acc
WGMMA_K = 32  # fp8 products that one wgmma adds up


class Format(NamedTuple):
    """A float of at most 16 bits which numpy lacks; codes are without the sign."""

    storage: type
    mantissa: int
    bias: int
    max_code: int  # the largest that a cast may give
    inf_code: int  # an impossible one where there is no infinity
    nan_code: int


FORMATS = {
    "bf16": Format(np.uint16, 7, 127, max_code=0x7F80, inf_code=0x7F80, nan_code=0x7FFF),
    "fp8e4nv": Format(np.uint8, 3, 7, max_code=0x7E, inf_code=0x100, nan_code=0x7F),
    "fp8e5": Format(np.uint8, 2, 15, max_code=0x7B, inf_code=0x7C, nan_code=0x7F),
}


def decode(bits: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the float32 values of `bits`, exactly.

    Shifted so that its mantissa tops float32's, a code reads as value * 2**(bias - 127), denormals
    included, so a product with 2**(127 - bias), which is exact, is the value. Codes above max_code
    are inf and NaN. bf16 has float32's bias: there the shift is all.
    """
    wide = np.asarray(bits).astype(np.uint32)
    width = 8 * fmt.storage().itemsize
    magnitude = wide & ((1 << (width - 1)) - 1)
    value = ((wide >> (width - 1) << 31) | (magnitude << (23 - fmt.mantissa))).view(np.float32)
    if fmt.bias == 127:
        return value
    special = np.where(magnitude == fmt.inf_code, np.float32(np.inf), np.float32(np.nan))
    scaled = value * np.float32(2.0 ** (127 - fmt.bias))
    return np.where(magnitude > fmt.max_code, np.copysign(special, value), scaled)


def encode(values: np.ndarray, fmt: Format) -> np.ndarray:
    """Return the codes nearest to `values`, ties to even; fp8 saturates, NaN stays NaN.

    Normal results: adding half of the dropped bits, less one unless the kept part is odd, rounds
    to nearest even, and a carry runs into the exponent as it should. Denormal ones: the sum with
    2**(23 - mantissa) * 2**(1 - bias), whose last bit is worth the smallest denormal, rounds in the
    adder, and the carry again gives the right code, that of the smallest normal.
    """
    values = np.asarray(values)
    exact = values.itemsize <= (4 if values.dtype.kind == "f" else 2)
    x = np.atleast_1d(values.astype(np.float32) if exact else _to_float32_odd(values))
    bits, dropped = x.view(np.uint32), 23 - fmt.mantissa
    magnitude = bits & np.uint32(0x7FFFFFFF)
    code = (magnitude + np.uint32((1 << dropped - 1) - 1) + (magnitude >> dropped & 1)) >> dropped
    if fmt.bias != 127:
        code = code - np.uint32((127 - fmt.bias) << fmt.mantissa)
        magic = np.float32(2.0 ** (dropped + 1 - fmt.bias))
        denormal = (np.abs(x) + magic).view(np.uint32) - magic.view(np.uint32)
        code = np.where(np.abs(x) < 2.0 ** (1 - fmt.bias), denormal, code)
    code = np.where(np.isnan(x), fmt.nan_code, np.minimum(code, fmt.max_code))
    sign = bits >> 31 << (8 * fmt.storage().itemsize - 1)
    return (code | sign).astype(fmt.storage).reshape(values.shape)


def _to_odd(near: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Round to odd what was rounded to nearest with `error`: a second rounding is then harmless.

    Of the two floats around an inexact value take the one with the odd mantissa (Boldo, Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008): it can tie with nothing narrower.
    """
    even = near.view(f"u{near.itemsize}") & 1 == 0
    neighbour = np.nextafter(near, np.copysign(np.inf, error).astype(near.dtype))
    return np.where((error != 0) & np.isfinite(near) & even, neighbour, near)


def _to_float32_odd(values: np.ndarray) -> np.ndarray:
    wide: np.ndarray = values.astype(np.float64 if values.dtype.kind == "f" else np.longdouble)
    near = np.atleast_1d(values.astype(np.float32))
    return _to_odd(near, wide - near)


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of floats of at most 32 bits, in float64 rounded to odd (the product is exact)."""
    product = x.astype(np.float64) * y
    near = product + z
    z_part = near - product  # Knuth's two-sum: the error of `near`
    return _to_odd(near, (product - (near - z_part)) + (z - z_part))


def _float_to_int(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """cvt.rzi: towards zero, saturating, NaN -> 0; int8 is the low half of an int16."""
    info = np.iinfo(np.dtype(f"{dtype.kind}{max(2, dtype.itemsize)}"))
    x = np.where(np.isnan(value), 0.0, value.astype(np.float64))
    inside = np.where((x > info.min) & (x < info.max), x, 0).astype(info.dtype)
    out = np.where(x >= info.max, info.max, np.where(x <= info.min, info.min, inside))
    return out.astype(dtype)


def _triton_interpreter() -> Any:
    return importlib.import_module("triton.runtime.interpreter")


def _format(dtype: Any) -> Format | None:
    return FORMATS.get(dtype.scalar.name)


def _widen(handle: Any) -> np.ndarray:
    fmt = _format(handle.dtype)
    return np.asarray(handle.data) if fmt is None else decode(handle.data, fmt)


def _narrow(data: np.ndarray, dtype: Any) -> np.ndarray:
    fmt = _format(dtype)
    if fmt is not None:
        return encode(data, fmt)
    return np.asarray(data).astype(_triton_interpreter()._get_np_dtype(dtype), copy=False)


def _refuse_fp8(handle: Any) -> None:
    if handle.dtype.scalar.is_fp8():
        raise TypeError(
            f"interpreter: sm_90 has no arithmetic in {handle.dtype.scalar}, cast first"
        )


class _Builder:
    """The methods which replace their namesakes in Triton's InterpreterBuilder.

    Almost all of its create_* methods call `cast_impl`, `binary_op` or `unary_op`; those that do
    not and compute with floats are here too; the others only move bits.
    """

    def cast_impl(self, src, dst_type):
        dtype, value = dst_type.scalar, _widen(src)
        with np.errstate(all="ignore"):
            if value.dtype.kind == "f" and not dtype.is_floating():
                out = _float_to_int(value, _narrow(np.zeros(1), dtype).dtype)
            else:
                out = _narrow(value, dtype)
            return type(src)(out, dtype)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        names = src.dtype.scalar.name, dst_type.scalar.name
        if getattr(rounding_mode, "name", "RTNE") != "RTNE":
            raise NotImplementedError(f"interpreter: casts round to nearest even only: {names}")
        fp8 = [name for name in names if name.startswith("fp8")]
        if len(fp8) == 2 or "fp64" in names or any(name not in FORMATS for name in fp8):
            raise NotImplementedError(f"interpreter: sm_90 has no cast from {' to '.join(names)}")
        return self.cast_impl(src, dst_type)

    def get_bf16(self, value):
        return self.cast_impl(self.get_fp32(value), self.get_bf16_ty())

    def binary_op(self, lhs, rhs, op):
        _refuse_fp8(lhs)
        x, y, dtype = _widen(lhs), _widen(rhs), lhs.dtype.scalar
        with np.errstate(all="ignore"):
            if x.dtype == y.dtype == np.bool_ and op in (np.add, np.subtract, np.multiply):
                out = op(x.view(np.int8), y.view(np.int8)) & 1 == 1  # int1 wraps
            else:
                out = op(x, y)
            # A comparison gives int1, whatever it compares: later casts go by the handle's type.
            dtype = self.get_int1_ty() if out.dtype == np.bool_ else dtype
            return type(lhs)(_narrow(out, dtype), dtype)

    def unary_op(self, arg, op):
        _refuse_fp8(arg)
        with np.errstate(all="ignore"):
            return type(arg)(_narrow(op(_widen(arg)), arg.dtype.scalar), arg.dtype.scalar)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        none = propagate_nans.name == "NONE"
        floor = self.binary_op(arg, lo, np.fmax if none else np.maximum)
        return self.binary_op(floor, hi, np.fmin if none else np.minimum)

    def create_fma(self, x, y, z):
        _refuse_fp8(z)
        a, b, c = _widen(x), _widen(y), _widen(z)
        with np.errstate(all="ignore"):
            out = a * b + c if z.dtype.scalar.is_fp64() else _fma(a, b, c)
            return type(z)(_narrow(out, z.dtype.scalar), z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not a.dtype.is_floating() or a.dtype.is_fp64():
            return type(d)(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)
        x, y, acc = (_widen(handle).astype(np.float32, copy=False) for handle in (a, b, d))
        bits = self.llama4_triton_fp8_accumulator_bits
        if a.dtype.is_fp32() and input_precision.name != "IEEE":
            if input_precision.name != "TF32":
                raise NotImplementedError(f"interpreter: no input precision {input_precision.name}")
            x, y = (
                np.where(np.isnan(v), v, (v.view(np.uint32) & 0xFFFFE000).view(np.float32))
                for v in (x, y)
            )
        with np.errstate(all="ignore"):
            if a.dtype.is_fp8() and b.dtype.is_fp8() and bits is not None:
                acc = _hopper_fp8_dot(x, y, acc, bits, max_num_imprecise_acc)
            else:
                acc = acc + x @ y
            return type(d)(_narrow(acc, d.dtype.scalar), d.dtype.scalar)

    def create_dot_scaled(self, *args):
        raise NotImplementedError("interpreter: tl.dot_scaled is not modelled")

    def create_assert(self, condition, message):
        if not np.all(condition.data):
            raise AssertionError(str(message))


# Wrappers: partially applied to the `original` they replace.


def _reduce(self, original, input):
    """tl.reduce: sums, max, min, argmax and argmin as described above; the rest as Triton does."""
    tl = importlib.import_module("triton.language.standard")
    named = {function: name for name, function in vars(tl).items() if name.endswith(_REDUCED)}
    name = named.get(self.combine_fn)
    if name is None:
        return original(self, input)
    value, axis = _widen(input[0].handle), self.axis
    axes = tuple(range(value.ndim)) if axis is None else axis

    def finish(data, dtype):
        data = np.expand_dims(data, axes) if self.keep_dims else data
        return self.to_tensor(_narrow(data, dtype), dtype)

    with np.errstate(all="ignore"):
        if name != "_sum_combine":
            best = (np.fmax if "max" in name else np.fmin).reduce(value, axis=axis, keepdims=True)
            out = [np.squeeze(best, axes)]
            for index in (arg.handle.data for arg in input[1:]):
                hit = (value == best) | np.isnan(best)
                out.append(np.where(hit, index, np.iinfo(index.dtype).max).min(axis=axis))
        elif _format(input[0].dtype) is None:
            out = [np.sum(value, axis=axis)]
        else:
            out = value.reshape(-1) if axis is None else np.moveaxis(value, axis, 0)
            while len(out) > 1:  # a tree, as on the GPU, which rounds at every node
                rounded = _narrow(out[0::2] + out[1::2], input[0].dtype)
                out = decode(rounded, _format(input[0].dtype))
        return [finish(data, arg.dtype) for data, arg in zip(out, input, strict=True)]


_REDUCED = ("_sum_combine", "_elementwise_max", "_elementwise_min", "_left", "_fast")


def _cumulative(self, original, input):
    """cumsum and cumprod: of bf16 (3.9; before, tl promotes it), with a rounding at every step."""
    fmt = _format(input.dtype)
    if fmt is None:
        return original(self, input)
    step = {"cumsum": np.add, "cumprod": np.multiply}[original.__name__]
    out = np.moveaxis(_widen(input.handle), self.axis, 0)
    for i in range(1, len(out)):
        out[i] = decode(encode(step(out[i - 1], out[i]), fmt), fmt)
    return [self.to_tensor(encode(np.moveaxis(out, 0, self.axis), fmt), input.dtype)]


def _generic(self, original, input):
    """Custom combinations: as Triton does, but of the types that go in, as the GPU demands."""
    combine = self.combine_fn.fn

    def checked(*args):
        out = combine(*args)
        for one, arg in zip(out if isinstance(out, tuple) else (out,), args, strict=False):
            if getattr(one, "dtype", arg.dtype) != arg.dtype:
                raise TypeError(f"interpreter: a combination of {arg.dtype} gave {one.dtype}")
        return out

    self.combine_fn = types.SimpleNamespace(fn=checked)
    return original(self, input)


def _check_overflow(self, original, lhs, rhs, binary_op):
    """Triton's check of integer operations of less than 64 bits, done at once; int1 may wrap."""
    dtype = lhs.type.scalar
    if dtype.is_bool() or dtype.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
        return
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
    exact = operation(lhs.handle.data, rhs.handle.data, dtype=np.int64, casting="unsafe")
    if exact.min() < dtype.get_int_min_value() or exact.max() > dtype.get_int_max_value():
        operation_name = f"int{dtype.int_bitwidth} overflow detected for operation"
        raise AssertionError(f"{operation_name} {binary_op.__name__}")


def _implicit_cvt(original, arg):
    """A kernel's scalar arguments get the type that a launch gives them: bool int1, float fp32."""
    if not isinstance(arg, bool | float):
        return original(arg)
    tl = importlib.import_module("triton.language")
    dtype = tl.int1 if isinstance(arg, bool) else tl.float32
    data = _narrow(np.array([arg]), dtype)
    return tl.tensor(_triton_interpreter().TensorHandle(data, dtype), dtype)


def _get_np_dtype(original, known, dtype):
    """Remembered by name: Triton builds its table anew in every call, a tenth of all time."""
    if dtype.name not in known:
        known[dtype.name] = original(dtype)
    return known[dtype.name]


def _patch_lang_tensor(original, tensor, scope):
    """Triton 3.6 makes a Python int of a one-element array, which numpy 2.4 no longer does."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))


class _Patched:
    """What a launch has made of triton.language, until it is over."""

    def __init__(self, modules: set[str], scope: Any) -> None:
        self._modules, self._scope = modules, scope

    def restore(self) -> None:
        self._modules.clear()
        if self._scope is not None:
            self._scope.restore()


def _patch_lang(original, modules, fn):
    """Triton does this again at every call of a device function, a third of a launch's time.

    `modules`: those of the functions that the launch under way has patched it for. The names that a
    module sees are patched until the launch restores them: nothing is left to do for another
    function of it.
    """
    if fn.__module__ in modules:
        return _Patched(set(), None)
    is_launch = not modules
    modules.add(fn.__module__)
    scope = original(fn)
    return _Patched(modules, scope) if is_launch else scope


def _unmodelled(*args: Any) -> None:
    raise NotImplementedError("interpreter: a float conversion which the shim does not model")


def is_installed() -> bool:
    """Return whether kernels run in the interpreter with this shim."""
    module = sys.modules.get("triton.runtime.interpreter")
    return getattr(getattr(module, "interpreter_builder", None), "llama4_triton_shim", False)


def install(*, fp8_accumulator_bits: int | None = None) -> None:
    """Turn Triton's interpreter on, for this process, and make it compute as sm_90 does.

    Call it before any kernel file is imported; again, it only sets `fp8_accumulator_bits`.

    Args:
        fp8_accumulator_bits: see `emulate_hopper_fp8_accumulator`; None sums fp8 dots in fp32.
    Raises:
        RuntimeError: an untested version of Triton, or a kernel was already imported compiled.
    """
    bits = _checked_bits(fp8_accumulator_bits)
    if not is_installed():
        _refuse_compiled_kernels()
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a function is decorated
        triton = importlib.import_module("triton")
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if not SUPPORTED[0] <= version <= SUPPORTED[1]:
            os.environ.pop("TRITON_INTERPRET")
            os.environ.update({} if before is None else {"TRITON_INTERPRET": before})
            raise RuntimeError(
                "interpreter: Triton must be at least 3.6 and below 3.10 (others are untested), "
                f"got {triton.__version__}"
            )
        triton.knobs.runtime.interpret = True
        _interpret_standard_library(triton.language)
        _patch(_triton_interpreter())
    _triton_interpreter().InterpreterBuilder.llama4_triton_fp8_accumulator_bits = bits


def _refuse_compiled_kernels() -> None:
    jit = sys.modules.get("triton.runtime.jit")
    for name, module in list(sys.modules.items()):
        if jit is not None and name.startswith(f"{__package__}."):
            if any(isinstance(value, jit.JITFunction) for value in vars(module).values()):
                raise RuntimeError(
                    f"interpreter: install() must run before {name} is imported (its kernels are "
                    "already decorated for compilation)"
                )


def _interpret_standard_library(language: Any) -> None:
    """Decorate tl.sum and its like anew where Triton was imported for compilation."""
    decorate = _triton_interpreter().InterpretedFunction
    jit = importlib.import_module("triton.runtime.jit")
    modules = [m for name, m in sys.modules.items() if name.startswith(language.__name__)]
    interpreted: dict[Any, Any] = {}
    for owner in [*modules, language.tensor]:
        for name, value in list(vars(owner).items()):
            if isinstance(value, jit.JITFunction):
                function = interpreted.setdefault(value.fn, decorate(value.fn))
                bound = functools.partialmethod(function)  # binds like a method
                setattr(owner, name, bound if owner is language.tensor else function)


def _patch(interpreter: Any) -> None:
    semantic = importlib.import_module("triton.language.semantic").TritonSemantic
    nvidia = importlib.import_module("triton.backends.nvidia.compiler")
    for name, member in vars(_Builder).items():
        if callable(member):
            setattr(interpreter.InterpreterBuilder, name, member)
    for owner, name, wrapper in (
        (interpreter.ReduceOps, "apply_impl", _reduce),
        (interpreter.ReduceOps, "generic_reduce", _generic),
        (interpreter.ScanOps, "generic_scan", _generic),
        (interpreter.ScanOps, "cumsum", _cumulative),
        (interpreter.ScanOps, "cumprod", _cumulative),
        (semantic, "binary_op_sanitize_overflow_impl", _check_overflow),
    ):
        setattr(owner, name, functools.partialmethod(wrapper, getattr(owner, name)))
    for replacement in (_implicit_cvt, _patch_lang_tensor):
        name = replacement.__name__
        setattr(interpreter, name, functools.partial(replacement, getattr(interpreter, name)))
    interpreter._get_np_dtype = functools.partial(_get_np_dtype, interpreter._get_np_dtype, {})
    interpreter._patch_lang = functools.partial(_patch_lang, interpreter._patch_lang, set())
    interpreter._convert_float = _unmodelled
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(
        builder.options, debug=True, max_num_imprecise_acc_default=NEVER_PROMOTED
    )
    builder.codegen_fns["min_dot_size"] = nvidia.min_dot_size(None)
    builder.llama4_triton_shim = True


# Hopper's fp8 accumulator. NVIDIA documents fp32; it is reported (DeepSeek-V3; DeepGEMM issues 37,
# 50 and 287) that wgmma aligns the 32 products of one instruction and the accumulator to the
# largest of them and keeps 14 bits of each. A model, not a measurement. Relative errors it gives,
# all-positive Gaussian operands, K = 5120: 8.7e-2 never promoted to fp32, 5.8e-4 every 128.


@contextlib.contextmanager
def emulate_hopper_fp8_accumulator(bits: int | None = 14) -> Iterator[None]:
    """Inside, fp8 tl.dot sums with `bits` significant bits (14: as reported of Hopper).

    `max_num_imprecise_acc` promotes as in compiled code: not at all by default, so a chain
    acc = tl.dot(a, b, acc) stays in the short accumulator; acc += tl.dot(a, b) leaves it each time.
    """
    if not is_installed():
        raise RuntimeError("interpreter: call install() before emulate_hopper_fp8_accumulator()")
    builder = _triton_interpreter().InterpreterBuilder
    before = builder.llama4_triton_fp8_accumulator_bits
    builder.llama4_triton_fp8_accumulator_bits = _checked_bits(bits)
    try:
        yield
    finally:
        builder.llama4_triton_fp8_accumulator_bits = before


def _checked_bits(bits: int | None) -> int | None:
    if bits is not None and not 2 <= bits <= 18:  # 33 addends of 18 bits are exact in float32
        raise ValueError(f"interpreter: fp8_accumulator_bits must be in [2, 18], got {bits}")
    return bits


def _hopper_fp8_dot(
    x: np.ndarray, y: np.ndarray, acc: np.ndarray, bits: int, promote_every: int
) -> np.ndarray:
    depth = x.shape[-1]
    promoted = promote_every <= depth
    partial, pending = (np.zeros_like(acc) if promoted else acc), 0
    for k in range(0, depth, WGMMA_K):
        x_k, y_k = x[..., k : k + WGMMA_K], y[..., k : k + WGMMA_K, :]
        products = np.swapaxes(x_k, -1, -2)[..., :, None] * y_k[..., :, None, :]  # (.., K, M, N)
        largest = np.maximum(np.abs(products).max(axis=-3), np.abs(partial))
        exponent = np.where(np.isfinite(largest), np.frexp(largest)[1], 0)
        unit = np.ldexp(np.float32(1), bits - exponent)  # reciprocal of the last bit kept
        total = np.trunc(products * unit[..., None, :, :]).sum(axis=-3) + np.trunc(partial * unit)
        exact = products.sum(axis=-3) + partial  # where it is inf or NaN there is nothing to align
        partial = np.where(np.isfinite(largest), total / unit, exact)
        pending += WGMMA_K
        if promoted and (pending >= promote_every or k + WGMMA_K >= depth):
            acc, partial, pending = acc + partial, np.zeros_like(acc), 0
    return acc if promoted else partial
