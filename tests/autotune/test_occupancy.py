"""Occupancy against known values of NVIDIA's calculator."""

from __future__ import annotations

import pytest

from llama4_triton.autotune.launches import DEVICES
from llama4_triton.autotune.occupancy import SMS, occupancy

pytestmark = pytest.mark.no_kernels

# (arch, registers, shared, warps): blocks, limiter. By hand from the programming guide's tables.
KNOWN = {
    ("sm_80", 32, 0, 8): (8, "registers+warps"),  # 2048 threads
    ("sm_80", 33, 0, 8): (6, "registers"),  # 40 per thread allocated: 12 warps a partition
    ("sm_80", 255, 0, 8): (1, "registers"),
    ("sm_80", 64, 0, 4): (8, "registers"),
    ("sm_80", 16, 48 * 1024, 4): (3, "shared"),  # 164 KiB / 49
    ("sm_80", 16, 0, 1): (32, "blocks"),
    ("sm_86", 32, 0, 8): (6, "warps"),
    ("sm_86", 16, 0, 1): (16, "blocks"),
    ("sm_86", 128, 101_376, 8): (1, "shared"),
    ("sm_89", 16, 0, 1): (24, "blocks"),
    ("sm_90", 168, 131_072, 8): (1, "registers+shared"),
    ("sm_90", 168, 0, 4): (3, "registers"),  # 12 warps of 168: the CUTLASS kernels' shape
    ("sm_90", 128, 113_000, 4): (2, "shared"),
    ("sm_90", 128, 232_448, 4): (1, "shared"),
    ("sm_90", 128, 232_449, 4): (0, "shared"),
    ("sm_90", 255, 0, 12): (0, "registers"),
    ("sm_90", 40, 61_440, 4): (3, "shared"),
    ("sm_75", 32, 0, 8): (4, "warps"),
    ("sm_75", 16, 32_768, 4): (2, "shared"),
    ("sm_120", 16, 0, 1): (24, "blocks"),
}


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: "-".join(map(str, case)))
def test_known_values(case):
    arch, registers, shared, warps = case
    found = occupancy(arch, registers=registers, shared=shared, num_warps=warps)
    assert (found.blocks, found.limiter) == KNOWN[case]
    assert found.warps == found.blocks * warps <= found.max_warps


def test_architectures_are_those_that_launches_are_recorded_for():
    assert {a: sm.shared_block for a, sm in SMS.items()} == {
        a: device.shared_bytes for a, device in DEVICES.items()
    }
    assert all(sm.shared - sm.shared_reserved == sm.shared_block for sm in SMS.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arch": "sm_70"}, "arch must be one of .*got 'sm_70'"),
        ({"registers": 256}, r"registers must be in 1\.\.255, got 256"),
        ({"registers": 0}, "got 0"),
        ({"num_warps": 0}, "num_warps and shared must be positive"),
        ({"shared": -1}, "got 4 and -1"),
    ],
)
def test_nonsense_is_refused(change, said):
    args = {"arch": "sm_90", "registers": 32, "shared": 0, "num_warps": 4} | change
    with pytest.raises(ValueError, match=said):
        occupancy(args.pop("arch"), **args)
