"""The extension under sanitizers, and the package where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: no sanitizer build is possible")
def test_sanitizers_find_nothing():
    """The short form; `python csrc/check_sanitized.py` runs all search tests."""
    tests = str(ROOT / "tests" / "search" / "test_topk_contract.py")
    command = [sys.executable, str(ROOT / "csrc" / "check_sanitized.py"), tests, "-k", "nan or equal_rows or exclusion"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout or "[100%]" in result.stdout


def test_builds_without_a_compiler_and_searches_with_torch(tmp_path):
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    keep_out = shutil.ignore_patterns("*.so", "__pycache__", "builtin", "weights", "*.fatbin")
    shutil.copytree(ROOT / "ftfast", tmp_path / "ftfast", ignore=keep_out)
    environment = os.environ | {"CC": "false", "CXX": "false", "FTFAST_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "built")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "built" / "ftfast" / "search" / "topk.py").is_file()
    assert not list((tmp_path / "built").rglob("*.so"))
    code = """
        import sys
        # An editable install would lend the extension of the checkout.
        sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
        import torch
        from ftfast.errors import FtfastError
        from ftfast.search import ExactIndex, describe, topk
        assert describe().startswith("PyTorch (the C++ extension is not built"), describe()
        x = torch.eye(5)
        assert topk(x, x, 1)[1][:, 0].tolist() == [0, 1, 2, 3, 4]
        index = ExactIndex(5)
        index.add(x)
        assert index.search(x, 1)[1][:, 0].tolist() == [0, 1, 2, 3, 4]
        assert index.range_search(x, 0.5)[2].tolist() == [0, 1, 2, 3, 4]
        try:
            topk(x, x, 1, backend="native")
        except FtfastError as error:
            assert "which is not built; install a C++ compiler" in str(error)
            print("fine")
    """
    environment["PYTHONPATH"] = str(tmp_path / "built")
    command = [sys.executable, "-c", textwrap.dedent(code)]
    built = tmp_path / "built"
    result = subprocess.run(command, cwd=built, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "fine", result.stderr
