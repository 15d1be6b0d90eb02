"""Pack drawings of the built-in generator as "builtin:synthetic": ``python -m ftfast.synth.pack FOLDER``.

The folder is made by the command that ``docs/synth.md`` gives; the packed picture lies in ``ftfast/data/builtin``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftfast.config.schema import DataConfig
from ftfast.data import open_dataset
from ftfast.data.builtin.synthetic import TILE, pack_synthetic
from ftfast.errors import ConfigError, DataError


def pack(folder: Path, target: Path) -> tuple[Path, Path]:
    """Pack a finished folder of ``ftfast synth``.

    Args:
        folder: With ``table.csv``; images of 32 x 32 pixels.
        target: Where to write.

    Returns:
        The picture and its index.

    Raises:
        DataError: If the folder is not finished, or its images have another size.
    """
    try:
        with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file))
        settings = json.loads((folder / "synth.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file. Finish the folder with ftfast synth first.") from None
    dataset = open_dataset(DataConfig(path=str(folder)))
    images = np.stack([np.asarray(dataset.load_image(row)) for row in range(len(dataset))])
    if images.shape[1:] != (TILE, TILE, 3):
        raise DataError(f"{folder}: the images are {images.shape[1]} pixels high; the split holds {TILE} x {TILE}.")
    command = (
        f"ftfast synth --pipeline tiny-diffusion --generic builtin:pairs/train --template '{settings['template']}' "
        f"--draw {settings['draw']} --images {settings['images']} --seed {settings['seed']} "
        f"--batch-size {settings['batch_size']}"
    )
    rows = [(row["caption"], row["class"], int(row["seed"])) for row in table]
    return pack_synthetic(target, images, rows, command)


def main(argv: Sequence[str] | None = None) -> int:
    """Pack one folder into the package.

    Args:
        argv: Arguments; by default those of the process.

    Returns:
        Exit code.
    """
    from ftfast.cli.guard import run

    def command(arguments: Sequence[str]) -> int:
        """Pack one folder."""
        if len(arguments) not in (1, 2):
            raise ConfigError(
                "python -m ftfast.synth.pack takes a folder of ftfast synth, and perhaps a target folder."
            )
        default = Path(__file__).parents[1] / "data" / "builtin"
        for path in pack(Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else default):
            print(f"{path}: {path.stat().st_size:,} bytes")
        return 0

    return run(command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
