"""Continual learning on the built-in tasks: GIFT beside its peers, both orders, three seeds, one command.

    python -m benchmarks continual                 # everything that is not there yet, then record, figure and table
    python -m benchmarks continual --minutes 5     # a piece of it; run again to go on
    python -m benchmarks continual --tune          # the grid of strengths, on a seed that is not reported

Every method learns with the same learning rate, steps, batch and views (``builtin.yaml``); each has its own strength,
chosen from a grid of the same size on a seed that is not among the reported ones.

The start model is tiny-clip-v1's recipe at half its length, which the study pretrains first (three minutes): the
shipped weights know the tasks' training drawings by heart, so that nothing is left to learn from them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ftfast.continual.driver import ContinualConfig, run_continual
from ftfast.continual.folder import IDENTITY
from ftfast.engine.folder import environment
from ftfast.evaluation.continual import SequenceMatrix
from ftfast.evaluation.continual_plots import heat_maps
from ftfast.evaluation.continual_report import (
    ZERO_SHOT,
    SequenceInfo,
    as_dict,
    figures_markdown,
    from_dict,
    summary,
    write_sequence_report,
)
from ftfast.evaluation.drawing import LIGHT
from ftfast.evaluation.results import write_atomically
from ftfast.pretrain.settings import PretrainConfig
from ftfast.pretrain.training import pretrain

RESULTS = Path(__file__).parent / "results"
START_EPOCHS = 32
"""Epochs of the start model; the shipped tiny-clip-v1 has 60."""
ORDERS = ("I", "II")
SEEDS = (0, 1, 2)
TUNING_SEED = 100
REAL = ("--generic.path", "builtin:pairs/train", "--options.replay-texts", "class_prompts")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "finetune": ("finetune", ()),
    "lwf": ("lwf", ()),
    "ewc-online": ("ewc-online", ()),
    "zscl": ("zscl", ()),
    "gift": ("gift", ()),
    "gift, real pairs": ("gift", REAL),
}
"""Row -> recipe and flags. GIFT replays generated drawings; the last row replays the real ones that ZSCL is shown."""
FAST = ("--precision", "amp_bf16", "--model.channels-last", "--model.trim-text")
"""Less time on processors with bfloat16 arithmetic; the same for every method."""
PEERS = ("finetune", "lwf", "ewc-online", "zscl")
COMPARED = (*PEERS, "gift")
TUNING_ORDER = "activities,smileys,symbols,travel"
GRIDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "finetune": ((),),
    "lwf": tuple(("--options.distill-weight", value) for value in ("1", "3")),
    "ewc-online": tuple(("--options.anchor-weight", value) for value in ("1e5", "1e6")),
    "zscl": tuple(("--options.distill-weight", value) for value in ("0.25", "1")),
    "gift": tuple(("--options.consolidation-weight", value) for value in ("1", "10")),
}
"""Two strengths for each method that has one, on four tasks with the tuning seed; the best Average is taken."""


@dataclass(frozen=True)
class Piece:
    """One sequence: a method, an order, a seed, and flags when tuning."""

    method: str
    order: str
    seed: int
    flags: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of its folder."""
        tail = "_".join(word.lstrip("-").replace(".", "-") for word in self.flags)
        method = self.method.replace(", ", "-").replace(" ", "-")
        return f"{method}_{self.order.replace(',', '-')}_{self.seed}" + (f"_{tail}" if tail else "")


def study_pieces() -> list[Piece]:
    """Every sequence, compared methods and whole seeds first: a part of the study is a smaller study."""
    pieces = [Piece(method, order, seed) for seed in SEEDS for order in ORDERS for method in METHODS]
    return sorted(pieces, key=lambda piece: piece.method not in COMPARED)


def tuning_pieces() -> list[Piece]:
    """Every sequence of the grid."""
    return [Piece(method, TUNING_ORDER, TUNING_SEED, flags) for method, grid in GRIDS.items() for flags in grid]


def start_model(work: Path) -> str:
    """Pretrain the study's start model, unless that is done; several processes may try, and make the same.

    Args:
        work: Folder of all pieces.

    Returns:
        Its open_clip name.
    """
    folder = work / "start"
    if not folder.is_dir():
        making = work / f"start.{os.getpid()}"
        pretrain(PretrainConfig(out=str(making), epochs=START_EPOCHS, precision="amp_bf16", threads=1, overwrite=True))
        with contextlib.suppress(OSError):  # another process was first
            making.rename(folder)
        shutil.rmtree(making, ignore_errors=True)
    return f"local-dir:{folder.resolve()}"


def run_piece(piece: Piece, work: Path, model: str) -> tuple[SequenceMatrix, float]:
    """Run one sequence, or read it if it is finished.

    Args:
        piece: What to run.
        work: Folder of all pieces.
        model: Start model.

    Returns:
        The matrix and the seconds it took when it was run.
    """
    record = work / f"{piece.folder}.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        return from_dict(known["matrix"]), known["seconds"]
    out = work / piece.folder
    recipe, own = METHODS[piece.method]
    config = ContinualConfig(
        tasks="builtin",
        recipe=recipe,
        order=piece.order,
        seeds=(piece.seed,),
        out=str(out),
        resume=(out / IDENTITY).is_file(),
        overrides=("--model", model, *FAST, *own, *piece.flags),
    )
    result = run_continual(config, Console(stderr=True, quiet=True))
    text = json.dumps({"matrix": as_dict(result.runs[0]), "seconds": result.seconds})
    write_atomically(record, text + "\n")
    return result.runs[0], result.seconds


