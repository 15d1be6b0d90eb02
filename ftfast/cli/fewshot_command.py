"""``ftfast fewshot``: few-shot protocols over many data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftfast.cli import output
from ftfast.config.arguments import split_arguments
from ftfast.errors import ConfigError

_HELP = """usage: ftfast fewshot [FILE] [--protocol NAME] [--recipes NAME ...] [--shots N ...] [--seeds N ...]

Train on a few images per class of each data set, then measure. FILE is a YAML file of data sets, or one of
  builtin    people and eight groups of drawings (no download)
  coop       CoOp's eleven data sets and four shifted versions of ImageNet

  ftfast fewshot builtin --protocol base-to-new --recipes clip-cite coop kgcoop --shots 4 0 --seeds 1 2 3
  ftfast fewshot coop --check --data-root /data
  ftfast fewshot coop --protocol fsl --shots 1 2 4 8 16 --sets dtd eurosat

  --protocol NAME       fsl: all classes of each set, test on the same classes
                        base-to-new: half of the classes, test on both halves (default)
                        domain: the source set, test on it and on its shifted versions
                        cross-dataset: the source set, test on all others (CoCoOp's protocol)
                        cross-cite: half of the classes of each set, test on the source's halves (CLIP-CITE's)
  --recipes NAME ...    Methods: clip-cite (default), contcoop, coop, cocoop, kgcoop, finetune, wise-ft, flyp, ...
  --shots N ...         Images per class; 0: all. Default 16. A class with fewer gives all it has.
  --seeds N ...         Seeds of the draw and of training; default 1. Several give means and spreads.
  --sets NAME ...       Train on these sets only.
  --source NAME         Set that domain and cross protocols start from; default the first of the file.
  --check               Say what data is missing and where to put it; run nothing.
  --data-root FOLDER    Where the data sets lie; default $FTFAST_DATA, else data/.
  --out FOLDER          Output folder.
  --resume              Go on in --out: what is measured already is kept.
  --overwrite           Replace what is in --out.
  --keep-weights        Save the tuned weights of every training; learned prompts are always saved.
  --json                Print the records as JSON.
  --config FILE         YAML file of settings; may be repeated.

Every training setting is a flag too: --lr 1e-4 --max-steps 500 --options.alpha 1
(see "ftfast train -h"; "ftfast recipes show NAME" lists a recipe's options).
"""

_LISTS = ("recipes", "shots", "seeds", "sets")
_VALUES = ("protocol", "source", "out", "data_root")
_SWITCHES = ("check", "keep_weights")


def run(argv: Sequence[str]) -> int:
    """Run or check a protocol.

    Args:
        argv: Arguments after ``ftfast fewshot``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the arguments are wrong.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return 0
    own, rest = take_own(argv)
    arguments = split_arguments(rest)
    for word in ("dry_run", "print_config"):
        if getattr(arguments, word):
            raise ConfigError(f"--{word.replace('_', '-')} is of 'ftfast train'. Use --check here.")
    from ftfast.evaluation.fewshot import PROTOCOLS
    from ftfast.fewshot.settings import FewshotConfig

    protocol = own.get("protocol", "base-to-new")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol is '{protocol}'. Use one of: {', '.join(PROTOCOLS)}.")
    config = FewshotConfig(
        file=own.get("file", "builtin"),
        protocol=protocol,
        recipes=own.get("recipes", ("clip-cite",)),
        shots=_numbers(own.get("shots", ("16",)), "--shots"),
        seeds=_numbers(own.get("seeds", ("1",)), "--seeds"),
        sets=own.get("sets", ()),
        source=own.get("source", ""),
        out=own.get("out", ""),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        keep_weights="keep_weights" in own,
        data_root=own.get("data_root", ""),
        files=arguments.files,
        overrides=arguments.overrides,
    )
    if "check" in own:
        return _check(config)
    from ftfast.fewshot.driver import run_fewshot

    result = run_fewshot(config)
    if arguments.json:
        output.emit_json(result.as_dict())
    else:
        output.emit(str(result.folder))
    return 0


def take_own(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Separate the arguments of this command from training settings; lists end at the next flag.

    Raises:
        ConfigError: If a flag lacks its value.
    """
    own: dict[str, Any] = {}
    rest: list[str] = []
    tokens = list(argv)
    if tokens and not tokens[0].startswith("-"):
        own["file"] = tokens.pop(0)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key in _SWITCHES and not equals:
            own[key] = True
        elif key in (*_LISTS, *_VALUES):
            words = [value] if equals else []
            while tokens and not equals and not tokens[0].startswith("--") and (key in _LISTS or not words):
                words.append(tokens.pop(0))
            if not words or not words[0]:
                raise ConfigError(f"{name} needs a value.")
            own[key] = tuple(part for word in words for part in word.split(",") if part) if key in _LISTS else words[0]
        else:
            rest.append(token)
    return own, rest


def _numbers(words: Sequence[str], flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise ConfigError(f"{flag} is '{' '.join(words)}'. Give whole numbers, for example {flag} 1 2 3.") from None


def _check(config: Any) -> int:
    """Print what is there and what is not; exit code 2 if anything is missing."""
    from ftfast.config.tasks import read_tasks
    from ftfast.continual.checks import preparation
    from ftfast.fewshot.settings import data_file, rooted

    reports = preparation(rooted(read_tasks(data_file(config.file)).sequence, config.data_root))
    for report in reports:
        output.emit(f"{'ready' if not report.problems else 'MISSING':8} {report.name}")
        for line in (*report.found, *report.problems):
            output.emit(f"         {line}")
    lacking = [report.name for report in reports if report.problems]
    output.emit(f"{len(reports) - len(lacking)} of {len(reports)} ready")
    return 2 if lacking else 0
