"""export-hf-kernel: what is written, that it is valid, and that a bare Python can use it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.installs import bare_python

from llama4_triton.engines.hf_export import LAYERS, export_hf_kernel
from llama4_triton.model.config import tiny_maverick
from llama4_triton.model.tiny import save_tiny_checkpoint

pytestmark = pytest.mark.no_kernels

ROOT = Path(__file__).resolve().parents[2]
NEEDS_KERNELS = "Hugging Face's kernels is a dev dependency"


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_equal_exports_are_equal_bytes_and_others_have_another_id(tmp_path):
    ids = [export_hf_kernel(tmp_path / name) for name in ("a", "b")]
    ids.append(export_hf_kernel(tmp_path / "c", version=2))
    ids.append(export_hf_kernel(tmp_path / "d", name="other"))
    assert ids[0] == ids[1] and len(set(ids)) == 3
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_the_sources_are_exported_as_they_are(tmp_path):
    export_hf_kernel(tmp_path / "out")
    exported = _files(tmp_path / "out" / "build" / "torch-cuda" / "kernels")
    assert exported == {path.name: path.read_bytes() for path in (ROOT / "kernels").glob("*.py")}


@pytest.mark.parametrize("variant", ["torch-cuda", "torch-cpu"])
def test_metadata_is_what_kernels_reads(tmp_path, variant):
    rust = pytest.importorskip("kernels._rust", reason=NEEDS_KERNELS)
    id = export_hf_kernel(tmp_path / "out", name="llama4-odd", version=3)
    folder = tmp_path / "out" / "build" / variant
    metadata = rust.Metadata.read_from_file(folder / "metadata.json")
    assert (metadata.id, metadata.name.python_name, metadata.version) == (id, "llama4_odd", 3)
    assert str(metadata.backend.backend_type).lower() == variant.removeprefix("torch-")
    # The digest that kernels makes of a build; it leaves metadata.json out.
    digest = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder)
    written = json.loads((folder / "metadata.json").read_text())["digest"]
    assert written == {"algorithm": "sha256", "files": digest.files}


@pytest.mark.parametrize("machine", ["cuda", "cpu"])
def test_every_machine_is_offered_its_variant(tmp_path, machine):
    variants = pytest.importorskip("kernels.variants", reason=NEEDS_KERNELS)
    from kernels.backends import CPU, CUDA
    from packaging.version import Version

    export_hf_kernel(tmp_path / "out")
    found = variants.get_variants_local(tmp_path / "out" / "build")
    chosen, _ = variants._resolve_variant_for_system(
        variants=found,
        selected_backend=CUDA(version=Version("13.0")) if machine == "cuda" else CPU(),
        cpu="x86_64",
        os="linux",
        torch_version=Version("2.13"),
        torch_cxx11_abi=True,
        tvm_ffi_version=None,
    )
    assert [variant.variant_str for variant in chosen] == [f"torch-{machine}"]


def test_a_bare_python_uses_two_exports_and_the_installed_package(tmp_path):
    for package in ("kernels", "transformers"):
        pytest.importorskip(package, reason="a dev dependency")
    outs = [tmp_path / name for name in ("first", "twin", "next")]
    ids = [export_hf_kernel(out, version=1 + (out.name == "next")) for out in outs]
    config = tiny_maverick(vocab_size=97, hidden_size=48, attention_chunk_size=5)
    save_tiny_checkpoint(tmp_path / "checkpoint", config)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "llama4_triton").symlink_to(ROOT)

    script = shutil.copy(ROOT / "tests" / "support" / "use_exported.py", tmp_path)
    python = bare_python(tmp_path)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LLAMA4_TRITON"))}
    result = subprocess.run(
        [python, script, *outs, tmp_path / "checkpoint", tmp_path / "packages"],
        cwd=tmp_path, env={**clean, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [*ids, "llama4_triton"]


def test_the_cpu_variant_says_what_it_needs(tmp_path):
    export_hf_kernel(tmp_path / "out")
    (tmp_path / "out" / "build" / "torch-cuda").rename(tmp_path / "elsewhere")
    alone = tmp_path / "out" / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location("alone", alone)
    with pytest.raises(ImportError, match="torch-cuda must lie beside build/torch-cpu"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_card_names_layers_and_operators(tmp_path):
    id = export_hf_kernel(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for name in (*LAYERS, "attention_decode", "rms_norm", f"torch.ops.{id}", "apache-2.0"):
        assert name in card


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(name="Llama_4"), "name must be lower case, as llama4-triton, got 'Llama_4'"),
        (dict(version=-1), "version must be >= 0, got -1"),
        (dict(), "out must be an empty folder or a new one, got "),
    ],
    ids=["name", "version", "not-empty"],
)
def test_what_is_refused_writes_nothing(tmp_path, arguments, message):
    if not arguments:
        (tmp_path / "mine").write_text("kept")
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=f"export-hf-kernel: {message}"):
        export_hf_kernel(tmp_path, **arguments)
    assert _files(tmp_path) == before
