"""The wheel: built without a compiler, installed beside the dependencies, used from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("ftfast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.fatbin")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=skip)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", "out", "--quiet", "--no-index"]
    # The compiler is taken away: faster, and the package must come out whole without one.
    run(*build, "--no-build-isolation", cwd=source, CC="false", CXX="false", FTFAST_CUDA="0")
    (built,) = (source / "out").glob("ftfast-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that sees our dependencies, but our own package only from the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # Folders named in a .pth file are searched last, and .pth files inside them (editable installs) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_wheel_content(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in (("ftfast", "ftfast"), ("kernels", "ftfast/kernels"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected - names == set()
    assert {"ftfast/py.typed", "ftfast/kernels/__init__.py", "ftfast/recipes/presets/infusing.yaml"} <= names
    weights = {f"ftfast/{p.relative_to(ROOT / 'ftfast')}" for p in (ROOT / "ftfast/models").rglob("*.safetensors")}
    presets = {f"ftfast/{p.relative_to(ROOT / 'ftfast')}" for p in (ROOT / "ftfast/recipes").rglob("*.yaml")}
    assert weights | presets <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ftfast"}


def test_rooms_from_another_folder(python, tmp_path):
    (tmp_path / "kernels").mkdir()  # a folder of that name must not be taken for ours
    code = """
import json, sys, numpy, torch, ftfast, ftfast.kernels, ftfast.losses, ftfast.weightspace
x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
ftfast.kernels.clip_loss(x, x.detach().flip(1), torch.tensor(10.0)).backward()
heavy = [module for module in ("open_clip", "deepspeed", "transformers") if module in sys.modules]
from ftfast.search import topk
nearest = numpy.asarray(topk(numpy.eye(3, dtype="float32"), numpy.eye(3, dtype="float32"), 1)[1])
files = [ftfast.__file__, ftfast.kernels.__file__]
print(json.dumps([files, bool(x.grad.abs().sum() > 0), heavy, nearest.ravel().tolist()]))
"""
    (package, kernels), has_gradient, heavy, nearest = json.loads(run(python, "-c", code, cwd=tmp_path))
    assert python.parents[1] in Path(package).parents
    assert Path(kernels) == Path(package).parent / "kernels" / "__init__.py"
    assert has_gradient
    assert heavy == []
    assert nearest == [0, 1, 2]  # without the compiled extension


def test_the_command_is_installed(python, tmp_path):
    command = python.parent / "ftfast"
    assert run(command, "--version", cwd=tmp_path).strip().endswith("0.1.0")
    assert "usage" in run(command, "-h", cwd=tmp_path).lower()


def test_the_launched_script_finds_the_installed_package(python, tmp_path):
    (script,) = python.parents[1].glob("lib/python*/site-packages/ftfast/train.py")
    assert "recipe: infusing" in run(python, script, "--recipe", "infusing", "--print-config", cwd=tmp_path)
