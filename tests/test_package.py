"""The package: directions of imports, contents of the wheel, installs, and foreign `kernels`."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_kernels

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "autotune", "bench", "engines")

# kernels <- model <- engines; kernels <- autotune <- bench. The command line sees everything.
MAY_IMPORT = {
    "kernels": set(),
    "model": {"kernels"},
    "autotune": {"kernels"},
    "bench": {"kernels", "model", "autotune"},
    "engines": {"kernels", "model"},
}
THIRD_PARTY_OF_KERNELS = {"torch", "triton", "numpy"}


def _imports(path):
    """(level, module) of every import statement in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def _sources(folder):
    files = sorted((ROOT / folder).glob("*.py"))
    assert files, folder
    return files


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_in_one_direction(folder):
    for path in _sources(folder):
        for level, module in _imports(path):
            parts = module.split(".")
            where = f"{path.relative_to(ROOT)} imports {'.' * level}{module}"
            assert level <= 1, f"{where}: relative imports stay inside a folder"
            if level == 0 and parts[0] == "llama4_triton" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[folder], where
            assert level or parts[0] not in FOLDERS, f"{where}: not importable when installed"


def test_kernels_import_only_torch_triton_and_their_neighbours():
    allowed = set(sys.stdlib_module_names) | THIRD_PARTY_OF_KERNELS
    for path in _sources("kernels"):
        for level, module in _imports(path):
            name = module.split(".")[0]
            assert level == 1 or name in allowed, f"{path.name} imports {module}"
            if path.name != "interpreter.py":
                assert name != "numpy" and module != "interpreter", f"{path.name}: {module}"


@pytest.mark.parametrize("path", ["kernels/reference.py", "model/reference.py"])
def test_references_never_import_triton(path):
    names = {module for _, module in _imports(ROOT / path)}
    assert not any(name.split(".")[0] == "triton" for name in names)
    assert not any(name.startswith("llama4_triton.kernels") for name in names)


def test_kernels_folder_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools would leave build/ and an egg-info in the checkout.
    source = tmp_path_factory.mktemp("source") / "checkout"
    unrelated = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unrelated)
    _pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), str(source))
    return next(out.glob("*.whl"))


def _pip(*args):
    subprocess.run([sys.executable, "-m", "pip", *args], check=True, cwd="/", capture_output=True)


def test_wheel_holds_the_sources_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    expected = {f"llama4_triton/{folder}/{p.name}" for folder in FOLDERS for p in _sources(folder)}
    at_root = {path.name for path in ROOT.glob("*.py")} - {"setup.py"} | {"py.typed"}
    expected |= {f"llama4_triton/{name}" for name in at_root}
    assert code == expected
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def _bare_python(tmp_path):
    """A new environment that sees this one's packages, but none of its editable installs."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    parents = [p for p in sys.path if p.endswith("site-packages")]
    (site / "parent.pth").write_text("\n".join(parents))
    return python


PROBE = (
    "import llama4_triton, llama4_triton.kernels.rms_norm as m, llama4_triton.model.config;"
    "print(llama4_triton.__file__)"
)


def _probe(python, cwd, code=PROBE):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [str(python), "-c", code], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_works_from_any_folder(kind, wheel, tmp_path):
    python = _bare_python(tmp_path)
    what = [str(wheel)] if kind == "wheel" else ["--no-build-isolation", "-e", str(ROOT)]
    _pip("--python", str(python), "install", "--quiet", "--no-deps", *what)
    expected = tmp_path if kind == "wheel" else ROOT
    for cwd in ("/", ROOT, tmp_path):
        assert Path(_probe(python, cwd)).is_relative_to(expected)


# transformers imports `kernels` only if the installed version passes its gate; the second form
# tells it a version that does.
FOREIGN = """
import importlib.metadata as metadata, sys
sys.path.insert(0, "")  # the current folder first, as for `python -m` and a prompt
{patch}
import kernels
import transformers.integrations.hub_kernels as hub
assert "site-packages" in kernels.__file__, kernels.__file__
if {gated}:
    assert hub.is_kernels_available(), "the gate did not open"
    assert hub.get_kernel_hub is kernels.get_kernel
import llama4_triton.kernels.rms_norm as ours
assert ours.rms_norm.__module__ == "llama4_triton.kernels.rms_norm"
print("ok")
"""


@pytest.mark.parametrize("gated", [False, True], ids=["as-installed", "gate-open"])
def test_foreign_kernels_package_wins_its_own_name(gated):
    pytest.importorskip("transformers")
    pytest.importorskip("kernels.layer", reason="Hugging Face's kernels is a dev dependency")
    patch = (
        "import transformers.utils.import_utils as utils\n"
        "real = utils._is_package_available\n"
        "utils._is_package_available = lambda name, return_version=False, **kw: (\n"
        "    (True, utils.KERNELS_MIN_VERSION) if name == 'kernels' and return_version\n"
        "    else real(name, return_version=return_version, **kw))\n"
        if gated
        else ""
    )
    assert _probe(sys.executable, ROOT, FOREIGN.format(patch=patch, gated=gated)) == "ok"


def test_every_module_imports_without_a_gpu():
    code = (
        "import importlib, pathlib, llama4_triton, torch\n"
        "root = pathlib.Path(llama4_triton.__file__).parent\n"
        f"for folder in {FOLDERS!r}:\n"
        "    for path in (root / folder).glob('*.py'):\n"
        "        importlib.import_module(f'llama4_triton.{folder}.{path.stem}')\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    _probe(sys.executable, "/", code)


def test_importing_the_package_loads_neither_torch_nor_triton():
    code = "import sys, llama4_triton; print({'torch', 'triton'} & set(sys.modules))"
    assert _probe(sys.executable, "/", code) == "set()"


def test_public_names_resolve_and_have_docstrings():
    import llama4_triton

    for name in llama4_triton.__all__:
        value = getattr(llama4_triton, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        llama4_triton.nothing  # noqa: B018
