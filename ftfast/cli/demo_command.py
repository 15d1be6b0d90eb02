"""``ftfast demo``: naive fine-tuning destroys a small CLIP, a recipe does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftfast.cli import output
from ftfast.cli.options import parse_options
from ftfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Fine-tune a small CLIP on real images, naively and with a recipe; report gain and forgetting."""

    recipe: str = "infusing"
    """Method compared with naive fine-tuning."""
    out: str = "runs/demo"
    """Output folder."""
    seeds: str = "0"
    """Seeds, separated by commas; several give a table of means and spreads."""
    model: str = "tiny-clip-v1"
    """Built-in start model."""
    overwrite: bool = False
    """Replace an earlier demo in the output folder."""
    resume: bool = False
    """Keep finished runs in the output folder and continue interrupted ones."""
    json: bool = False
    """Print the measurements as JSON."""


def run(argv: Sequence[str]) -> int:
    """Run the demo.

    Args:
        argv: Arguments after ``ftfast demo``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the seeds are not whole numbers.
    """
    arguments = parse_options(DemoArguments, argv, "ftfast demo")
    try:
        seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    except ValueError:
        raise ConfigError(f"--seeds is '{arguments.seeds}'. Give whole numbers separated by commas: 0,1,2.") from None
    from ftfast.demo import DemoConfig, run_demo

    result = run_demo(
        DemoConfig(
            recipe=arguments.recipe,
            out=arguments.out,
            seeds=seeds,
            model=arguments.model,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
        )
    )
    if arguments.json:
        output.emit_json(result.as_dict())
    else:
        output.emit(str(result.folder))
    return 0
