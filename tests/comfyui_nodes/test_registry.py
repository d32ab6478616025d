"""What the Comfy registry reads of pyproject.toml, as docs.comfy.org/registry/specifications asked in November 2026."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WRITTEN = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
KEYS = {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes", "Models", "web"}


@pytest.fixture
def section() -> dict[str, Any]:
    found: dict[str, Any] = WRITTEN["tool"]["comfy"]
    return found


def test_the_section_says_what_is_required_and_nothing_unknown(section: dict[str, Any]) -> None:
    assert {"PublisherId", "DisplayName"} <= section.keys() <= KEYS
    assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", section["PublisherId"])  # empty until there is an account
    assert section["DisplayName"].strip()
    assert re.fullmatch(r"(>=|<=|==|>|<|~=)\d+\.\d+\.\d+", section["requires-comfyui"])


def test_the_projects_name_and_version_are_ones_that_the_registry_takes() -> None:
    name = WRITTEN["project"]["name"]
    assert len(name) < 100
    assert re.fullmatch(r"[A-Za-z]+([-_.]?[A-Za-z0-9]+)*", name)
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert WRITTEN["project"]["description"]


def test_nothing_asks_for_a_frontend_or_a_system_of_its_own() -> None:
    assert not [text for text in WRITTEN["project"]["dependencies"] if text.startswith("comfyui-frontend-package")]
    assert not [text for text in WRITTEN["project"]["classifiers"] if text.startswith("Operating System")]
