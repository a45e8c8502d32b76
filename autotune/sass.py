"""Facts of compiled code, read from its text: pure functions of strings, no compiler, no GPU.

    facts = read(cuobjdump=..., ptx=..., ttgir=...)     # the three texts of one kernel

* `cuobjdump -res-usage -sass` gives registers, stack, local memory and the machine code: spill
  instructions, tensor-core instructions and, in each main loop, waits and loads;
* PTX gives what the assembler hides: which tensor-core instructions one `tl.dot` was made of,
  tf32, float atomics, additions, the kind of division;
* Triton's GPU IR gives what one iteration of a main loop reads from global memory, exactly and per
  block: asynchronous copies, and loads that stayed plain.

A main loop is an innermost loop that holds tensor-core instructions. In machine code it is a
natural loop of the control flow, because the assembler moves what is rare (spinning on a barrier)
out of line, from where it branches back. The assembler may also have unrolled or copied a loop, so
those of machine code and IR need not pair up. Warp-specialised code copies in loops without
tensor-core instructions, which are not looked at.

Bytes in flight of a block follow from the IR. Say an iteration copies B bytes in C groups
(`commit_group`), and waits until at most W groups are pending. The W newest groups are then the
copies of W / C iterations; the loop issues those of one more before it waits again:

    bytes in flight = B * (W / C + 1)

For a plain GEMM loop, W = (num_stages - 2) * C and this is B * (num_stages - 1). TMA copies are
awaited by a barrier per buffer, not by counting: there it is B * (num_stages - 1) directly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

__all__ = [
    "Facts",
    "IrLoop",
    "Loop",
    "kernel_symbol",
    "read",
    "read_main_loops",
    "read_ttgir_loops",
    "read_usage",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A main loop in the machine code; counts are instructions of one iteration."""

    instructions: int
    issue_cycles: int  # sum of the stall counts in the control bits: a warp needs at least these
    tensor: dict[str, int]  # "HGMMA.64x128x16.F32.BF16 SS": its count
    dots: float  # how many tl.dot these make; the assembler may have unrolled some
    waits: int  # for the tensor cores (WARPGROUP.DEPBAR)
    wait_depth: int | None  # least number of dots that such a wait leaves running
    copies: dict[str, int]  # "LDGSTS.128", "UTMALDG": asynchronous copies
    copy_depth: int | None  # least number of copy groups that a wait leaves pending
    loads: dict[str, int]  # "LDG.128": loads into registers
    fp32_adds: int

    @property
    def serialised(self) -> bool:
        """Whether it waits for the tensor cores more often than it has dots."""
        return self.waits > self.dots

    @property
    def load_bytes(self) -> int:
        """Bytes that a thread loads into registers per iteration."""
        return sum(_width(name) * count for name, count in self.loads.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class IrLoop:
    """A main loop in Triton's GPU IR; bytes are of one iteration of one block."""

    dots: int
    copies: tuple[tuple[str, int], ...]  # asynchronous: ("128x64xf16", bytes)
    loads: tuple[tuple[str, int], ...]  # into registers
    groups: int  # commit groups of asynchronous copies
    pending: int | None  # least number of groups that a wait leaves pending; None: none counted

    @property
    def copy_bytes(self) -> int:
        return sum(size for _, size in self.copies)

    @property
    def load_bytes(self) -> int:
        return sum(size for _, size in self.loads)

    def bytes_in_flight(self, num_stages: int) -> int:
        """See the module; 0 where nothing is copied asynchronously."""
        if self.groups and self.pending is not None:
            return int(self.copy_bytes * (self.pending / self.groups + 1))
        return self.copy_bytes * max(0, num_stages - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the compiled code of one kernel uses and contains."""

    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    spills: int  # instructions that access local memory
    instructions: int
    tensor: dict[str, int]  # tensor-core instructions with shape, types and operand source
    sass: dict[str, int]  # per kind of SASS
    ptx: dict[str, int]  # per kind of PTX
    main_loops: tuple[Loop, ...]
    ir_loops: tuple[IrLoop, ...]


# Each instruction is counted under every kind whose pattern its start matches.
SASS = {
    "wgmma": r"[HQI]GMMA\.",
    "tcgen05": r"UTC[A-Z]*MMA",
    "mma.sync": r"[HQIDO]MMA\.",
    "tf32": r"HG?MMA.*TF32",
    "cp.async": r"LDGSTS",
    "tma": r"(UTMALDG|UTMASTG|UBLKCP)",
    "ld.global": r"LDG?\.",
    "spill": r"(LDL|STL)",
    "fp32 add": r"FADD",
}
PTX = {
    "wgmma": r"wgmma\.mma_async",
    "wgmma commit": r"wgmma\.commit_group",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "tf32": r"(w?g?mma|tcgen05)\..*tf32",
    "float atomic": r"(atom|red)\.(\w+\.)*(global|shared)\S*\.(v\d\.)?(f|bf)\d+",
    "add.f32": r"add(\.rn)?(\.ftz)?\.f32",
    "inexact division": r"div\.(full|approx)",
}
TENSOR = ("wgmma", "tcgen05", "mma.sync")

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;"
    r"(?:\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/)?"
)


@dataclass(frozen=True, slots=True)
class _Instruction:
    address: int
    predicated: bool
    text: str
    stall: int  # cycles until the warp may issue its next instruction


def read(*, cuobjdump: str, ptx: str, ttgir: str) -> Facts:
    """Read the facts of one kernel.

    Raises:
        ValueError: cuobjdump's text has no resource usage, or more than one kernel.
    """
    registers, stack, local = read_usage(cuobjdump)
    lines = _instructions(cuobjdump)
    code = [line.text for line in lines]
    ptx_lines = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]+[^\n]*;)", ptx, re.MULTILINE)
    sass_counts = _count(SASS, code)
    return Facts(
        registers=registers,
        stack=stack,
        local=local,
        spills=sass_counts["spill"],
        instructions=len(lines),
        tensor=_tensor(code),
        sass=sass_counts,
        ptx=_count(PTX, ptx_lines),
        main_loops=_main_loops(lines, _mma_per_dot(ptx_lines)),
        ir_loops=read_ttgir_loops(ttgir),
    )


def read_usage(cuobjdump: str) -> tuple[int, int, int]:
    """Registers, and bytes of stack and local memory per thread."""
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump)
    if len(usage) != 1:
        raise ValueError(
            f"read_usage: cuobjdump must print the usage of one kernel, got {cuobjdump!r:.200}"
        )
    registers, stack, local = (int(value) for value in usage[0])
    return registers, stack, local


def kernel_symbol(cuobjdump: str) -> str:
    """Name of the kernel in the binary, which profilers show."""
    found = re.search(r"Function : (\S+)", cuobjdump)
    return found.group(1) if found else ""


def read_main_loops(cuobjdump: str, ptx: str = "") -> tuple[Loop, ...]:
    """The main loops of the machine code; PTX is needed to tell how many dots they make."""
    ptx_lines = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]+[^\n]*;)", ptx, re.MULTILINE)
    return _main_loops(_instructions(cuobjdump), _mma_per_dot(ptx_lines))


def _instructions(cuobjdump: str) -> list[_Instruction]:
    # The stall count is bits 41 to 44 of an instruction's upper 64 bits.
    return [
        _Instruction(int(address, 16), bool(predicate), text, int(high or "0", 16) >> 41 & 15)
        for address, predicate, text, high in _INSTRUCTION.findall(cuobjdump)
    ]


def _count(patterns: dict[str, str], lines: Iterable[str]) -> dict[str, int]:
    counts = dict.fromkeys(patterns, 0)
    compiled = [(kind, re.compile(pattern)) for kind, pattern in patterns.items()]
    for line in lines:
        for kind, pattern in compiled:
            counts[kind] += pattern.match(line) is not None
    return counts


_TENSOR = re.compile("|".join(f"({SASS[kind]})" for kind in TENSOR))


def _tensor(code: Iterable[str]) -> dict[str, int]:
    """Tensor-core instructions by name; of wgmma also where A comes from.

    `HGMMA D, gdesc[..], C`: A and B are descriptors of shared memory (SS); `HGMMA D, R4, gdesc[..],
    C`: A is in registers (RS).
    """
    counts: Counter[str] = Counter()
    for text in code:
        if _TENSOR.match(text):
            name, _, operands = text.partition(" ")
            if "GMMA" in name:
                source = operands.split(",")[1].strip() if "," in operands else ""
                name += " SS" if source.startswith("gdesc") else " RS"
            counts[name] += 1
    return dict(sorted(counts.items()))


def _shape(name: str) -> str:
    """ "64x128x16" of an HGMMA; the rest of the name of other instructions."""
    found = re.search(r"\d+x\d+x\d+", name)
    return found.group() if found else name


def _mma_per_dot(ptx_lines: Sequence[str]) -> dict[str, float]:
    """How many wgmma of each shape one tl.dot became: those up to the next commit."""
    dots: dict[str, list[int]] = {}
    group: Counter[str] = Counter()
    for line in ptx_lines:
        if line.startswith("wgmma.mma_async"):
            found = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", line)
            if found:
                group["x".join(found.groups())] += 1
        elif line.startswith("wgmma.commit_group"):
            for shape, count in group.items():
                dots.setdefault(shape, []).append(count)
            group.clear()
    return {shape: sum(counts) / len(counts) for shape, counts in dots.items()}


def _main_loops(lines: Sequence[_Instruction], mma_per_dot: dict[str, float]) -> tuple[Loop, ...]:
    starts, successors = _blocks(lines)
    blocks = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    is_tensor = [any(_TENSOR.match(line.text) for line in block) for block in blocks]
    loops = [body for body in _natural_loops(successors) if any(is_tensor[b] for b in body)]
    innermost = [body for body in loops if not any(other < body for other in loops)]
    return tuple(
        _loop([line for b in sorted(body) for line in blocks[b]], mma_per_dot)
        for body in sorted(innermost, key=min)
    )


def _blocks(lines: Sequence[_Instruction]) -> tuple[list[int], list[list[int]]]:
    """Basic blocks: the index of the first instruction of each, and which blocks may follow."""
    at = {line.address: i for i, line in enumerate(lines)}
    targets: dict[int, int] = {}
    leaders = {0}
    for i, line in enumerate(lines):
        branch = re.match(r"(?:BRA|JMP)\b.*?\b0x([0-9a-f]+)", line.text)
        if branch and int(branch.group(1), 16) in at:
            targets[i] = at[int(branch.group(1), 16)]
            leaders |= {targets[i], i + 1}
        elif re.match(r"(EXIT|RET|BRX|JMX)\b", line.text):
            leaders.add(i + 1)
    starts = sorted(leader for leader in leaders if leader < len(lines))
    number = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    for block, end in enumerate([*starts[1:], len(lines)]):
        last = lines[end - 1]
        # BRA.DIV and "BRA.U UP0, .." depend on an operand instead of a predicate in front.
        jumps = re.match(r"(BRA(\.U)? 0x|JMP 0x|EXIT|RET|BRX|JMX)", last.text)
        ends = jumps is not None and not last.predicated
        following = [] if ends or end == len(lines) else [block + 1]
        if end - 1 in targets:
            following.append(number[targets[end - 1]])
        successors.append(following)
    return starts, successors


def _natural_loops(successors: Sequence[Sequence[int]]) -> list[frozenset[int]]:
    """Bodies of the edges u -> h where every way to u leads through h; one per header h."""
    count = len(successors)
    before: list[list[int]] = [[] for _ in range(count)]
    for u, following in enumerate(successors):
        for v in following:
            before[v].append(u)
    every = (1 << count) - 1
    # Bit sets of dominators. What nothing branches to is entered from outside (BRX).
    dominators = [1 << b if b == 0 or not before[b] else every for b in range(count)]
    changed = True
    while changed:
        changed = False
        for b in range(1, count):
            if before[b]:
                common = every
                for u in before[b]:
                    common &= dominators[u]
                common |= 1 << b
                changed |= common != dominators[b]
                dominators[b] = common
    bodies: dict[int, set[int]] = {}
    for u, following in enumerate(successors):
        for head in following:
            if dominators[u] >> head & 1:
                body = bodies.setdefault(head, {head})
                stack = [u]
                while stack:
                    b = stack.pop()
                    if b not in body:
                        body.add(b)
                        stack += before[b]
    return [frozenset(body) for body in bodies.values()]


def _loop(body: Sequence[_Instruction], mma_per_dot: dict[str, float]) -> Loop:
    code = [line.text for line in body]
    tensor = _tensor(code)
    waits = [int(d, 16) for d in _matches(r"WARPGROUP\.DEPBAR\.LE gsb\d+, 0x([0-9a-f]+)", code)]
    pending = [int(d, 16) for d in _matches(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", code)]
    return Loop(
        instructions=len(body),
        issue_cycles=sum(line.stall for line in body),
        tensor=tensor,
        dots=sum(
            count / mma_per_dot.get(_shape(name), 1.0)
            for name, count in tensor.items()
            if "GMMA" in name
        ),
        waits=sum(text.startswith("WARPGROUP.DEPBAR") for text in code),
        wait_depth=min(waits, default=None),
        copies=_named(r"(LDGSTS|UTMALDG|UBLKCP)", code),
        copy_depth=min(pending, default=None),
        loads=_named(r"(LDG|LD)\.", code),
        fp32_adds=_count({"": SASS["fp32 add"]}, code)[""],
    )


def _matches(pattern: str, code: Iterable[str]) -> list[str]:
    return [found.group(1) for text in code if (found := re.match(pattern, text))]


def _named(pattern: str, code: Iterable[str]) -> dict[str, int]:
    """Memory instructions by operation and width: "LDG.128", "LDGSTS.32", "UTMALDG"."""
    counts: Counter[str] = Counter()
    for text in code:
        if re.match(pattern, text):
            operation, *modifiers = text.split()[0].split(".")
            widths = [m for m in modifiers if re.fullmatch(r"(8|16|32|64|128|256|[US](8|16))", m)]
            bulk = operation.startswith("U")
            counts[operation if bulk else f"{operation}.{widths[-1] if widths else 32}"] += 1
    return dict(sorted(counts.items()))


def _width(name: str) -> int:
    """Bytes per thread of "LDG.128", "LDG.U16"."""
    return int(re.sub(r"\D", "", name.rpartition(".")[2]) or 0) // 8


_DOT = re.compile(r"= (?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) |^ttng\.tc_gen5_mma")
_BITS = re.compile(r"(?:i|f|bf|f8E\w*?M\w*?|f8)(\d+)$")


def read_ttgir_loops(ttgir: str) -> tuple[IrLoop, ...]:
    """The main loops of Triton's GPU IR, in the order of the text."""
    open_loops: list[tuple[int, list[str]]] = []  # depth of braces outside, lines of its own
    closed: list[list[str]] = []
    with_inner: set[int] = set()  # depths whose loop holds a finished main loop
    depth = 0
    for raw in ttgir.splitlines():
        line = re.sub(r'loc\(.*$|"[^"]*"', "", raw).strip()
        before, depth = depth, depth + line.count("{") - line.count("}")
        if re.search(r"\bscf\.(for|while)\b", line):
            open_loops.append((before, []))
            continue
        if open_loops:
            open_loops[-1][1].append(line)
            outside, body = open_loops[-1]
            if depth <= outside:
                open_loops.pop()
                if any(_DOT.search(text) for text in body) and outside not in with_inner:
                    closed.append(body)
                    with_inner.update(level for level, _ in open_loops)
                with_inner.discard(outside)
    return tuple(_ir_loop(body) for body in closed)


def _ir_loop(body: Sequence[str]) -> IrLoop:
    pending = [
        int(found.group(1))
        for line in body
        if (found := re.search(r"ttg\.async_wait.*\{num = (\d+)", line))
    ]
    return IrLoop(
        dots=sum(_DOT.search(line) is not None for line in body),
        copies=tuple(
            _sized(line)
            for line in body
            if re.search(r"ttg\.async_copy_global|ttng\.async_tma_(copy_global|gather)", line)
        ),
        loads=tuple(_sized(line) for line in body if re.search(r"= tt\.(descriptor_)?load ", line)),
        groups=sum("ttg.async_commit_group" in line for line in body),
        pending=min(pending, default=None),
    )


def _sized(line: str) -> tuple[str, int]:
    """("128x64xf16", bytes) of the memory that a load or a copy in the IR moves.

    Its type is the last one with a shape: `tensor<64x!tt.ptr<f32>, ..>`, `-> <64x128xbf16, ..>`,
    `!ttg.memdesc<128x64xf16, ..>`; a scalar load has `!tt.ptr<i32>` alone.
    """
    shaped = re.findall(r"<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)", line)
    if shaped:
        dims, kind = shaped[-1]
    else:
        found = re.findall(r"!tt\.ptr<(\w+)", line)
        dims, kind = "", found[-1] if found else "i32"
    bits = _BITS.match(kind) or re.match(r"f(8)", kind)
    size = (int(bits.group(1)) + 7) // 8 if bits else 4
    return dims + kind, prod(int(n) for n in dims.split("x") if n) * size
