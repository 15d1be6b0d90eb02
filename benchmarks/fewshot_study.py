"""Studies of the few-shot recipes on the built-in data, three seeds each, one command each.

    python -m benchmarks.fewshot_study base-to-new     # CLIP-CITE beside zero-shot, naive fine-tuning, CoOp, KgCoOp
    python -m benchmarks.fewshot_study ablation        # rows of CLIP-CITE's ablation, and no ensembling
    python -m benchmarks.fewshot_study upgrade         # prompts moved from tiny-clip-v1 to tiny-clip-v2
    python -m benchmarks.fewshot_study tune            # 20 trials from the demo's settings

Each writes benchmarks/results/fewshot_<study>.json; finished trainings in --work are kept, so a study can go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftfast.engine.folder import environment
from ftfast.evaluation.fewshot import Record, base_to_new_table, select
from ftfast.evaluation.fewshot_report import runs_of
from ftfast.evaluation.results import write_atomically
from ftfast.evaluation.upgrade_report import by_recipe
from ftfast.fewshot.driver import run_fewshot
from ftfast.fewshot.settings import FewshotConfig
from ftfast.recipes import get_recipe
from ftfast.tune.driver import TuneConfig, run_tune
from ftfast.upgrade import UpgradeConfig, folders, run_upgrade

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
SETS = ("animals", "food", "smileys", "travel")
"""Groups that no setting was chosen on; learning rates and steps come from activities and flags."""
MOVED_SETS = ("smileys", "travel", "flags", "activities", "symbols")
"""Every group but those on which learning rates of prompts were chosen (animals, food, objects)."""
PRECISION = ("--precision", "amp_bf16")
"""Half the time on processors with bfloat16 arithmetic; the same for every method."""
ABLATION = {
    "all": (),
    "DVA": ("--options.terms", "DVA"),
    "SCL": ("--options.terms", "SCL"),
    "DVA + SCL": ("--options.terms", "DVA", "SCL"),
    "DVA + VLD": ("--options.terms", "DVA", "VLD"),
    "FrozenTC": ("--options.train", "FrozenTC"),
    "FrozenTE": ("--options.train", "FrozenTE"),
    "no ensembling": ("--options.alpha", "1"),
}


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """Base, new and HM of every method, data set by data set, in percent."""
    table: dict[str, Any] = {}
    for recipe, shots in runs_of(records):
        rows = base_to_new_table(select(records, recipe=recipe, shots=shots))
        table[f"{recipe}, {shots or 'all'} shots" if recipe != "zero-shot" else recipe] = {
            name: {
                "base": round(100 * row.base.mean, 2),
                "base_spread": round(100 * row.base.spread, 2),
                "new": round(100 * row.new.mean, 2),
                "new_spread": round(100 * row.new.spread, 2),
                "HM": round(100 * row.harmonic, 2),
            }
            for name, row in rows.items()
        }
    return table


def base_to_new(work: Path) -> dict[str, Any]:
    """CLIP-CITE and its peers at 4 shots, which are all available ones: a class has two training images here."""
    config = FewshotConfig(
        recipes=("clip-cite", "finetune", "coop", "kgcoop"),
        shots=(4,),
        seeds=SEEDS,
        sets=SETS,
        out=str(work / "base-to-new"),
        resume=True,
        overrides=PRECISION,
    )
    records = run_fewshot(config).records
    bare = dataclasses.replace(
        config, recipes=("clip-cite",), out=str(work / "alpha1"), overrides=(*PRECISION, "--options.alpha", "1")
    )
    return {
        "figures": figures(records),
        "without_ensembling": figures(run_fewshot(bare).records),
    }


def ablation(work: Path) -> dict[str, Any]:
    """Rows of the ablation on one group of drawings."""
    table = {}
    for name, flags in ABLATION.items():
        out = str(work / "ablation" / name.replace(" ", "_"))
        config = FewshotConfig(
            shots=(4,), seeds=SEEDS, sets=("animals",), out=out, resume=True, overrides=(*PRECISION, *flags)
        )
        table[name] = figures(select(run_fewshot(config).records, recipe="clip-cite"))
    return {"figures": table}


def upgrade(work: Path) -> dict[str, Any]:
    """Prompts learned on v1 and moved to v2."""
    out = work / "upgrade"
    run_fewshot(
        FewshotConfig(
            protocol="fsl",
            recipes=("contcoop", "coop", "cocoop"),
            sets=MOVED_SETS,
            shots=(16,),
            seeds=SEEDS,
            out=str(out / "v1"),
            resume=True,
            overrides=(*PRECISION, "--max-steps", "100"),
        )
    )
    moved = run_upgrade(UpgradeConfig(sources=folders([str(out / "v1")]), to="tiny-clip-v2", out=str(out / "v2")))
    return {
        "figures": {
            recipe: {name: dataclasses.asdict(figure) for name, figure in cells.items()}
            for recipe, cells in by_recipe(moved.moves).items()
        },
        "moves": [{**dataclasses.asdict(move), "source": Path(move.source).parent.name} for move in moved.moves],
    }


def tune(work: Path) -> dict[str, Any]:
    """INFUSING from the demo's settings, 20 trials, with shorter training."""
    preset = get_recipe("infusing").preset_path.parent / "demo" / "infusing.yaml"
    out = work / "tune"
    config = TuneConfig(
        recipe="infusing",
        out=str(out),
        resume=out.is_dir(),
        files=(str(preset),),
        overrides=("--max-steps", "60", "--batch-size", "64"),
    )
    result = run_tune(config)
    return {"default": vars(result.trials[0]), "best": vars(result.best), "trials": [vars(t) for t in result.trials]}


STUDIES = {"base-to-new": base_to_new, "ablation": ablation, "upgrade": upgrade, "tune": tune}


def main() -> None:
    """Run one study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--work", type=Path, default=Path("runs/fewshot_study"))
    arguments = parser.parse_args()
    found = STUDIES[arguments.study](arguments.work)
    record = {"study": arguments.study, "seeds": SEEDS, "environment": environment(), **found}
    path = RESULTS / f"fewshot_{arguments.study.replace('-', '_')}.json"
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
