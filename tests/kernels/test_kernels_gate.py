"""The gate a machine without a GPU can hold: interpreter parity, and the compiled resources of every shipped kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(900)
def test_every_triton_kernel_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "test_triton_kernels.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.timeout(1200)
def test_every_shipped_kernel_compiles_without_spills_and_uses_tensor_cores() -> None:
    from ftfast.kernels.aot import REGISTER_LIMIT, SHARED_LIMIT

    from benchmarks.cards import ARCHITECTURES, compile_all, shipped

    cards = compile_all(shipped(), ARCHITECTURES, jobs=2)
    assert len(cards) == len(ARCHITECTURES) * len(list(shipped()))
    problems = []
    for card in cards:
        name = f"{card['kernel']} {card['variant']} {card['dtype']} sm_{card['architecture']}"
        if card["spills"]:
            problems.append(f"{name}: {card['spills']} spill instructions")
        if card["registers"] > REGISTER_LIMIT or card["shared"] > SHARED_LIMIT[card["architecture"]]:
            problems.append(f"{name}: {card['registers']} registers, {card['shared']} bytes of shared memory")
        multiplies = "finish" not in card["kernel"] and card["dtype"] != "fp32"  # float32 products are exact, not TF32
        if multiplies and not (card["tensor_core"] and card["pipelined_loads"]):
            problems.append(f"{name}: no tensor-core instruction or no pipelined load")
    assert not problems, "\n".join(problems)


def test_the_recorded_table_is_whole_and_free_of_spills() -> None:
    from benchmarks.cards import ARCHITECTURES, shipped

    record = json.loads((HERE.parent.parent / "benchmarks" / "results" / "cards.json").read_text())
    recorded = {(c["kernel"], c["variant"], c["dtype"], c["architecture"]): c["spills"] for c in record["cards"]}
    expected = {(c.kernel, c.variant, c.dtype, arch) for c in shipped() for arch in ARCHITECTURES}
    assert set(recorded) == expected
    assert not any(recorded.values())


@pytest.mark.parametrize("shape", [(32768, 512), (32768, 768), (32768, 1280), (65536, 768)])
def test_counted_work_stays_near_the_floor(shape: tuple[int, int]) -> None:
    from benchmarks.cards import prediction

    assert prediction(*shape)["ratio"] < 1.6
