"""The floors of docs/design.md: imports point down, nothing stands outside, no module hides another."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"ftfast": ROOT / "ftfast", "ftfast.kernels": ROOT / "kernels"}
GROUND, TOP = -1, 5


def floors() -> dict[str, int]:
    """Read the drawing at the top of docs/design.md: room -> floor."""
    drawing = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("```")[1]
    rooms: dict[str, int] = {}
    for line in drawing.strip().splitlines():
        match = re.match(r"(?:floor (\d+)|(ground))\s+(.*)", line)
        assert match, f"docs/design.md: not a floor: {line}"
        number = int(match[1]) if match[1] else GROUND
        for name in re.findall(r"ftfast[/.](\w+)", match[3]):
            assert rooms.setdefault(name, number) == number, f"docs/design.md: {name} stands on two floors"
        if "ftfast/*.py" in match[3]:
            rest = number
    for path in (ROOT / "ftfast").glob("*.py"):
        rooms.setdefault(path.stem, rest)  # every file that the drawing does not name
    rooms.pop("__init__")
    return rooms


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imported(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module of ftfast that a file names, wherever the import stands, with the line."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield f"{origin}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function.endswith(("import_module", "__import__")) and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def room_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def violations(name: str, path: Path, rooms: dict[str, int]) -> list[str]:
    mine = room_of(name)
    found = []
    for module, line in imported(name, path):
        other = room_of(module)
        if not module.startswith("ftfast.") or other not in rooms or other == mine:
            continue
        same_room = rooms.get(mine) == rooms[other] == TOP
        if mine in rooms and not same_room and rooms[other] >= rooms[mine]:
            found.append(f"{path.name}:{line}: {mine} (floor {rooms[mine]}) imports {other} (floor {rooms[other]})")
    return found


def test_every_module_has_a_floor():
    rooms = floors()
    homeless = {room_of(name) for name, _ in modules()} - set(rooms) - {""}
    assert not homeless, f"docs/design.md names no floor for {sorted(homeless)}"
    missing = {room for room in rooms if not room.startswith("_")} - {room_of(name) for name, _ in modules()}
    assert not missing, f"docs/design.md names rooms that do not exist: {sorted(missing)}"
    assert len(rooms) > 15


def test_imports_point_down():
    rooms = floors()
    assert [problem for name, path in modules() for problem in violations(name, path, rooms)] == []


def test_the_package_itself_imports_no_room():
    path = ROOT / "ftfast" / "__init__.py"
    assert [module for module, _ in imported("ftfast", path) if module.startswith("ftfast")] == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ftfast.data.x", "from ftfast.models import load_model"),
        ("ftfast.data.x", "from ftfast import models"),
        ("ftfast.data.x", "from ..models.loading import load_model"),
        ("ftfast.data.x", "from .. import recipes"),
        ("ftfast.data.x", "def f():\n    import ftfast.cli.guard"),
        ("ftfast.data.x", "import importlib\nimportlib.import_module('ftfast.engine')"),
        ("ftfast.kernels.x", "from ftfast.config.schema import DataConfig"),
        ("ftfast.errors", "import ftfast.kernels"),
    ],
)
def test_a_violation_would_be_seen(tmp_path, name, code):
    path = tmp_path / "x.py"
    path.write_text(code)
    assert len(violations(name, path, floors())) == 1


@pytest.mark.parametrize("code", ["from ftfast.errors import DataError", "from .images import a", "import torch", ""])
def test_allowed_imports_are_not_reported(tmp_path, code):
    path = tmp_path / "x.py"
    path.write_text(code)
    assert violations("ftfast.data.x", path, floors()) == []


def _dependencies(name: str, extras: bool, seen: set[str]) -> set[str]:
    """Names of a distribution and of everything it requires that is installed."""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name in seen:
        return seen
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for requirement in required:
        if extras or "extra ==" not in requirement:
            _dependencies(re.match(r"[\w.-]+", requirement)[0], False, seen)
    return seen


def test_no_module_hides_the_standard_library_or_a_dependency():
    # "deepspeed ftfast/train.py" puts ftfast/ first on the path: ftfast/logging.py would then be everyone's logging.
    ours = {room_of(name) for name, _ in modules()} - {""}
    installed = _dependencies("ftfast", True, set()) - {"ftfast"}
    assert {"torch", "open-clip-torch", "numpy"} <= installed
    tops = {
        top
        for top, distributions in importlib.metadata.packages_distributions().items()
        if installed & {re.sub(r"[-_.]+", "-", d).lower() for d in distributions}
    }
    assert ours & (tops | set(sys.stdlib_module_names)) == set()


def test_the_folder_kernels_is_empty_as_a_top_level_module() -> None:
    """Libraries look for a package of that name; a second run of our files would unregister the operations in use."""
    code = """
import torch, ftfast.kernels as ours
x, scale = torch.eye(3), torch.tensor(10.0)
before = ours.siglip_loss(x, x, scale)
import kernels
print(hasattr(kernels, "siglip_loss"), ours.siglip_loss(x, x, scale).equal(before))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True"]
