"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what the binary needs.

Gives the evidence a GPU-less machine can have: registers, shared memory, spills and tensor-core instructions of exactly
the code a launch would compile, with the divisibility facts a launch would specialise on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes of shared memory and registers that one block may use.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCMMA|UTCQMMA)\b")
_LOCAL_MEMORY = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    registers: int
    """Per thread."""
    shared: int
    """Bytes per block."""
    spills: int
    """Instructions that touch local memory."""
    tensor_core: int
    """Tensor-core instructions (HMMA, HGMMA or UTC*MMA)."""
    pipelined_loads: int
    """Asynchronous copies (LDGSTS), as the loop's prefetch uses."""


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    warps: int,
    stages: int,
    unaligned: frozenset[str] = frozenset(),
) -> Resources:
    """Compile a ``@triton.jit`` function for one architecture and read the resources of its machine code.

    Args:
        kernel: The jitted function (not the interpreter's).
        types: Triton type of each runtime argument, such as "*fp16" or "i32".
        constants: Value of each compile-time argument.
        capability: 80, 90 or 100.
        warps: Warps per block.
        stages: Pipeline stages.
        unaligned: Integer arguments that are not multiples of 16; pointers and other integers are promised to be.

    Returns:
        The resources.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    promised = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in unaligned and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=promised)
    binary = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return _inspect(binary.asm["cubin"], int(binary.metadata.shared))


def _inspect(cubin: bytes, shared: int) -> Resources:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(flag: str) -> str:
            """Return what cuobjdump prints for one flag."""
            return subprocess.run([str(tool), flag, str(path)], check=True, capture_output=True, text=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no register count: {usage[:200]!r}")
    return Resources(
        registers=int(found[1]),
        shared=shared,
        spills=len(_LOCAL_MEMORY.findall(code)),
        tensor_core=len(TENSOR_CORE.findall(code)),
        pipelined_loads=len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
    )
