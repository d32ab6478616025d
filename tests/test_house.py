"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import builtins
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import convert_to_quant

ROOT = Path(convert_to_quant.__file__).parent
PACKAGE = "convert_to_quant"

ROWS = (
    {"cli", "__main__"},
    {"card", "demo", "emoji", "comfyui_nodes"},
    {"best", "calibrate_activation_scales", "fidelity", "folding", "inspection", "problems", "report"},
    {"engines"},
    {"solve", "choose", "rounding", "headroom", "patch", "convert", "quantize", "migration", "repair"},
    {"adapters", "lora", "recorder", "linear_calls", "layers", "identity", "layout", "damaged", "misshapen"}
    | {"naming", "packings"},
    {"marks", "families", "stats", "trials", "speeds", "formats", "checkpoint", "options"},
    {"names", "errors", "kernels", "telling", "untrusted", "lazy_torch"},
    {""},
)
"""The rooms from the top down; "" is the package itself, which has the version and the public names. A room imports
what is below it, or beside it where that makes no circle."""

ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}


def module_name(path: Path) -> str:
    """Name of a module below the package: "checkpoint.reader", "checkpoint", "fp8", or "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room(name: str) -> str:
    return name.partition(".")[0]


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, anywhere in it."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name[len(PACKAGE) + 1 :] for alias in node.names if room(alias.name) == PACKAGE)
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
            base = ".".join([*above, *([module] if module else [])])
        elif room(module) == PACKAGE:
            base = module[len(PACKAGE) + 1 :]
        else:
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}" if base else alias.name
            yield inner if inner in MODULES else base


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}


def test_the_checks_see_the_imports():
    assert {"names", "checkpoint", "errors", "formats"} <= GRAPH["layers"]
    assert {"errors", "formats", "checkpoint.header"} <= GRAPH["checkpoint.reader"]
    assert "" in GRAPH["convert"]
    assert all(target in MODULES for targets in GRAPH.values() for target in targets)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name):
    assert room(name) in ROW_OF, f"{name}: say in ROWS which row this room is in"
    upward = {target for target in GRAPH[name] if ROW_OF[room(target)] < ROW_OF[room(name)]}
    assert not upward


def test_imports_make_no_circle():
    # Every submodule's package is imported with it, so a package that only gathers its own names does not count.
    graph = {name: {t for t in targets if not name.startswith(t + ".")} for name, targets in GRAPH.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


BUILTIN_ERRORS = {name for name, member in vars(builtins).items() if isinstance(member, type)
                  and issubclass(member, Exception)}  # fmt: skip
BUILTIN_ERRORS -= {"NotImplementedError", "StopIteration", "AttributeError"}  # the last is what PEP 562 asks for


@pytest.mark.parametrize("name", MODULES)
def test_what_a_user_can_cause_is_raised_as_an_error_of_ours(name):
    raised = {
        node.exc.func.id
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    assert not raised & BUILTIN_ERRORS


def test_json_of_others_is_parsed_in_one_place():
    """Python's own parser takes what breaks its callers later: see `untrusted.py`."""
    parsing = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
    }
    assert parsing == {"untrusted"}


def test_what_a_number_format_is_stands_in_its_record_only():
    """What else needs to know of a format asks `formats`, so that a new one changes no other file."""
    outside = [path for suffix in ("py", "js") for path in sorted(ROOT.rglob(f"*.{suffix}"))
               if ROOT / "formats" not in path.parents and path.name != "echarts.min.js"]  # fmt: skip
    assert len(outside) > 100
    knowing = re.compile(r"E4M3|E5M2|\b448\b|\b57,?344\b")
    assert [path for path in outside if knowing.search(path.read_text(encoding="utf-8"))] == []


SPELLED = {"COMFY_QUANT", "QUANTIZATION_METADATA", "LEGACY_MARKER", "WEIGHT_SCALE_LEGACY", "INPUT_SCALE_LEGACY"}


def test_how_a_file_says_what_it_is_is_known_in_one_place():
    """What else needs to know of a mark asks `marks`, so that a new way of marking changes no other file."""
    knowing = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in SPELLED)
        or (isinstance(node, ast.Constant) and node.value == "full_precision_matrix_mult")
    }
    assert knowing == {"marks"}


LIGHT = [
    "errors", "untrusted", "formats", "checkpoint", "names", "families", "stats", "marks", "layers", "packings", "lora",
    "naming", "solve", "convert", "patch", "inspection", "report", "report.figures", "report.page", "report.table",
    "cli",
]  # fmt: skip
HEAVY = {"torch", "diffusers", "transformers", "rich", "PIL", "matplotlib", "safetensors"}


def test_what_needs_only_numpy_loads_nothing_heavy():
    code = (
        f"import sys\nfor room in {LIGHT!r}:\n    __import__('{PACKAGE}.' + room)\n"
        f"print(*sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
