"""Recording without a GPU: launches, ATen calls, allocations, and what must not be recorded."""

from __future__ import annotations

import pickle

import pytest
import torch

from llama4_triton.autotune.launches import DEVICES, Launch, TensorSpec
from llama4_triton.autotune.recorder import record, recorded_launches
from llama4_triton.kernels.attention_decode import attention_decode
from llama4_triton.kernels.paged_kv import PagedKV
from llama4_triton.kernels.quantize import quantize_rowwise
from llama4_triton.kernels.rms_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.no_kernels

BF16 = torch.bfloat16


def cuda(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_a_launch_is_described_and_not_run():
    recording = record(lambda: rms_norm(cuda(4096, 5120), cuda(5120), 1e-5))
    (launch,) = recording.launches
    assert launch.name == "_rms_norm_kernel" and launch.grid == (4096,)
    arguments = launch.arguments()
    assert arguments["x_ptr"].shape == (4096, 5120) and arguments["x_ptr"].strides == (5120, 1)
    assert arguments["residual_ptr"] is None and arguments["H"] == 5120
    assert launch.constexprs["HAS_RESIDUAL"] is False and launch.num_warps == 8
    assert [a.nbytes for a in recording.allocations] == [4096 * 5120 * 2, 5120 * 2, 4096 * 5120 * 2]


def test_what_make_builds_is_not_recorded():
    recording = record(
        lambda x: add_rms_norm(*x, 1e-5), make=lambda: [cuda(3, 64), cuda(3, 64), cuda(64)]
    )
    assert [a.shape for a in recording.allocations] == [(3, 64), (3, 64)]  # y and h
    x, residual, weight, h, y = [
        arg.storage for arg in recording.launches[0].args if isinstance(arg, TensorSpec)
    ]
    assert len({x, residual, weight, h, y}) == 5


def test_aten_calls_are_launches_unless_they_only_look():
    def run(x):
        y = x.view(-1)[4:12].reshape(2, 4).t()[..., None]  # views
        torch.empty_like(y)
        return (y[0] + 1).relu_()

    recording = record(run, make=lambda: cuda(4, 8))
    assert [str(call) for call in recording.aten] == ["aten.add(2x1)", "aten.relu_(2x1)"]


def test_indexing_by_a_tensor_is_a_launch():
    recording = record(
        lambda inputs: inputs[0][:, inputs[1]].shape,
        make=lambda: (cuda(4, 8), cuda(3, dtype=torch.int64)),
    )
    assert [str(call) for call in recording.aten] == ["aten.index(4x8, 3)"]


@pytest.mark.parametrize(
    "waits", [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()],
    ids=["item", "branch", "nonzero"],
)  # fmt: skip
def test_asking_for_a_value_raises(waits):
    with pytest.raises(RuntimeError):
        record(waits, make=lambda: cuda(4))
    assert record(lambda x: x + 1, make=lambda: cuda(4)).aten  # and nothing else is in the way


def test_copying_to_the_host_raises():
    with pytest.raises(RuntimeError, match=r"record: fn must not wait for the device, got aten"):
        record(lambda x: x.cpu(), make=lambda: cuda(4))


def test_a_copy_from_the_host_is_a_launch():
    recording = record(lambda: torch.zeros(4).to("cuda"))
    assert [call.name for call in recording.aten] == ["aten._to_copy"]


def test_choices_are_those_of_the_device_that_is_assumed():
    def decode():
        cache = cuda(8192, 64, 1, 128)
        table = cuda(1, 8192, dtype=torch.int32)
        kv = PagedKV(k_cache=cache, v_cache=cache, block_table=table)
        attention_decode(cuda(1, 5, 128), kv, cuda(1, dtype=torch.int32))

    def splits(arch):
        return record(decode, device=DEVICES[arch]).launches[1].grid[0]

    assert splits("sm_90") == 1 + 4 * 132 and splits("sm_86") == 1 + 4 * 84


def test_the_workspace_is_its_formula():
    def decode(inputs):
        q, kv, seq_lens = inputs
        attention_decode(q, kv, seq_lens)

    def make():
        cache = cuda(2048, 64, 1, 128)
        kv = PagedKV(k_cache=cache, v_cache=cache, block_table=cuda(4, 2048, dtype=torch.int32))
        return cuda(4, 5, 128), kv, cuda(4, dtype=torch.int32)

    recording = record(decode, make=make)
    room = recording.launches[1].grid[0]
    assert room > 4 and len(recording.launches) == 3
    *_, workspace, out, lse = recording.allocations
    assert workspace.nbytes == 4 * room * 5 * (128 + 1)
    assert {out.shape, lse.shape} == {(4, 5, 128), (4, 5)}


def test_recordings_of_equal_work_are_equal():
    def run():
        quantize_rowwise(cuda(33, 5120))
        return rms_norm(cuda(33, 5120), cuda(5120), 1e-5)

    first, second = record(run), record(run)
    assert first == second
    assert pickle.loads(pickle.dumps(first.launches)) == second.launches


def test_views_keep_their_alignment_and_storage():
    x = torch.empty(8, 256)
    (launch,) = recorded_launches(lambda: rms_norm(x[:, 3:67], torch.empty(64), 1e-5))
    spec = launch.args[0]
    assert (spec.shape, spec.strides, spec.offset) == ((8, 64), (256, 1), 12)
    assert spec.data_ptr() == 12 and spec.nbytes == (7 * 256 + 64) * 4


def binaries(*calls):
    return [launch.binary() for call in calls for launch in recorded_launches(call)]


def norm(T, H, *, column=0, dtype=torch.float32):
    x = torch.empty(T, H + column, dtype=dtype)[:, column:]
    return lambda: rms_norm(x, torch.empty(H, dtype=dtype), 1e-5)


# What Triton compiles apart, and what it does not. The second entry is the odd one out.
SAME = {"rows": (norm(3, 512), norm(4096, 512)), "width": (norm(3, 512), norm(3, 496))}
APART = {
    "divisibility of the width": (norm(3, 512), norm(3, 513)),
    "alignment of the address": (norm(3, 508, column=4), norm(3, 508, column=3)),
    "dtype": (norm(3, 512), norm(3, 512, dtype=BF16)),
    "constexpr": (norm(3, 512), norm(3, 4096)),
}


@pytest.mark.compiled_only
@pytest.mark.parametrize("name", [*SAME, *APART])
def test_binaries_are_what_triton_compiles_apart(name):
    """Equal binaries have one key in Triton's own cache, different ones two."""
    from llama4_triton.autotune.compile import compiling_for
    from llama4_triton.kernels._launch import OPTIONS

    calls = (SAME | APART)[name]
    first, second = binaries(*calls)
    hashes = set()
    with compiling_for("sm_90"):
        for call in calls:
            (launch,) = recorded_launches(call)
            kernel = launch.jit.warmup(*launch.args, grid=launch.grid, **OPTIONS, **launch.kwargs)
            hashes.add(kernel.hash)
    assert (first == second) == (name in SAME) == (len(hashes) == 1)


def test_launches_name_importable_kernels():
    (launch,) = recorded_launches(norm(3, 64))
    assert launch.kernel == "llama4_triton.kernels.rms_norm:_rms_norm_kernel"
    fresh = Launch(kernel=launch.kernel, grid=(1,), args=(), kwargs={})
    assert fresh.jit is launch.jit
