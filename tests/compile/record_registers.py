"""Write registers.json beside this file: registers per thread of each shipped binary.

    python tests/compile/record_registers.py       # for the Triton that is imported

Entries of other Triton versions stay. The test fails where a count has risen by more than 16.
"""

from __future__ import annotations

import json
from pathlib import Path

import triton

from llama4_triton.autotune.compile import compile_all
from llama4_triton.bench.steps import shipped_launches

FILE = Path(__file__).parent / "registers.json"


def main() -> None:
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    reports = compile_all(shipped_launches()).values()
    recorded[triton.__version__] = {str(r.binary): r.registers for r in reports}
    FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
