"""The public API: its names, and that they are loaded on first use."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import convert_to_quant

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
MODULES = {module.name for module in pkgutil.iter_modules(convert_to_quant.__path__)}
NAMES = [name for name in convert_to_quant.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_and_has_a_docstring(name):
    found = getattr(convert_to_quant, name)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert found.__module__.startswith("convert_to_quant.")
    assert inspect.getdoc(found)


def test_names_are_listed_once_in_order_and_by_dir():
    assert sorted(set(NAMES)) == NAMES
    assert set(convert_to_quant.__all__) <= set(dir(convert_to_quant))


def test_no_name_hides_a_module():
    """`from . import convert` tries the package before its submodules."""
    assert MODULES & set(NAMES) == set()
    assert all(getattr(convert_to_quant, name, None) in (None, sys.modules.get(f"convert_to_quant.{name}"))
               for name in MODULES)  # fmt: skip


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'convert_to_quant' has no attribute 'convertt'"):
        _ = convert_to_quant.convertt
    with pytest.raises(ImportError, match="cannot import name 'convertt'"):
        exec("from convert_to_quant import convertt")


def test_the_package_loads_nothing_before_a_name_is_used():
    loaded = "[name for name in sys.modules if name.startswith(('convert_to_quant', 'numpy', 'torch'))]"
    code = f"import sys, convert_to_quant; print({loaded}); convert_to_quant.find_layers; print('torch' in {loaded})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['convert_to_quant']\nFalse\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_use_the_flat_names(document):
    for block in re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        compile(block, str(document), "exec")
        for module, names in re.findall(r"^from (convert_to_quant\S*) import (.+)$", block, re.MULTILINE):
            assert module == "convert_to_quant"
            assert set(names.split(", ")) <= set(NAMES)


def test_the_reference_lists_them():
    page = (ROOT / "docs/reference/python/index.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", page, re.MULTILINE) == NAMES
