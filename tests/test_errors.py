"""The tree of errors, and their messages."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from convert_to_quant import errors
from convert_to_quant.errors import CheckpointError, Error, OptionError, TensorError

CLASSES = {name: member for name, member in inspect.getmembers(errors, inspect.isclass) if issubclass(member, Error)}


def drawn_tree() -> dict[str, str]:
    """Child -> parent, from the module's docstring."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w*Error|Error)\b", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_tree_in_the_docstring_is_that_of_the_classes():
    assert drawn_tree() == {name: member.__bases__[0].__name__ for name, member in CLASSES.items()}


def test_only_option_errors_exit_with_2():
    assert {name for name, member in CLASSES.items() if member.exit_code == 2} == {"OptionError"}
    assert {member.exit_code for member in CLASSES.values()} == {1, 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "it broke"),
        ({"path": "a.safetensors"}, "a.safetensors: it broke"),
        ({"path": Path("b") / "a.safetensors"}, f"{Path('b') / 'a.safetensors'}: it broke"),
        ({"tensor": "x.weight"}, "x.weight: it broke"),
        ({"path": "a", "tensor": "x", "hint": "try again"}, "a: x: it broke (try again)"),
        ({"hint": "try again"}, "it broke (try again)"),
        ({"tensor": ""}, ": it broke"),
    ],
)
def test_a_message_names_the_file_the_tensor_the_problem_and_what_to_try(given, message):
    assert str(CheckpointError("it broke", **given)) == message


def test_an_error_keeps_its_parts():
    error = TensorError("it broke", path="a", tensor="x", hint="mend it")
    assert (error.problem, error.path, error.tensor, error.hint) == ("it broke", "a", "x", "mend it")
    assert isinstance(error, CheckpointError)
    assert not isinstance(error, OptionError)
