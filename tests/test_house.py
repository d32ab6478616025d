"""Rules of the architecture that a machine can check."""

from __future__ import annotations

import ast
import builtins
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import resolve_name
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
    {"marks", "families", "stats", "trials", "speeds", "formats", "checkpoint", "options"} | {"methods"},
    {"names", "errors", "kernels", "telling", "untrusted", "lazy_torch"},
    {""},
)
"""Top-level modules and packages, from the top down; "" is the package itself, with the version and the public names.
Imports point down, or sideways if that makes no cycle."""

ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}

MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def top_level(name: str) -> str:
    """The package's module or subpackage that a module is in; "" for the package itself."""
    return f"{name}.".split(".")[1]


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, at any level."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = getattr(node, "module", None) or ""
            base = resolve_name("." * getattr(node, "level", 0) + origin, package).removesuffix(".")
            targets = (f"{base}.{alias.name}".lstrip(".") for alias in node.names)
            yield from {target if target in MODULES else base for target in targets} & MODULES.keys()


GRAPH = {name: set(imports(name)) - {name} for name in MODULES}


def test_the_checks_see_the_imports():
    def seen(name: str) -> set[str]:
        return {target.removeprefix(f"{PACKAGE}.") for target in GRAPH[f"{PACKAGE}.{name}"]}

    assert {"names", "checkpoint", "errors", "formats"} <= seen("layers")
    assert {"errors", "formats", "checkpoint.header"} <= seen("checkpoint.reader")
    assert PACKAGE in seen("convert")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name):
    assert top_level(name) in ROW_OF, f"{name}: add {top_level(name)!r} to a row of ROWS"
    assert not {target for target in GRAPH[name] if ROW_OF[top_level(target)] < ROW_OF[top_level(name)]}


def test_imports_make_no_cycle():
    # Importing a submodule imports its package, so a package that collects names of its own modules does not count.
    graph = {name: {t for t in targets if not name.startswith(t + ".")} for name, targets in GRAPH.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def containing(wanted: Callable[[ast.AST], bool]) -> set[str]:
    """Modules with such a node."""
    return {top_level(name) for name, tree in TREES.items() if any(map(wanted, ast.walk(tree)))}


def raises_builtin(node: ast.AST) -> bool:
    error = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
    kind = vars(builtins).get(error.id) if isinstance(error, ast.Name) else None
    allowed = NotImplementedError | StopIteration | AttributeError  # PEP 562 requires the last
    return isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, allowed)


def test_errors_that_users_can_cause_are_our_own():
    assert containing(raises_builtin) == set()


def test_untrusted_json_is_parsed_in_one_module():
    """Python's parser accepts values that break callers later: see `untrusted.py`."""
    assert containing(
        lambda node: isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.load", "json.loads")
    ) == {"untrusted"}


def test_constants_of_a_number_format_are_in_its_record_only():
    """Other modules ask `formats`, so that a new format changes no other file."""
    outside = [path for suffix in ("py", "js") for path in sorted(ROOT.rglob(f"*.{suffix}"))
               if ROOT / "formats" not in path.parents and path.name != "echarts.min.js"]  # fmt: skip
    assert len(outside) > 100
    knowing = re.compile(r"E4M3|E5M2|\b448\b|\b57,?344\b")
    assert [path for path in outside if knowing.search(path.read_text(encoding="utf-8"))] == []


CONVENTION_KEYS = {"COMFY_QUANT", "LEGACY_MARKER", "WEIGHT_SCALE_LEGACY", "INPUT_SCALE_LEGACY"}
CONVENTION_TEXTS = {"full_precision_matrix_mult", "_quantization_metadata"}


def test_conventions_of_quantization_configs_are_in_one_module():
    """Other modules ask `marks`, so that a new convention changes no other file."""
    assert containing(
        lambda node: getattr(node, "attr", None) in CONVENTION_KEYS or getattr(node, "value", None) in CONVENTION_TEXTS
    ) == {"marks"}


LIGHT = [
    "errors", "untrusted", "formats", "checkpoint", "names", "families", "stats", "marks", "layers", "packings", "lora",
    "naming", "solve", "convert", "patch", "inspection", "report", "report.figures", "report.page", "report.table",
    "cli",
]  # fmt: skip
HEAVY = {"torch", "diffusers", "transformers", "rich", "PIL", "matplotlib", "safetensors"}


def test_modules_that_need_only_numpy_load_nothing_heavy():
    code = (
        f"import sys\nfor name in {LIGHT!r}:\n    __import__('{PACKAGE}.' + name)\n"
        f"print(*sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
