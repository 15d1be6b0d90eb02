"""Kernel cards: what every shipped Triton kernel needs on each GPU generation, compiled here without a GPU.

``python -m benchmarks cards`` prints registers, shared memory, spills and tensor-core instructions per kernel, and the
time that counted FLOP and bytes predict for one training step at 800 TFLOP/s and 3 TB/s. None of it is a measurement on
a GPU; it is the compiler's report and arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
FLOP_PER_SECOND = 800e12
BYTES_PER_SECOND = 3e12
PROCESSORS = 132  # of an H100
_ELEMENT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_UNALIGNED = frozenset({"M", "N", "offset", "tiles_m", "tiles_n", "stripe", "OUT", "K"})


@dataclass(frozen=True)
class Card:
    """One kernel in one shipped configuration."""

    kernel: str
    """module.function inside ``ftfast.kernels``."""
    variant: str
    """Name of the compile-time choices."""
    dtype: str
    """bf16, fp16 or fp32."""
    tile: int
    """Which of ``tuning.tiles`` it launches with; -1: none."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Compile-time arguments besides blocks."""


def shipped(dtypes: Sequence[str] = ("bf16", "fp16", "fp32")) -> Iterator[Card]:
    """Yield every configuration a public operation can launch at widths that are multiples of the tile."""
    modes = {"pair": (0, True, True), "target": (1, True, False), "group": (2, True, True)}
    modes |= {"self": (3, True, False), "rivals": (4, True, True), "pair rows": (0, True, False)}
    for dtype in dtypes:
        for name, (mode, rows, columns) in modes.items():
            for kernel in ("triton_softmax._softmax_fwd_kernel", "triton_softmax._softmax_bwd_kernel"):
                heavy = "bwd" in kernel and name in ("group", "rivals")
                yield Card(kernel, name, dtype, int(heavy), {"MODE": mode, "ROWS": rows, "COLS": columns})
        for name, mode, gradient in (
            ("pair", 0, True),
            ("group", 2, True),
            ("negatives", 5, True),
            ("value", 0, False),
        ):
            yield Card("triton_sigmoid._sigmoid_kernel", name, dtype, 1, {"MODE": mode, "GRADIENT": gradient})
        kinds = (("forward", 0, False), ("soft", 1, False), ("reverse", 2, False), ("logits", 0, True))
        for name, kind, logits in kinds:
            for kernel in ("triton_distill._distill_fwd_kernel", "triton_distill._distill_bwd_kernel"):
                tile = 4 if "fwd" in kernel and kind != 1 else 3
                yield Card(kernel, name, dtype, tile, {"KIND": kind, "LOGITS": logits, "ROWS": True, "COLS": True})
        for name, transposed in (("dX", False), ("dY", True)):
            constants = {"TRANSPOSED": transposed, "ACCUMULATE": True}
            yield Card("triton_products._product_kernel", name, dtype, 2, constants)
        yield Card("triton_products._finish_kernel", "", dtype, -1, {"ROWS": 4, "BLOCK_D": 256})


def argument_types(kernel: Any, dtype: str) -> dict[str, str]:
    """Return the Triton type of every runtime argument of a kernel, by the naming rules of ``kernels/``."""
    features = {"x_ptr", "y_ptr", "g_ptr", "teacher_x_ptr", "teacher_y_ptr"}
    if "factor_ptr" in kernel.arg_names:
        features.add("out_ptr")
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        if name.endswith("ids_ptr"):
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype if name in features else 'fp32'}"
        else:
            types[name] = "fp32" if name == "norm" else "i32"
    return types


