"""What the Comfy registry reads of pyproject.toml, as docs.comfy.org/registry/specifications asked in November 2026."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from convert_to_quant import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WRITTEN = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
KEYS = {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes", "Models", "web"}


def test_the_section_says_what_is_required_and_nothing_unknown():
    section = WRITTEN["tool"]["comfy"]
    assert {"PublisherId", "DisplayName"} <= section.keys() <= KEYS
    assert re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", section["PublisherId"])  # empty until there is an account
    assert section["DisplayName"].strip()
    assert re.fullmatch(r"(>=|<=|==|>|<|~=)\d+\.\d+\.\d+", section["requires-comfyui"])


def test_the_project_is_one_that_the_registry_takes():
    project = WRITTEN["project"]
    assert re.fullmatch(r"[A-Za-z]+([-_.]?[A-Za-z0-9]+)*", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert project["description"]
    asked = [*project["dependencies"], *project["classifiers"]]  # neither a frontend nor a system of its own
    assert not [text for text in asked if text.startswith(("comfyui-frontend-package", "Operating System"))]
