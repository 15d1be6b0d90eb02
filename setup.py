"""Build script: maps the folder ``kernels/`` to ``ftfast.kernels`` and compiles ``csrc/`` when a compiler is present.

Metadata lives in pyproject.toml. The C++ extension is optional at run time: without it ftfast searches with PyTorch
and says so in ``ftfast doctor``. CUDA sources are compiled when nvcc is found; without it they are compiled at first
use by NVRTC. Environment: ``CC``/``CXX`` choose the compiler, ``FTFAST_CUDA=0`` leaves CUDA out and ``FTFAST_CUDA=1``
makes a missing nvcc an error, ``FTFAST_SANITIZE=1`` builds with AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ["module.cpp", "search.cpp", "queries.cpp", "shadow.cpp", "portable.cpp", "avx2.cpp", "avx512.cpp"]
HEADERS = ["topk.h", "kernels.h", "queries.h", "common_impl.h", "avx512_tile.h"]
ARCHITECTURES = ("80", "90", "100")


def find_nvcc() -> str | None:
    """Path of nvcc, from CUDA_HOME, the search path or the usual folder; None when absent or unwanted."""
    if os.environ.get("FTFAST_CUDA") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    candidates.append(shutil.which("nvcc") or "")
    return next((path for path in candidates if path and Path(path).is_file()), None)


class BuildExtension(build_ext):
    """Compiles with OpenMP where the compiler has it, and turns a failure into a message instead of an error."""

    def build_extensions(self) -> None:
        """Sets the flags the compiler accepts and builds all extensions."""
        compile_flags = ["-std=c++17", "-O3", "-g0", "-fno-strict-aliasing", "-ffp-contract=off"]
        compile_flags += ["-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]
        link_flags: list[str] = []
        if os.environ.get("FTFAST_SANITIZE") == "1":
            flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
            compile_flags += ["-O1", *flags]
            link_flags += flags
        if self._accepts("-fopenmp"):
            compile_flags.append("-fopenmp")
            link_flags.append("-fopenmp")
        for extension in self.extensions:
            extension.extra_compile_args = [*compile_flags, *extension.extra_compile_args]
            extension.extra_link_args = link_flags
        super().build_extensions()

    def run(self) -> None:
        """Builds, and explains what a missing compiler means."""
        try:
            super().run()
        except Exception as error:  # the compiler may be missing or broken in many ways; ftfast works without it
            if os.environ.get("FTFAST_SANITIZE") == "1":
                raise
            print(f"ftfast: the C++ extension was not built ({error}); search will use PyTorch.", file=sys.stderr)
        self._build_cuda()

    def _accepts(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=[flag])
            except Exception:
                return False
        return True

    def _build_cuda(self) -> None:
        """Compiles csrc/cuda/topk.cu to one fat binary beside the package, when nvcc is there."""
        source = ROOT / "csrc" / "cuda" / "topk.cu"
        base = ROOT if self.inplace else Path(self.build_lib)
        target = base / "ftfast" / "search" / "topk.fatbin"
        if not self.inplace and target.parent.is_dir():
            shutil.copyfile(source, target.with_suffix(".cu"))  # NVRTC compiles it where there is no fat binary
        nvcc = find_nvcc()
        if nvcc is None:
            if os.environ.get("FTFAST_CUDA") == "1":
                raise SystemExit("FTFAST_CUDA=1 was set, but nvcc was not found in CUDA_HOME or PATH.")
            return
        if not target.parent.is_dir():
            return
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        command = [nvcc, "-O3", "-std=c++17", "--fatbin", *codes, str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            if os.environ.get("FTFAST_CUDA") == "1":
                raise SystemExit(f"nvcc failed:\n{result.stderr}")
            print(f"ftfast: nvcc failed, CUDA search will compile at first use:\n{result.stderr}", file=sys.stderr)


def extensions() -> list[Extension]:
    """The C++ module, if pybind11 is importable (it is in build isolation)."""
    try:
        import pybind11
    except ImportError:
        print("ftfast: pybind11 is not installed; the C++ extension is not built.", file=sys.stderr)
        return []
    return [
        Extension(
            "ftfast._C",
            sources=[f"csrc/{name}" for name in SOURCES],
            include_dirs=[pybind11.get_include(), "csrc"],
            depends=[f"csrc/{name}" for name in HEADERS],
            language="c++",
            optional=os.environ.get("FTFAST_SANITIZE") != "1",
        ),
        Extension(  # passes over weights; sums are ordered by hand there, so fused multiply-add is welcome
            "ftfast._W",
            sources=["csrc/weights/weights.cpp"],
            include_dirs=[pybind11.get_include(), "csrc/weights"],
            depends=["csrc/weights/loops.inc"],
            extra_compile_args=["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"],
            language="c++",
            optional=os.environ.get("FTFAST_SANITIZE") != "1",
        ),
    ]


setup(
    # Folders of presets and weights count as packages, too: their files are installed.
    packages=[*find_namespace_packages(include=["ftfast", "ftfast.*"], exclude=["*__pycache__*"]), "ftfast.kernels"],
    package_dir={"ftfast": "ftfast", "ftfast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
