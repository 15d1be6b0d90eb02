"""Exact top-k beside faiss, PyTorch and usearch: ratios of interleaved runs, and recall against float64."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import format_table, interleave, write_result
from ftfast.search import ExactIndex, topk
from ftfast.search.arrays import check_problem
from ftfast.search.native import describe, extension, topk_native

COLUMNS = [
    "data",
    "gallery",
    "queries",
    "k",
    "method",
    "median_ms",
    "cpu_ms",
    "times_faiss",
    "times_faiss_tuned",
    "recall",
]


@dataclass(frozen=True)
class Case:
    """One gallery and the query counts it is searched with."""

    data: str
    rows: int
    width: int
    queries: tuple[int, ...]
    k: int = 10


CASES = (
    Case("random", 200_000, 512, (1, 32, 249, 1000)),
    Case("random", 100_000, 768, (4096,)),
    Case("real", 20_000, 0, (1, 32, 1000)),
    Case("clustered", 200_000, 512, (1, 32, 1000)),
    Case("random", 200_000, 512, (1000,), k=1000),
)
SCORES = 50_000_000  # scores that plain PyTorch holds at once: 200 MB
SMOKE = (Case("random", 3000, 64, (1, 33)), Case("clustered", 3000, 64, (33,)))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one, float32."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_data(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gallery and queries of a case.

    Args:
        case: "random": uniform on the sphere; "clustered": 500 clusters off-centre, as CLIP embeddings are; "real":
            image embeddings of the built-in set by the built-in model, repeated with a little noise up to the size.
        seed: Of the generator.

    Returns:
        (N, D) and (Q, D) float32 of unit rows.
    """
    rng = np.random.default_rng(seed)
    count = max(case.queries)
    if case.data == "real":
        base = real_embeddings()
        noise = 0.05 / np.sqrt(base.shape[1])
        chosen = np.concatenate([np.arange(len(base)), rng.integers(len(base), size=max(0, case.rows - len(base)))])
        gallery = base[chosen[: case.rows]].copy()
        gallery[len(base) :] += noise * rng.standard_normal(gallery[len(base) :].shape, dtype=np.float32)
        queries = base[rng.integers(len(base), size=count)]
        return unit(gallery), unit(queries + noise * rng.standard_normal(queries.shape, dtype=np.float32))
    gallery = rng.standard_normal((case.rows, case.width), dtype=np.float32)
    queries = rng.standard_normal((count, case.width), dtype=np.float32)
    if case.data == "clustered":
        mean = rng.standard_normal(case.width, dtype=np.float32)
        centres = rng.standard_normal((500, case.width), dtype=np.float32)
        gallery = mean + 0.7 * centres[rng.integers(500, size=case.rows)] + 0.5 * gallery
        queries = mean + 0.7 * centres[rng.integers(500, size=count)] + 0.5 * queries
    return unit(gallery), unit(queries)


def real_embeddings() -> np.ndarray:
    """Image embeddings of the built-in set by the built-in model."""
    from ftfast.config.schema import DataConfig, ModelConfig
    from ftfast.data import open_dataset
    from ftfast.evaluation.embedding import embed_images
    from ftfast.models import load_model

    loaded = load_model(ModelConfig(), "cpu")
    dataset = open_dataset(DataConfig(path="builtin:all"))
    return embed_images(loaded.model, dataset, loaded.eval_transform).features.numpy()


@contextlib.contextmanager
def blas_threshold(faiss: Any, value: int) -> Iterator[None]:
    """Faiss switches from scalar loops to BLAS at this many queries; 20 is its default."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = value
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def methods(gallery: np.ndarray, queries: np.ndarray, k: int, usearch: bool) -> dict[str, Callable[[], Any]]:
    """Name to callable for everything that is installed; each returns ids (Q, k)."""
    table: dict[str, Callable[[], Any]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, q = torch.from_numpy(gallery).to(device), torch.from_numpy(queries).to(device)
    if device == "cuda":
        table["ftfast topk"] = lambda: topk(q, x, k, metric="ip")[1]
        add_gpu_peers(table, x, q, k)
    elif extension() is not None:
        index = ExactIndex(gallery.shape[1])
        index.add(gallery)
        table["ftfast index"] = lambda: index.search(queries, k)[1]
        table["ftfast topk, no index"] = lambda: topk(queries, gallery, k, metric="ip")[1]
        problem = check_problem(queries, gallery, k, "ip")
        table["ftfast topk, fp32 only"] = lambda: topk_native(problem, mode="fp32")[1].numpy()
    add_faiss(table, gallery, queries, k)
    step = max(1, SCORES // len(gallery))

    def plain_torch() -> Any:
        """Search with a matrix product and topk, in parts of the queries."""
        return torch.cat([torch.topk(part @ x.T, k).indices for part in q.split(step)])

    table["torch mm + topk"] = plain_torch
    if usearch:
        from usearch.index import MetricKind, search

        table["usearch exact"] = lambda: search(gallery, queries, k, MetricKind.IP, exact=True).keys
    return table


def add_faiss(table: dict[str, Callable[[], Any]], gallery: np.ndarray, queries: np.ndarray, k: int) -> None:
    """IndexFlatIP at faiss's defaults and with its BLAS threshold lowered to one query."""
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)

    def tuned() -> Any:
        """Search with faiss's BLAS threshold at one query."""
        with blas_threshold(faiss, 1):
            return index.search(queries, k)[1]

    table["faiss IndexFlatIP"] = lambda: index.search(queries, k)[1]
    table["faiss IndexFlatIP, tuned"] = tuned


