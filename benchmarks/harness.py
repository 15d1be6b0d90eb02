"""What every benchmark shares: turn-taking timers, peak memory, the environment record and the JSON writer."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MEASURED = ("../kernels", "../csrc", "../ftfast/losses", "../ftfast/weightspace", "../ftfast/search", "*.py")
"""What the benchmarks run, seen from their folder."""
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "open_clip_torch",
    "faiss-cpu",
    "inf-cl",
    "memeff",
    "siglip-kernel",
    "liger-kernel",
    "cut-cross-entropy",
)


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one callable over its repeats, in milliseconds.

    ``best_ms`` is the minimum, which a busy machine disturbs least; the percentiles show how much it was disturbed.
    ``cpu_ms`` is the median of the processor time of all threads: other processes' load hardly moves it.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    best_ms: float
    cpu_ms: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields, rounded to a microsecond."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


Elapsed = tuple[float, float]
"""Seconds of wall-clock and of processor time."""


def summarize(elapsed: Sequence[Elapsed]) -> Timing:
    """Turn raw times into a :class:`Timing`.

    Args:
        elapsed: Wall-clock and processor time of every repeat, in seconds.

    Returns:
        Median, 20th and 80th percentile and minimum in milliseconds.

    Raises:
        ValueError: If ``elapsed`` is empty.
    """
    if not elapsed:
        raise ValueError("No times were taken: repeats must be at least 1.")
    ordered = sorted(1e3 * wall for wall, _ in elapsed)
    last = len(ordered) - 1
    return Timing(
        median_ms=statistics.median(ordered),
        p20_ms=ordered[round(0.2 * last)],
        p80_ms=ordered[round(0.8 * last)],
        best_ms=ordered[0],
        cpu_ms=1e3 * statistics.median(processor for _, processor in elapsed),
        repeats=len(ordered),
    )


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished what was asked of it (does nothing on the CPU)."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Time several callables by turns, so that a disturbance of the machine meets all of them alike.

    Round r calls every function once, starting with the r-th one. Compare the results as ratios.

    Args:
        functions: Name to callable.
        repeats: Rounds that count.
        warmup: Rounds before them that do not (compilation, caches, page faults).
        device: Where the work runs; CUDA is synchronised around each call.
        seconds: Stop after the round in which this much time has passed, if fewer rounds are done by then.

    Returns:
        Name to :class:`Timing`.
    """
    stages = {name: [lambda _, function=function: function()] for name, function in functions.items()}
    timed = interleave_stages(stages, repeats=repeats, warmup=warmup, device=device, seconds=seconds)
    return {name: timings[-1] for name, timings in timed.items()}


def interleave_stages(
    functions: Mapping[str, Sequence[Callable[[Any], object]]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
) -> dict[str, list[Timing]]:
    """Time callables by turns like :func:`interleave`, each in stages, such as forward and backward.

    Args:
        functions: Name to stages; each stage is called with the result of the one before it (the first with None).
        repeats: Rounds that count.
        warmup: Rounds before them that do not.
        device: Where the work runs; CUDA is synchronised around each stage.
        seconds: Stop after the round in which this much time has passed, if fewer rounds are done by then.

    Returns:
        Name to one :class:`Timing` per stage and, last, that of all stages together.
    """
    names = list(functions)
    times: dict[str, list[list[Elapsed]]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            time_stages(functions[name], device)
    gc.collect()
    start = time.perf_counter()
    for round_number in range(max(1, repeats)):
        shift = round_number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            times[name].append(time_stages(functions[name], device))
        if seconds is not None and time.perf_counter() - start > seconds:
            break
    return {
        name: [*(summarize(stage) for stage in zip(*rounds, strict=True)), summarize(list(map(_total, rounds)))]
        for name, rounds in times.items()
    }


def _total(stages: Sequence[Elapsed]) -> Elapsed:
    return sum(wall for wall, _ in stages), sum(processor for _, processor in stages)


def time_stages(stages: Sequence[Callable[[Any], object]], device: torch.device | str) -> list[Elapsed]:
    """Time one call of each stage, synchronising the device between them; return seconds per stage."""
    elapsed = []
    result: object = None
    synchronize(device)
    for stage in stages:
        wall, processor = time.perf_counter(), time.process_time()
        result = stage(result)
        synchronize(device)
        elapsed.append((time.perf_counter() - wall, time.process_time() - processor))
    del result
    return elapsed


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Measure the most memory held at once during a call, beyond what was held before it.

    On CUDA this is the allocator's own counter. On the CPU it is the running sum of PyTorch's allocations and frees as
    the profiler reports them: exact for tensors, blind to buffers that a library allocates for itself; use
    :func:`peak_resident` for native code.

    Args:
        function: Called once without arguments; what it returns counts as held.
        device: Where the work runs.

    Returns:
        Bytes.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return int(torch.cuda.max_memory_allocated(device) - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = function()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


def peak_resident(function: Callable[[], object]) -> int | None:
    """Measure by how much the process's resident memory rose at most during a call (Linux).

    The kernel's high-water mark is reset before the call. Memory that the C library had kept from earlier frees is not
    seen, so this is a lower bound for small sizes and right for large ones.

    Args:
        function: Called once without arguments.

    Returns:
        Bytes, or None where the system cannot say.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        result = function()
        del result
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def device_name(device: torch.device | str) -> str:
    """Name the hardware: the GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_slug(device: torch.device | str) -> str:
    """Return the short name used in file names: ``cpu``, or the GPU's model such as ``h100``."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    return next((word for word in words if any(map(str.isdigit, word))), words[-1])


def git_commit() -> str:
    """Return the commit of the working tree, with ``+changes`` if files that the benchmarks measure differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        """Return what a git command prints in the folder."""
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of those of ``packages`` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe where and when a measurement was taken.

    Args:
        device: The device that was measured.

    Returns:
        Device, threads, system, versions, commit and date, ready for JSON.
    """
    return {
        "device": device_name(device),
        "device_type": torch.device(device).type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda if torch.device(device).type == "cuda" else None,
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_result(
    name: str, payload: Mapping[str, Any], device: torch.device | str = "cpu", folder: Path = RESULTS
) -> Path:
    """Write ``<folder>/<name>_<device>.json`` atomically, with the environment record under ``environment``.

    Args:
        name: The benchmark's name.
        payload: What was measured; must be plain JSON data.
        device: The device that was measured.
        folder: Where results live.

    Returns:
        The path written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{device_slug(device)}.json"
    record = {"benchmark": name, "environment": environment(device), **payload}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as handle:
        json.dump(record, handle, indent=1)
        handle.write("\n")
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)
    return path


def format_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Lay out rows as an aligned plain-text table.

    Args:
        rows: One mapping per line; missing values print as a dash.
        columns: Keys to print, in order; the header is the key.

    Returns:
        The table as text.
    """
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