def collect(work: Path) -> dict[str, dict[str, list[SequenceMatrix]]]:
    """Read finished pieces of the study: order -> method -> matrices by seed."""
    found: dict[str, dict[str, list[SequenceMatrix]]] = {}
    for piece in study_pieces():
        record = work / f"{piece.folder}.json"
        if record.is_file():
            matrix = from_dict(json.loads(record.read_text(encoding="utf-8"))["matrix"])
            found.setdefault(piece.order, {}).setdefault(piece.method, []).append(matrix)
    return {order: {name: methods[name] for name in METHODS if name in methods} for order, methods in found.items()}


def bars(runs: dict[str, dict[str, list[SequenceMatrix]]]) -> dict[str, Any]:
    """What the study is to show, for each order: GIFT's Average above its peers', Transfer near zero-shot.

    Args:
        runs: Order -> method -> matrices.

    Returns:
        Figures and whether each holds.
    """
    found: dict[str, Any] = {}
    for order, methods in runs.items():
        if not {"gift", *PEERS} <= set(methods):
            continue
        table = summary(methods)
        gift, zero = table["gift"], table[ZERO_SHOT]["transfer"].mean
        ahead = {name: round(gift["average"].mean - table[name]["average"].mean, 2) for name in PEERS}
        drops = {name: round(zero - table[name]["transfer"].mean, 2) for name in ("gift", "finetune")}
        found[order] = {
            "average_ahead_of": ahead,
            "ahead_of_all": min(ahead.values()) > 0,
            "transfer_below_zero_shot": drops,
            "gift_within_3_points": drops["gift"] <= 3,
            "finetune_8_points_below": drops["finetune"] >= 8,
        }
    return found


def write_record(work: Path, model: str, seconds: float) -> None:
    """Write the record, the figure and the report of everything that is finished."""
    runs = collect(work)
    if not runs:
        return
    tuned = []
    for piece in tuning_pieces():
        record = work / f"{piece.folder}.json"
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            metrics = asdict(from_dict(known["matrix"]).metrics)
            tuned.append({"method": piece.method, "flags": list(piece.flags), "seed": piece.seed, **metrics})
    record = {
        "model": model,
        "seeds": list(SEEDS),
        "bars": bars(runs),
        "summary": {
            order: {run: {n: asdict(f) for n, f in row.items()} for run, row in summary(methods).items()}
            for order, methods in runs.items()
        },
        "tuning": tuned,
        "runs": {
            order: {name: [as_dict(matrix) for matrix in matrices] for name, matrices in methods.items()}
            for order, methods in runs.items()
        },
        "seconds_of_this_call": round(seconds, 1),
        "environment": environment(),
    }
    write_atomically(RESULTS / "continual.json", json.dumps(record, indent=1) + "\n")
    first = runs[ORDERS[0]]
    shown = {name: first[name] for name in ("finetune", "gift") if name in first}
    write_atomically(RESULTS / "continual.png", heat_maps(shown).png(LIGHT))
    for order, methods in runs.items():
        info = SequenceInfo(title=f"Built-in tasks, order {order}", subtitle=model)
        write_sequence_report(work / f"order_{order}", methods, info)
        print(f"\norder {order}\n{figures_markdown(summary(methods))}")
    print(json.dumps(record["bars"], indent=2))


def main(argv: Sequence[str]) -> int:
    """Run what is missing, within a time limit, and write the record.

    Args:
        argv: Options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks continual", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/continual-study"), help="folder of the pieces")
    parser.add_argument("--model", default="", help="another start model")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no new sequence after this time; 0: no limit")
    parser.add_argument("--only", default="", help="one method")
    parser.add_argument("--tune", action="store_true", help="run the grid of strengths instead of the study")
    parser.add_argument("--share", default="1/1", help="k/n: only every n-th sequence, starting with the k-th")
    options = parser.parse_args(argv)
    begin = time.perf_counter()
    part, parts = (int(word) for word in options.share.split("/"))
    chosen = tuning_pieces() if options.tune else study_pieces()
    pieces = [piece for piece in chosen if options.only in ("", piece.method)][part - 1 :: parts]
    model = options.model or start_model(options.work)
    for piece in pieces:
        if options.minutes and time.perf_counter() - begin > 60 * options.minutes:
            break
        fresh = not (options.work / f"{piece.folder}.json").is_file()
        matrix, seconds = run_piece(piece, options.work, model)
        metrics = matrix.metrics
        mark = f"{seconds:.0f} s" if fresh else "known"
        print(
            f"{piece.folder:60} Transfer {100 * metrics.transfer:5.2f}  Average {100 * metrics.average:5.2f}  "
            f"Last {100 * metrics.last:5.2f}  Forgetting {100 * metrics.forgetting:5.2f}  ({mark})",
            flush=True,
        )
    shown = options.model or f"tiny-clip-v1's recipe, {START_EPOCHS} epochs"
    write_record(options.work, shown, time.perf_counter() - begin)
    return 0