def add_gpu_peers(table: dict[str, Callable[[], Any]], x: torch.Tensor, q: torch.Tensor, k: int) -> None:
    """faiss-gpu and cuVS brute force, where they are installed; both read the tensors in place."""
    with contextlib.suppress(ImportError, AttributeError):
        import faiss
        import faiss.contrib.torch_utils

        index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), x.shape[1])
        index.add(x)
        table["faiss GpuIndexFlatIP"] = lambda: index.search(q, k)[1]
    with contextlib.suppress(ImportError):
        import cupy
        from cuvs.neighbors import brute_force

        built = brute_force.build(cupy.from_dlpack(x), metric="inner_product")
        table["cuVS brute force"] = lambda: torch.as_tensor(brute_force.search(built, cupy.from_dlpack(q), k)[1])


def recall(found: Any, gallery: np.ndarray, queries: np.ndarray) -> float:
    """Share of queries (of the first 64) whose ids are right wherever float64 scores differ by float32 rounding."""
    found = (found.cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)).astype(np.int64)
    found = found.reshape(len(queries), -1)[:64]
    scores = queries[:64].astype(np.float64) @ gallery.astype(np.float64).T
    best = -np.sort(np.partition(-scores, found.shape[1] - 1, axis=1)[:, : found.shape[1]], axis=1)
    limit = gallery.shape[1] * 2.0**-24
    got = np.take_along_axis(scores, found, axis=1)
    return float((np.abs(got - best) <= limit).all(axis=1).mean())


def measure(case: Case, repeats: int, seconds: float, clock: str) -> list[dict[str, Any]]:
    """All rows of one case; ratios are of wall-clock or of processor time, as `clock` says."""
    gallery, queries = make_data(case)
    rows = []
    for count in case.queries:
        part = np.ascontiguousarray(queries[:count])
        table = methods(gallery, part, case.k, usearch=count * len(gallery) <= 8_000_000)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        timings = interleave(table, repeats=repeats, device=device, seconds=seconds)
        used = {name: t.cpu_ms if clock == "cpu" else t.median_ms for name, t in timings.items()}
        plain, tuned = used.get("faiss IndexFlatIP"), used.get("faiss IndexFlatIP, tuned")
        for name, timing in timings.items():
            row = {
                "data": case.data,
                "gallery": f"{gallery.shape[0]} x {gallery.shape[1]}",
                "queries": count,
                "k": case.k,
                "method": name,
                **timing.as_dict(),
                "times_faiss": round(plain / used[name], 2) if plain else None,
                "times_faiss_tuned": round(tuned / used[name], 2) if tuned else None,
                "recall": recall(table[name](), gallery, part),
            }
            rows.append(row)
        print(format_table(rows[-len(timings) :], COLUMNS), flush=True)
    return rows


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and writes ``results/topk_<device>.json``.

    Args:
        argv: Command-line options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks topk", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="rounds per case")
    parser.add_argument("--seconds", type=float, default=40.0, help="stop a case after this long")
    parser.add_argument("--only", default="", help="random, clustered or real")
    parser.add_argument("--threads", type=int, default=0, help="threads of every method; 0: torch's default")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu needs --threads 1")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args(argv)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu compares processor time, which is fair with --threads 1 only")
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"search path: {describe()}")
    rows = []
    for case in SMOKE if options.smoke else CASES:
        if options.only in ("", case.data):
            rows += measure(case, options.repeats, options.seconds, options.clock)
            if not options.smoke and not options.only:  # after every case: a long run that is cut short leaves its part
                payload = {"search_path": describe(), "clock": options.clock, "rows": rows}
                print(f"written: {write_result('topk', payload, 'cuda' if torch.cuda.is_available() else 'cpu')}")
    return 0
