"""Default configurations on other GPUs: they compile and fit, or the operator refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

from llama4_triton.autotune.compile import CompileFailed
from llama4_triton.autotune.gates import KERNELS, requirements, violations
from llama4_triton.autotune.launches import DEVICES
from llama4_triton.bench import architectures
from llama4_triton.bench.variants import launches_of, variants
from llama4_triton.kernels._check import UnsupportedArchitectureError

pytestmark = pytest.mark.compiled_only

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
BY_ID = {variant.id: variant for variant in variants()}


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
@pytest.mark.parametrize("id", ["moe-bfloat16-many", "attention_prefill-bfloat16-many"])
def test_default_configurations_fit(compile_lane, id, arch):
    """The two operators that need most shared memory, on the two older GPUs most in use."""
    launches = [x for x in launches_of(BY_ID[id], arch) if KERNELS[x.name].rows]
    reports = compile_lane(launches, arch)
    for launch in launches:
        report = reports[launch.binary()]
        assert not isinstance(report, CompileFailed), str(report)
        assert not violations(report, requirements(launch, arch)), str(report)
        assert report.facts.sass["mma.sync"] and not report.facts.sass["wgmma"]


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86"])
@pytest.mark.parametrize("op", ["fp8_matmul", "quantize_rowwise"])
def test_fp8_says_which_gpus_it_needs(op, arch):
    with pytest.raises(UnsupportedArchitectureError, match=f"sm_89 or newer .* got {arch}"):
        launches_of(BY_ID[f"{op}-bfloat16-many"], arch)


def test_the_table_has_every_operator_and_architecture():
    lines = TABLE.read_text().splitlines()
    header = next(line for line in lines if line.startswith("| operator"))
    assert header.split(" | ")[2:] == [*list(DEVICES)[:-1], f"{list(DEVICES)[-1]} |"]
    rows = {
        tuple(line.strip("| ").split(" | ")[:2]) for line in lines if "/" in line and "|" in line
    }
    expected = {(v.op, str(v.dtype).removeprefix("torch.")) for v in variants() if not v.ragged}
    assert rows == expected


def test_a_fault_is_shown_in_its_cell():
    launch = launches_of(BY_ID["rms_norm-bfloat16-few"])[0]
    failed = {launch.binary(): CompileFailed("no")}
    text = architectures.cell([launch], failed, "sm_80")
    assert text == "FAULT does not compile: _rms_norm_kernel"
    assert max([text, "refused", "mma, 255/96/1", ""], key=architectures._weight) == text


@pytest.mark.long
@pytest.mark.parametrize("arch", list(DEVICES))
def test_the_committed_table_is_what_compiles(arch):
    """Column by column; a Triton of another version gives another table."""
    if triton.__version__ not in TABLE.read_text():
        pytest.skip(f"the table was made with another Triton than {triton.__version__}")
    column = list(DEVICES).index(arch) + 2
    made = _column(architectures.table([arch], jobs=2), 2)
    assert made == _column(TABLE.read_text(), column)
    assert not any("FAULT" in text for text in made.values())


def _column(text, index):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [line.strip("|").split("|") for line in lines[1:]]
    return {tuple(cell.strip() for cell in row[:2]): row[index].strip() for row in rows}


def test_dtypes_are_those_of_the_operators():
    assert {v.dtype for v in BY_ID.values()} == {torch.bfloat16, torch.float16, torch.float32}
