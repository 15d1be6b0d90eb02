"""What can be said about the GPU kernels without a GPU: interpreter parity, and ahead-of-time builds without spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already inside the interpreter")

TABLE = {"table": "*i64", "chunk_rows": "*i32", "chunk_numbers": "*i32"}
VECTORS = {**TABLE, "coefficients": "*fp32", "scales": "*fp32", "partials": "*fp32"}
NUMBERS = dict.fromkeys(("lr", "beta1", "beta2", "eps", "keep", "rate", "root", "decay", "weight"), "fp32")


def test_interpreter_matches_the_formulas():
    """Triton decides at import whether it interprets, so the parity tests run in a process of their own."""
    here = Path(__file__).with_name("test_weight_ops.py")
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", str(here), "-k", "triton"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 15


def build(kernel, signature, constants, target, **options):
    """Compile for a GPU that is not here; returns (spilled bytes, PTX, shared memory)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = [i for i, name in enumerate(kernel.arg_names) if str(signature.get(name, "")).startswith("*")]
    strides = [i for i, name in enumerate(kernel.arg_names) if name.endswith(("_stride", "_sample", "_step"))]
    attributes = {(i,): [["tt.divisibility", 16]] for i in [*pointers, *strides]}
    names = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=names, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assembly = compiled.asm["ptx"]
    return resource_usage(compiled.asm["cubin"]), assembly, compiled.metadata.shared


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and local (spill) bytes, read by cuobjdump from Triton's wheel."""
    import tempfile

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, timeout=60
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("narrow", [False, True])
def test_list_kernels_build_without_spills_and_with_vector_loads(target, narrow):
    from ftfast.kernels import fisher_triton
    from ftfast.kernels import weight_triton as kernels
    from triton import language as tl

    kind = tl.bfloat16 if narrow else tl.float32
    common = {"ALIGNED": True, "CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK}
    types = {"THETA": kind, "GRAD": kind, "START": kind, "PRECISION": tl.bfloat16}
    jobs = [
        (kernels.anchor_penalty_kernel, {**types, **common, "HAS_GRAD": True, "HAS_PRECISION": True}),
        (fisher_triton.square_sum_kernel, {"GRAD": kind, **common}),
        (fisher_triton.accumulate_fisher_kernel, {"THETA": tl.float32, "GRAD": kind, **common}),
    ]
    jobs += [
        (kernels.adamw_anchored_kernel, {**types, **common, "MOMENT": tl.float32, "MODE": mode, "HAS_PRECISION": True})
        for mode in range(4)
    ]
    for kernel, constants in jobs:
        usage, ptx, _ = build(kernel, {**VECTORS, **NUMBERS}, constants, target, num_warps=kernels.NUM_WARPS)
        assert usage["local"] == 0, (kernel.__name__, usage)
        assert usage["stack"] == 0, (kernel.__name__, usage)
        assert usage["registers"] <= 128, (kernel.__name__, usage)
        assert re.search(r"ld\.global\S*\.v4", ptx), f"{kernel.__name__} loads one element at a time"


@pytest.mark.parametrize("target", [80, 90, 100])
def test_per_sample_fisher_builds_without_spills_and_uses_tensor_cores(target):
    import torch
    from ftfast.kernels import fisher_triton as kernels

    counts = ("samples", "length", "rows", "columns", "fisher_stride", "input_sample", "input_step")
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for length in (50, 257):
            launch = kernels.tile_of(length, dtype)
            options = {key: launch.pop(key) for key in ("num_warps", "num_stages")}
            signature = dict.fromkeys((*counts, "grad_sample", "grad_step"), "i32")
            signature |= {"fisher": "*fp32", "inputs": f"*{name}", "grads": f"*{name}", "weight": "fp32"}
            precision = "ieee" if name == "fp32" else "tf32"
            constants = {**launch, "WIDEN": False, "PRECISION": precision}
            usage, ptx, shared = build(kernels.per_sample_fisher_kernel, signature, constants, target, **options)
            assert usage["local"] == 0, (name, length, usage)
            assert usage["stack"] == 0, (name, length, usage)
            assert shared <= 163 * 1024
            if name == "bf16":
                wanted = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[target]
                assert wanted in ptx, f"no {wanted} for length {length}"
