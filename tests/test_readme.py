"""The README's commands and numbers, and the file tree in CONTRIBUTING, are up to date."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TREE = re.search(r"<!-- tree.*?-->\n```text\n(.*?)```", CONTRIBUTING, re.DOTALL)
FOLDERS = {
    "benchmarks/": "Speed, memory and accuracy, against peers and physical limits.",
    "docs/": "Guide, concepts, reference, FAQ; results and experiments.",
    "tests/": "Mirrors the package.",
}


def lines() -> list[str]:
    """The expected tree: each module with the first line of its docstring."""
    said = {}
    for path in (ROOT / "convert_to_quant").rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        name = str(path.relative_to(ROOT))
        said[name.removesuffix("__init__.py")] = docstring.splitlines()[0]
    width = max(map(len, said))
    return [f"{name:<{width}}  {text}" for name, text in [*sorted(said.items()), *FOLDERS.items()]]


def test_the_tree_lists_every_module_with_its_docstring() -> None:
    assert TREE is not None
    assert TREE.group(1).splitlines() == lines()


def test_the_first_two_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^(make \w+)", README, re.MULTILINE)[:2]
    assert commands == ["make demo", "make test"]
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE) for command in commands)


def test_the_guides_command_prints_the_readmes_number() -> None:
    """README, the guide's output of `check --conditioning`, and docs/accuracy.md use one protocol."""
    guide, accuracy = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("guide.md", "accuracy.md"))
    screen = re.search(
        r"--conditioning demo/prompts.*?^mean +([\d.]+) dB +([\d.]+) dB", guide, re.DOTALL | re.MULTILINE
    )
    assert screen is not None
    mean, error = (f"{float(text):.1f}" for text in screen.groups())
    assert f"| **`--actcal`, without any data** | **{mean}** |" in README
    assert f"prints the {mean}." in README
    assert f"guidance 2 | {mean} ± {error} dB |" in accuracy


@pytest.mark.parametrize(("flags", "row"), [("", "best, 8 bits"), (" --bits 5.5", "best, 5.5 bits")])
def test_the_readmes_folded_and_rounded_mixes_are_those_of_the_table_of_rounding(flags: str, row: str) -> None:
    table = (ROOT / "docs" / "rounding.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| {row} \| folded and rounded \|(.*)\|$", table, re.MULTILINE)
    assert found is not None
    plain, hot, *_, qwen = (text.strip() for text in found.group(1).split("|"))
    (line,) = [
        line for line in README.splitlines() if line.startswith(f"| **`--best --gpu rtx50 --fold --round{flags}`")
    ]
    assert f"| **{plain}** | **{hot}** | **{qwen}** |" in line


if __name__ == "__main__":  # regenerates the tree
    assert TREE is not None
    tree = "\n".join([*lines(), ""])
    (ROOT / "CONTRIBUTING.md").write_text(CONTRIBUTING.replace(TREE.group(1), tree), encoding="utf-8")
