"""The example workflows in ComfyUI's own editor: nothing is missing, and it would send what the API file says.

Beside a ComfyUI with its frontend (comfyui-frontend-package) this needs Playwright and an installed Chromium.
"""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.comfyui

DOCS = Path(__file__).parents[2] / "docs"
NAMES = sorted(path.name.removesuffix("_api.json") for path in (DOCS / "workflows").glob("*_api.json"))


@pytest.fixture(scope="module")
def maker(comfyui):
    """The script that makes the images."""
    pytest.importorskip("playwright", reason="the editor is looked at through Playwright")
    pytest.importorskip("comfyui_frontend_package", reason="the editor is comfyui-frontend-package")
    if shutil.which("chromium") is None:
        pytest.skip("there is no chromium")
    return SimpleNamespace(**runpy.run_path(str(DOCS / "images" / "make_comfyui_screenshots.py")))


@pytest.fixture(scope="module")
def editor(maker, tmp_path_factory):
    """The editor in a browser."""
    with maker.serving(tmp_path_factory.mktemp("editor")) as address, maker.editor(address) as page:
        yield page


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_reads_the_workflow_and_would_send_the_api_file(maker, editor, name):
    graph, api = (
        json.loads((DOCS / "workflows" / f"{name}{ending}.json").read_text(encoding="utf-8")) for ending in ("", "_api")
    )

    maker.show(editor, graph)

    assert maker.missing_nodes(editor) == []
    assert maker.sent_by(editor) == maker.without_titles(api)
