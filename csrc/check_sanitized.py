"""Builds the search extension with AddressSanitizer and UBSan and runs pytest on it.

``python csrc/check_sanitized.py [ARGUMENTS]``: arguments go to pytest; without any, all search tests that use the
extension in this process run. Leak detection is off: the interpreter itself keeps memory until it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("module", "search", "queries", "shadow", "portable", "avx2", "avx512")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fopenmp", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
RUN = """
import importlib.util, sys
import ftfast
spec = importlib.util.spec_from_file_location("ftfast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["ftfast._C"] = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def build(folder: Path, compiler: str) -> Path:
    """Compiles the extension into `folder`."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT / 'csrc'}"]

    def compile_one(name: str) -> Path:
        target = folder / f"{name}.o"
        source = ROOT / "csrc" / f"{name}.cpp"
        subprocess.run([compiler, *FLAGS, *SANITIZE, *includes, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, SOURCES)]
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", "-fopenmp", *SANITIZE, *objects, "-o", str(library)], check=True)
    return library


def main(arguments: list[str]) -> int:
    """Builds, runs, and returns pytest's exit code."""
    compiler = os.environ.get("CXX", "g++")
    names = ("test_topk_contract.py", "test_exact_index.py", "test_topk_properties.py")
    tests = arguments or [str(ROOT / "tests" / "search" / name) for name in names]
    with tempfile.TemporaryDirectory() as temporary:
        library = build(Path(temporary), compiler)
        queries = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
        found = [subprocess.run(q, capture_output=True, text=True, check=True).stdout.strip() for q in queries]
        environment = os.environ | {
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        command = [sys.executable, "-c", RUN, str(library), "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
