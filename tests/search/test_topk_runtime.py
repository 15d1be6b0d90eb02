"""What surrounds the search: the operator, threads, signals, other processes, zero copies and memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ftfast.errors import ShapeError
from ftfast.search import describe, topk
from ftfast.search.arrays import Problem, to_tensor
from ftfast.search.native import extension
from ftfast.search.operator import solve, topk_op

ROOT = Path(__file__).resolve().parents[2]


def features(rows, width=16, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"exclude": torch.arange(7)}, {"mask": torch.arange(50) % 2 == 0}])
def test_opcheck(options):
    arguments = (features(7), features(50, seed=1), 3, "ip")
    torch.library.opcheck(topk_op, arguments, options)


def test_compiles_without_a_graph_break():
    queries, gallery = features(7), features(50, seed=1)

    def search(q, x):
        return topk(q * 2, x, 4, metric="ip")

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(queries, gallery), search(queries, gallery), strict=True):
        assert torch.equal(got, expected)


def test_gradients_stop_here():
    queries = features(3).requires_grad_()
    scores, _ = topk(queries, features(5), 2)
    assert not scores.requires_grad


def test_numpy_and_torch_are_not_copied():
    array = np.zeros((4, 4), "f4")
    assert to_tensor(array, "x").data_ptr() == array.ctypes.data
    array.flags.writeable = False
    assert to_tensor(array, "x").data_ptr() == array.ctypes.data

    class OnlyDlpack:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    tensor = features(5)
    assert to_tensor(OnlyDlpack(tensor), "x").data_ptr() == tensor.data_ptr()
    strided = features(20).T[:, ::2]
    expected = topk(strided.contiguous(), strided.contiguous(), 3)
    assert torch.equal(topk(strided, strided, 3)[1], expected[1])


def test_describe_names_the_path():
    assert "C++ extension" in describe() or "PyTorch" in describe()


def test_the_interpreter_runs_during_a_search():
    queries, gallery = features(1500, 128), features(60000, 128, seed=1)
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    topk(queries, gallery, 10, backend="native")
    stop = time.perf_counter()
    done.set()
    thread.join()
    assert stop - start > 0.02
    assert sum(start < t < stop for t in ticks) >= 3


def test_control_c_stops_a_search():
    code = """
        import os, signal, threading, time, torch
        from ftfast.search import topk
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
        torch.set_num_threads(2)
        q, x = torch.randn(4000, 512), torch.randn(150000, 512)
        topk(q[:1], x[:100], 1)
        threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.perf_counter()
        try:
            while True:
                topk(q, x, 10, metric="ip", backend="native")
        except KeyboardInterrupt:
            print("stopped after", time.perf_counter() - start)
        print(topk(q[:1], x[:100], 1)[1].shape)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("stopped after")[1].split()[0]) < 5.0
    assert "torch.Size([1, 1])" in result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_can_search():
    gallery = features(500)
    expected = topk(gallery, gallery, 3)[1]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if torch.equal(topk(gallery, gallery, 3)[1], expected) else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the search in a forked child did not return")


def test_selection_memory_does_not_grow_with_the_gallery():
    """Peak memory beyond the inputs, measured by the kernel in a fresh process, for galleries of 1x and 8x."""
    code = """
        import resource, sys, torch
        from ftfast.search import topk
        rows = int(sys.argv[1])
        x = torch.zeros(rows, 16).normal_()
        q = torch.zeros(4000, 16).normal_()
        topk(q[:20], x[:5000], 5, metric="ip")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        topk(q, x, 5, metric="ip")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    grown = []
    for rows in (20000, 160000):
        command = [sys.executable, "-c", textwrap.dedent(code), str(rows)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        grown.append(int(result.stdout) / 1024)
    assert max(grown) < 60  # MB; the score matrices would be 320 MB and 2560 MB
    assert grown[1] < grown[0] + 10


SHARDED = """
    import sys, torch, torch.distributed as dist
    from ftfast.errors import ShapeError
    from ftfast.search import topk, topk_sharded
    rank, world, port = int(sys.argv[1]), 3, sys.argv[2]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        gallery = torch.randn(211, 24, generator=g)
        gallery[150:190] = gallery[10:50]  # ties across shards
        gallery, queries = gallery.to(dtype), torch.randn(17, 24, generator=g).to(dtype)
        rows = [(0, 0), (0, 140), (140, 211)][rank]
        own = [(0, 12), (12, 12), (12, 17)][rank]
        for metric in ("cosine", "ip", "l2"):
            for k in (1, 9, 211):
                got = topk_sharded(queries[slice(*own)], gallery[slice(*rows)], k, metric=metric)
                expected = topk(queries, gallery, k, metric=metric)
                assert torch.equal(got[1], expected[1][slice(*own)]), (metric, k)
                assert torch.equal(got[0], expected[0][slice(*own)]), (metric, k)
    try:
        topk_sharded(queries, gallery[slice(*rows)], 212)
    except ShapeError as error:
        assert "k is 212 but the gallery has 211 rows over 3 processes" in str(error)
        print("done")
    dist.destroy_process_group()
"""


def test_shards_over_three_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, str(rank), port], stdout=-1, stderr=-1, env=environment, cwd=ROOT)
        for rank in range(3)
    ]
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err.decode()
            assert b"done" in out
    finally:
        for worker in workers:
            worker.kill()


def test_native_is_for_the_cpu():
    if extension() is None:
        pytest.fail("the extension is not built; run: python setup.py build_ext --inplace")
    problem = Problem(torch.zeros(1, 1, device="meta"), torch.zeros(1, 1, device="meta"), 1, "ip")
    with pytest.raises(ShapeError, match="backend 'native' searches CPU and CUDA arrays, but queries are on meta"):
        solve(problem, "native")
