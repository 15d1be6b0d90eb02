"""The CUDA path without a GPU: it compiles for every architecture, and emulated on the CPU its kernels are right."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_topk_contract import METRICS

from ftfast.search import cuda
from ftfast.search.arrays import Problem
from ftfast.search.reference import topk_reference

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "topk.cu"
NVCC = shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if Path(p).is_file()), None)


def find_nvrtc():
    """libnvrtc of the nvidia wheels (torch's CUDA builds bring it), or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).rglob("libnvrtc.so*"))
    return str(found[0]) if found else None


NVRTC = find_nvrtc()


@pytest.mark.skipif(NVCC is None and NVRTC is None, reason="neither nvcc nor libnvrtc is here to compile")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles(architecture, tmp_path):
    if NVCC is not None:
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [NVCC, "-std=c++17", "-O3", "--fatbin", code, "-Xptxas", "-v", str(SOURCE), "-o", str(tmp_path / "k")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "k").stat().st_size > 1000
        spills = [line for line in result.stderr.splitlines() if "spill" in line]
        assert len(spills) == 3
        assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    if NVRTC is not None:
        cubin = compile_with_nvrtc(SOURCE.read_text(), architecture)
        for name in ("ftfast_collect", "ftfast_rescore", "ftfast_reduce"):
            assert name.encode() in cubin


def compile_with_nvrtc(source, architecture):
    library = ctypes.CDLL(NVRTC)
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"topk.cu", 0, None, None) == 0
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17"]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


class Emulation:
    """Launches kernels on the CPU; fewer threads and blocks than a GPU would have, which the kernels must allow."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def launch(self, name, grid, block, arguments):
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        blocks = (min(grid[0], 2), grid[1]) if name != "ftfast_reduce" else grid
        threads = 32 if name == "ftfast_rescore" else 4
        assert self.library.emulate(name.encode(), *blocks, threads, pointers) == 0


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    target = tmp_path_factory.mktemp("emulation") / "kernels.so"
    source = Path(__file__).with_name("emulate_cuda.cpp")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    return Emulation(target)


def rough_product(queries, rows):
    """Float32 products with an error as large as tensor cores may make."""
    exact = queries.double() @ rows.double().T
    scale = queries.double().norm(dim=1, keepdim=True) * rows.double().norm(dim=1)
    noise = torch.sin(1e4 * exact) * scale * 2.0**-23
    return (exact + noise).float()


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [(m, torch.float32) for m in METRICS] + [("l2", torch.float16), ("ip", torch.bfloat16), ("cosine", torch.int8)],
)
def test_emulated_kernels_equal_the_reference(emulation, monkeypatch, metric, dtype):
    monkeypatch.setattr(cuda, "_CAPACITY", 64)  # so that small galleries overflow lists and fill several tiles
    monkeypatch.setattr(cuda, "_TILE_ELEMENTS", 500)
    generator = torch.Generator().manual_seed(0)
    queries = (torch.randn(3, 40, generator=generator) * 20).to(dtype)
    gallery = (torch.randn(400, 40, generator=generator) * 20).to(dtype)
    gallery[150:300] = gallery[:150]
    if dtype == torch.float32:
        gallery[7, 3], gallery[9, 0], gallery[11] = float("nan"), float("inf"), 0
        gallery[13] *= 1e-30
        gallery[17] *= 1e25
    masks = [None, torch.arange(400) % 3 != 0, torch.rand(3, 400, generator=generator) < 0.02]
    for k, mask in ((1, masks[1]), (10, masks[2]), (130, None)):
        problem = Problem(queries, gallery, k, metric, torch.tensor([0, -1, 399]), mask)
        scores, indices = cuda.topk_cuda(problem, launcher=emulation, product=rough_product)
        expected_scores, expected = topk_reference(problem)
        assert torch.equal(indices, expected)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-12, atol=1e-9, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_on_a_gpu(metric):
    queries, gallery = torch.randn(300, 512, device="cuda"), torch.randn(50000, 512, device="cuda")
    problem = Problem(queries, gallery, 10, metric)
    scores, indices = cuda.topk_cuda(problem)
    expected_scores, expected = topk_reference(problem)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-12, atol=1e-9)
