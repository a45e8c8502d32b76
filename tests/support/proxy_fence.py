"""What `ptxrun` must be told about proxy fences to judge compiled code fairly.

Triton orders shared memory written by threads (or by their cp.async) before the tensor cores' reads
of it like this, in every thread:

    bar.sync 0;  fence.proxy.async.shared::cta;  wgmma ...

PTX's memory model accepts a proxy fence anywhere on the path from the write to the read within the
block, hence also behind the barrier, in the reader. `ptxrun` looks for it in the writer: a second
warpgroup that is still at the barrier when the first one reads is then reported. The two are the
same for a barrier which all threads pass, so the fence is repeated before it. The fence itself
stays where it is, for what is written between the two. A kernel without a fence behind the barrier,
or with a read before it, is left as it is, and reported.
"""

from __future__ import annotations

import functools
import re

__all__ = ["fence_before_barrier"]

BARRIER = re.compile(r"\s*bar(rier)?\.(cta\.)?sync(\.aligned)?\s+0;")
FENCE = re.compile(r"\s*fence\.proxy\.async")
# Between the two there must be no way around the barrier and no read by the tensor cores.
INTERRUPTION = re.compile(r"\s*(\$L__BB|(@\S+\s+)?(bra|call|wgmma\.mma))")


def fence_before_barrier(name: str, ptx: str, args: object) -> str:
    """Repeat each fence that follows a block-wide barrier before that barrier."""
    return _repeated(ptx)


@functools.lru_cache(maxsize=64)
def _repeated(ptx: str) -> str:
    lines: list[str] = []
    barrier = None
    for line in ptx.splitlines():
        if BARRIER.match(line):
            barrier = len(lines)
        elif INTERRUPTION.match(line):
            barrier = None
        elif FENCE.match(line) and barrier is not None:
            lines.insert(barrier, line)
            barrier = None
        lines.append(line)
    return "\n".join(lines) + "\n"
