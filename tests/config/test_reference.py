"""The generated reference is the one that is committed."""

from __future__ import annotations

from pathlib import Path

import yaml

from ftfast.config.reference import reference
from ftfast.config.schema import TrainConfig
from ftfast.config.settings import index_of
from ftfast.config.suites import read_suite_files

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m ftfast.config.reference > docs/config.md"


def test_every_setting_is_explained():
    index, page = index_of(TrainConfig), reference()
    assert [path for path, setting in index.settings.items() if not setting.help.endswith((".", "?"))] == []
    assert [path for path, group in index.groups.items() if not group.help] == []
    assert [path for path in index.settings if f"`{path}`" not in page] == []


def test_examples_on_the_page_are_valid(tmp_path):
    blocks = [part.split("```")[0] for part in reference().split("```yaml\n")[1:]]
    assert len(blocks) == 2
    assert yaml.safe_load(blocks[0]) == {"optim": {"weight_decay": 0.1}}
    (tmp_path / "suites.yaml").write_text(blocks[1])
    suites = read_suite_files([str(tmp_path / "suites.yaml")])
    assert [suite.name for suite in suites] == ["shoes", "captions", "same shoe"]
    assert suites[2].gallery is not None