def compile_card(card: Card, architecture: int) -> dict[str, Any]:
    """Compile one card for one architecture; must run in a process without ``TRITON_INTERPRET``.

    Returns:
        The card's fields, the architecture and the compiler's report, as plain data.
    """
    import importlib

    from ftfast.kernels.aot import compile_kernel
    from ftfast.kernels.tuning import Tile, tiles

    module, function = card.kernel.split(".")
    kernel = getattr(importlib.import_module(f"ftfast.kernels.{module}"), function)
    tile = tiles(_ELEMENT[card.dtype], architecture)[card.tile] if card.tile >= 0 else Tile(0, 0, 0, 4, 3)
    every = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group, "PRECISION": "ieee"}
    every |= {"EVEN_K": True, "EVEN_E": True, "EVEN_D": True} | card.constants
    constants = {name: value for name, value in every.items() if name in kernel.arg_names}
    started = time.process_time()
    report = compile_kernel(
        kernel,
        argument_types(kernel, card.dtype),
        constants,
        architecture,
        warps=tile.warps,
        stages=tile.stages,
        unaligned=_UNALIGNED,
    )
    identity = {"kernel": card.kernel, "variant": card.variant, "dtype": card.dtype, "architecture": architecture}
    shape = {"tile": f"{tile.m}x{tile.n}x{tile.k}", "warps": tile.warps, "stages": tile.stages}
    return identity | shape | asdict(report) | {"cpu_seconds": round(time.process_time() - started, 2)}


@dataclass(frozen=True)
class Work:
    """Counted work of some launches."""

    name: str
    flop: float
    bytes: float

    @property
    def seconds(self) -> float:
        """Time at the ceilings: the larger of arithmetic and traffic."""
        return max(self.flop / FLOP_PER_SECOND, self.bytes / BYTES_PER_SECOND)


def clip_step(batch: int, width: int, architecture: int = 90) -> list[Work]:
    """Count the FLOP and the memory traffic of one symmetric contrastive step, forward and backward, in bfloat16.

    Traffic is counted against memory, as if the cache kept only what one group of tiles shares: operands once per
    group, partial statistics written and read, every superblock of G written once and read twice, and the float32 sums
    read and written once per superblock.

    Args:
        batch: N.
        width: D.
        architecture: Whose tiles are used.

    Returns:
        One entry per kernel.
    """
    from ftfast.kernels.tuning import superblock, tiles

    table = tiles(torch.bfloat16, architecture)
    similarity, product = table.similarity, table.product
    product_flop = 2.0 * batch * batch * width
    group = similarity.m * similarity.group
    operands = 2.0 * width * (batch + batch * batch / group)
    partials = 2 * 8.0 * batch * batch * (1 / similarity.m + 1 / similarity.n)
    rows, cols = superblock(batch, batch, width, 2, product, PROCESSORS)
    gradient = 2.0 * batch * batch
    sums = 2 * 4.0 * batch * width
    return [
        Work("softmax forward", product_flop, operands + partials),
        Work("softmax gradient", product_flop, operands + gradient),
        Work("product dX", product_flop, gradient + 2.0 * batch * width * batch / rows + sums * batch / cols),
        Work("product dY", product_flop, gradient + 2.0 * batch * width * batch / cols + sums * batch / rows),
        Work("finish", 0.0, 2 * batch * width * (4.0 + 2.0 + 2.0)),
    ]


def prediction(batch: int, width: int) -> dict[str, float]:
    """Return the predicted and the least possible milliseconds of one contrastive step."""
    works = clip_step(batch, width)
    floor = 4 * 2.0 * batch * batch * width / FLOP_PER_SECOND
    total = sum(work.seconds for work in works)
    return {"batch": batch, "width": width, "ms": 1e3 * total, "floor_ms": 1e3 * floor, "ratio": total / floor}


def compile_all(cards: Iterable[Card], architectures: Sequence[int], jobs: int) -> list[dict[str, Any]]:
    """Compile the cards for the architectures in ``jobs`` fresh processes without the interpreter."""
    import multiprocessing

    tasks = [(card, arch) for card in cards for arch in architectures]
    saved = os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            return list(pool.map(compile_card, *zip(*tasks, strict=True))) if tasks else []
    finally:
        if saved is not None:
            os.environ["TRITON_INTERPRET"] = saved


TITLES = ("kernel", "variant", "dtype", "architecture", "tile", "registers", "shared", "spills", "tensor_core")


