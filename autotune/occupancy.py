"""How many blocks of a kernel fit on one SM, and what stops the next one.

    occupancy("sm_90", registers=168, shared=131_072, num_warps=8)   # 1 block, registers and shared

Source: CUDA C++ programming guide, "Technical specifications per compute capability" and the
occupancy calculator that comes with the toolkit. Registers are given to warps in units of 256 and
belong to one of four partitions of the SM, so warps go in fours; shared memory is given to blocks
in units of 128 bytes, of which the system keeps 1 KiB per block from sm_80 on.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SMS", "Occupancy", "Sm", "occupancy"]

WARP = 32
REGISTER_UNIT = 256  # registers are allocated to a warp in multiples of this
PARTITIONS = 4  # each has a quarter of the registers; a warp lives in one
MAX_REGISTERS = 255  # of one thread


@dataclass(frozen=True, kw_only=True, slots=True)
class Sm:
    """What one SM can hold."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_block: int  # bytes, the most one block can ask for (opt-in)
    registers: int = 65_536
    shared_reserved: int = 1024  # bytes per block that the system takes
    shared_unit: int = 128


SMS = {
    "sm_75": Sm(
        warps=32, blocks=16, shared=65_536, shared_block=65_536, shared_reserved=0, shared_unit=256
    ),
    "sm_80": Sm(warps=64, blocks=32, shared=167_936, shared_block=166_912),
    "sm_86": Sm(warps=48, blocks=16, shared=102_400, shared_block=101_376),
    "sm_89": Sm(warps=48, blocks=24, shared=102_400, shared_block=101_376),
    "sm_90": Sm(warps=64, blocks=32, shared=233_472, shared_block=232_448),
    "sm_100": Sm(warps=64, blocks=32, shared=233_472, shared_block=232_448),
    "sm_120": Sm(warps=48, blocks=24, shared=102_400, shared_block=101_376),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """Blocks of one kernel on one SM."""

    blocks: int  # 0: it cannot run at all
    limiter: str  # "registers", "shared", "warps", "blocks"; several joined by "+"
    warps: int  # blocks * num_warps
    max_warps: int  # of the SM


def occupancy(arch: str, *, registers: int, shared: int, num_warps: int) -> Occupancy:
    """Return how many blocks run at a time on one SM of `arch`.

    Args:
        arch: key of SMS.
        registers: per thread, as compiled.
        shared: bytes per block, dynamic and static, without what the system reserves.
        num_warps: of one block.
    Raises:
        ValueError: an architecture without an entry, or counts that no kernel has.
    """
    if arch not in SMS:
        raise ValueError(f"occupancy: arch must be one of {list(SMS)}, got {arch!r}")
    if not 0 < registers <= MAX_REGISTERS:
        raise ValueError(f"occupancy: registers must be in 1..{MAX_REGISTERS}, got {registers}")
    if num_warps < 1 or shared < 0:
        raise ValueError(
            f"occupancy: num_warps and shared must be positive, got {num_warps} and {shared}"
        )
    sm = SMS[arch]
    per_warp = _up(registers * WARP, REGISTER_UNIT)
    warps_by_registers = sm.registers // PARTITIONS // per_warp * PARTITIONS
    per_block = _up(shared + sm.shared_reserved, sm.shared_unit)
    fits = {
        "registers": warps_by_registers // num_warps,
        "shared": sm.shared // per_block if per_block else sm.blocks,
        "warps": sm.warps // num_warps,
        "blocks": sm.blocks,
    }
    if shared > sm.shared_block:
        fits["shared"] = 0
    blocks = min(fits.values())
    return Occupancy(
        blocks=blocks,
        limiter="+".join(name for name, count in fits.items() if count == blocks),
        warps=blocks * num_warps,
        max_warps=sm.warps,
    )


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
