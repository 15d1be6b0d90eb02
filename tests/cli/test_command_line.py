"""Entry point: help without torch, exit codes, messages of unknown commands and flags, the frozen list of flags."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

import ftfast
from ftfast.cli import guard, main, output
from ftfast.cli.application import COMMANDS
from ftfast.cli.options import parse_options
from ftfast.config.arguments import SHORTHANDS, SWITCHES
from ftfast.config.schema import TrainConfig
from ftfast.config.settings import index_of
from ftfast.errors import ConfigError, DataError, Interrupted, TrainingError

HEAVY = ("torch", "numpy", "open_clip", "PIL", "matplotlib")


def probe(arguments: list[str]) -> tuple[list[str], str]:
    """Run a command in a fresh process; return the heavy modules it imported and what it printed."""
    code = (
        "import sys, json, io, contextlib\n"
        "from ftfast.cli import main\n"
        "text = io.StringIO()\n"
        "with contextlib.redirect_stdout(text):\n"
        f"    code = main({arguments!r})\n"
        f"print(json.dumps([[name for name in {HEAVY!r} if name in sys.modules], text.getvalue(), code]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy, text, exit_code = json.loads(done.stdout)
    assert exit_code == 0
    return heavy, text


def seconds_of(arguments: list[str]) -> float:
    """CPU seconds of a whole process: what an idle machine would show as wall time, whatever else runs on this one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ftfast", *arguments], capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [
        ["-h"],
        ["train", "-h"],
        ["train", "infusing", "--help"],
        ["version"],
        *([name, "-h"] for name in COMMANDS if name != "version"),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    heavy, text = probe(arguments)
    assert heavy == []
    assert text.strip()


def test_help_answers_in_under_three_tenths_of_a_second():
    assert min(seconds_of(["-h"]) for _ in range(3)) < 0.3
    assert min(seconds_of(["train", "-h"]) for _ in range(3)) < 0.3


def test_overview_names_every_command(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["-h"]) == 0
    assert capsys.readouterr().out == bare
    assert all(f"ftfast {name}" in bare for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ftfast {ftfast.__version__}\n"


def test_python_dash_m(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ftfast", "trian"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trian'. Did you mean 'train'?\n"


def test_unknown_command_without_a_likeness(capsys):
    assert main(["--debug", "qqq"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message == f"error: unknown command 'qqq'. Commands: {', '.join(COMMANDS)}."


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("one."), 2, "error: one.\n"),
        (ConfigError(["one.", "two."]), 2, "error: 2 problems in the settings:\n  - one.\n  - two.\n"),
        (DataError("bad."), 2, "error: bad.\n"),
        (TrainingError("nan."), 1, "error: nan.\n"),
        (Interrupted("saved at step 3."), 130, "error: saved at step 3.\n"),
        (KeyboardInterrupt(), 130, "interrupted.\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(None), 0, ""),
        (SystemExit("words"), 1, ""),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            1,
            "error: No such file or directory: 'x'. Run again with --debug for the traceback.\n",
        ),
        (KeyError("k"), 1, "error: KeyError: 'k' (unexpected; run again with --debug for the traceback)\n"),
    ],
)
def test_exit_codes(error, code, text, capsys):
    def fails(argv):
        raise error

    assert guard.run(fails, []) == code
    assert capsys.readouterr().err == text


def test_debug_shows_the_traceback(capsys):
    def fails(argv):
        raise ConfigError("one.")

    assert guard.run(fails, ["--debug"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith("error: one.\n")


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m ftfast train -h | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example."""

    target: tyro.conf.Positional[str]
    """What to work on."""
    tag: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Words."""
    batch_size: int = 1
    """Size."""
    quick: bool = False
    """Fast."""
    out: str
    """Where to."""


def test_parse_options():
    argv = ["--tag", "a", "run", "--batch_size=3", "--tag=b", "--quick", "--debug", "--out", "-"]
    assert parse_options(Example, argv, "x") == Example(target="run", tag=("a", "b"), batch_size=3, quick=True, out="-")
    assert not parse_options(Example, ["r", "--quick", "--no-quick", "--out", "o"], "x").quick


def test_parse_options_reports_all_problems():
    with pytest.raises(ConfigError) as caught:
        parse_options(Example, ["a", "b", "--bach-size", "3", "--batch-size", "x", "--no-out", "--tag"], "ftfast eg")
    assert caught.value.problems == (
        "ftfast eg: unexpected argument 'b'.",
        "unknown flag '--bach-size'. Did you mean '--batch-size'?",
        "--batch-size must be a whole number, got 'x'.",
        "unknown flag '--no-out'. Did you mean '--out'?",
        "--tag needs a value.",
        "ftfast eg needs --out: where to.",
    )


def test_table_is_plain_off_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = output.table(("name", "n"), [("a", 1.0), ("long", 12.345)])
    assert text == "name      n\na      1.00\nlong  12.35"


def test_colour_respects_no_color(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.use_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not output.use_colour()


def flags_of_train() -> list[str]:
    flags = [f"--{path.replace('_', '-')}" for path in index_of(TrainConfig).settings]
    flags += [f"--{name.replace('_', '-')}" for name in (*SHORTHANDS, *SWITCHES, "config", "resume", "local_rank")]
    return sorted(set(flags))


def test_options_are_frozen():
    """A new flag is a promise to users: add it to the list on purpose (FTFAST_UPDATE=1 rewrites it)."""
    file = Path(__file__).parent / "train_flags.txt"
    found = flags_of_train()
    if os.environ.get("FTFAST_UPDATE") == "1":
        file.write_text("\n".join(found) + "\n")
    assert found == file.read_text().splitlines()


def test_tyro_page_lists_the_same_settings(capsys):
    assert main(["train", "--help-all"]) == 0
    page = capsys.readouterr().out
    missing = [
        path
        for path, setting in index_of(TrainConfig).settings.items()
        if f"--{path.replace('_', '-')}" not in page and "Suite" not in str(setting.type)
    ]
    assert missing == []


def test_page_of_a_recipe_shows_its_options_and_preset(capsys):
    assert main(["train", "infusing", "--help-all"]) == 0
    page = capsys.readouterr().out
    assert "--options.embedding-weight" in page
    assert "(default: 1000.0)" in page


def test_the_copy_of_settings_that_keeps_help_light_does_not_drift():
    """The command line repeats this dataclass so that help need not import torch."""
    from ftfast.cli.demo_command import DemoArguments
    from ftfast.config.settings import field_help, field_types
    from ftfast.demo import DemoConfig

    def described(cls: type, leave_out: tuple[str, ...]) -> dict[str, tuple[object, object, str]]:
        fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in leave_out}
        return {name: (default, field_types(cls)[name], field_help(cls)[name]) for name, default in fields.items()}

    assert described(DemoArguments, ("json", "seeds")) == described(DemoConfig, ("seeds",))