def as_markdown(cards: Sequence[dict[str, Any]], steps: Sequence[dict[str, float]]) -> str:
    """Write the cards and predictions as a page of documentation."""
    text = ["# Kernel cards", "", " ".join((__doc__ or "").split("\n\n", 1)[1].split()), ""]
    text += ["Predicted contrastive step (bfloat16, forward + backward, one H100), not measured:", ""]
    text += ["| N | D | ms | floor of four similarity products, ms | ratio |", "|---|---|---|---|---|"]
    text += [
        f"| {s['batch']:.0f} | {s['width']:.0f} | {s['ms']:.1f} | {s['floor_ms']:.1f} | {s['ratio']:.2f} |"
        for s in steps
    ]
    text += ["", "| kernel | N x D = 65,536 x 768 | TFLOP | GB | ms |", "|---|---|---|---|---|"]
    text += [
        f"| {w.name} | | {w.flop / 1e12:.2f} | {w.bytes / 1e9:.2f} | {1e3 * w.seconds:.2f} |"
        for w in clip_step(65536, 768)
    ]
    text += [
        "",
        "`spills` counts local-memory instructions, `tensor_core` HMMA/HGMMA/UTCMMA instructions in the SASS.",
        "",
    ]
    text += [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    text += ["| " + " | ".join(str(card[title]) for title in TITLES) + " |" for card in cards]
    return "\n".join(text) + "\n"


def merged(path: Path, cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the recorded cards with the new ones in the places of those they replace, in shipping order."""
    known = json.loads(path.read_text())["cards"] if path.exists() else []
    key = lambda card: tuple(card[title] for title in TITLES[:4])  # noqa: E731
    by_key = {key(card): card for card in (*known, *cards)}
    order = [(c.kernel, c.variant, c.dtype, arch) for c in shipped() for arch in ARCHITECTURES]
    return [by_key[place] for place in order if place in by_key]


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the kernel cards and merge them into the JSON record and the page.

    Args:
        argv: Flags; default ``sys.argv[1:]``.

    Returns:
        Exit code: 1 if any kernel spills.
    """
    parser = argparse.ArgumentParser(prog="benchmarks cards", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="*", default=list(_ELEMENT), choices=list(_ELEMENT))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes")
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cards.json"), help="record to update")
    parser.add_argument("--page", type=Path, default=Path("docs/kernel_cards.md"), help="page to write")
    options = parser.parse_args(argv)
    chosen = [card for card in shipped(options.dtype) if options.only in f"{card.kernel} {card.variant}"]
    cards = compile_all(chosen, options.arch, options.jobs)
    titles = f"{'kernel':38s}{'variant':11s}{'dtype':6s}{'sm':>4s}  {'tile':13s}"
    print(titles + f"{'regs':>5s}{'smem':>8s}{'spill':>6s}{'mma':>5s}")
    for card in cards:
        print(
            f"{card['kernel']:38s}{card['variant']:11s}{card['dtype']:6s}{card['architecture']:4d}  {card['tile']:13s}"
            f"{card['registers']:5d}{card['shared']:8d}{card['spills']:6d}{card['tensor_core']:5d}"
        )
    steps = [prediction(*shape) for shape in ((32768, 512), (32768, 768), (32768, 1280), (65536, 768))]
    print("\nPredicted contrastive step (bf16, forward + backward) at 800 TFLOP/s and 3 TB/s; not measured")
    for step in steps:
        print(
            f"N={step['batch']:6.0f} D={step['width']:5.0f}: {step['ms']:6.1f} ms = {step['ratio']:.2f} x "
            f"the floor of four similarity products ({step['floor_ms']:.1f} ms)"
        )
    every = merged(options.json, cards)
    write(options.json, json.dumps({"torch": torch.__version__, "cards": every, "predictions": steps}, indent=1))
    write(options.page, as_markdown(every, steps))
    return 1 if any(card["spills"] for card in cards) else 0


if __name__ == "__main__":
    sys.exit(main())
