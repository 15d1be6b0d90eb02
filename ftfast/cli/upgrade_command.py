"""``ftfast upgrade``: does a prompt, or a change of weights, survive a new version of the model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftfast.cli import output
from ftfast.errors import ConfigError

_HELP = """usage: ftfast upgrade FOLDER [FOLDER ...] --to MODEL [--pretrained TAG] [--out FOLDER]

Move modules trained on one model to another one of the same tokenizer and text width, and measure
  (i)   the module on its own model          (ii) the same module on the new model
  (iii) the new model without it             (iv) the method trained again on the new model
Compatibility is (ii) - (iii), residual cost (iv) - (ii). FOLDER is a prompt, a run with prompt/ or final/ inside (for
tuned weights, the change is added where names and shapes agree), or the output of ftfast fewshot: all its modules.

  ftfast upgrade runs/few/cells/contcoop/people_16shot_seed1/fsl --to tiny-clip-v2
  ftfast upgrade runs/few --to EVA02-B-16 --pretrained merged2b_s8b_b131k

  --to MODEL            The new model: an open_clip name, a folder or a built-in.
  --pretrained TAG      Its pretrained tag or weights file.
  --out FOLDER          Output folder; default runs/upgrade_to_<model>. Finished moves in it are kept.
  --no-retrain          Leave (iv) out.
  --device DEVICE       auto, cpu or cuda.
  --json                Print the measurements as JSON.
"""

_VALUES = {"to": "to", "pretrained": "to_pretrained", "out": "out", "device": "device"}


def run(argv: Sequence[str]) -> int:
    """Move modules and measure them.

    Args:
        argv: Arguments after ``ftfast upgrade``.

    Returns:
        Exit code.

    Raises:
        ConfigError: If the arguments are wrong.
    """
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(_HELP, end="")
        return 0
    values, sources, switches = _parse(argv)
    from ftfast.upgrade import UpgradeConfig, folders, run_upgrade

    config = UpgradeConfig(sources=folders(sources), retrain="no_retrain" not in switches, **values)
    result = run_upgrade(config)
    if "json" in switches:
        output.emit_json(result.as_dict())
    else:
        output.emit(str(result.folder))
    return 0


def _parse(argv: Sequence[str]) -> tuple[dict[str, Any], list[str], set[str]]:
    values: dict[str, Any] = {}
    sources: list[str] = []
    switches: set[str] = set()
    tokens = [token for token in argv if token != "--debug"]
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if not key:
            sources.append(token)
        elif key in ("json", "no_retrain") and not equals:
            switches.add(key)
        elif key in _VALUES:
            if not equals and (not tokens or tokens[0].startswith("--")):
                raise ConfigError(f"{name} needs a value.")
            values[_VALUES[key]] = value if equals else tokens.pop(0)
        else:
            raise ConfigError(f"unknown flag '{name}'. See: ftfast upgrade -h.")
    if not sources or "to" not in values:
        raise ConfigError(
            "ftfast upgrade needs a module and --to MODEL, as in: ftfast upgrade runs/x --to tiny-clip-v2."
        )
    return values, sources, switches
