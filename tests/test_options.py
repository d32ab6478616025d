"""Options on a command line, in Python and on a node."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from convert_to_quant.cli.convert import EPILOG
from convert_to_quant.cli.parsing import Parser
from convert_to_quant.errors import OptionError
from convert_to_quant.formats import WRITTEN
from convert_to_quant.methods import METHODS
from convert_to_quant.options import (
    MARGIN,
    PERCENTILE,
    CalibrationOptions,
    ConvertOptions,
    Options,
    SolveOptions,
    add_options,
    inputs_of,
    offered,
    option,
    options_of,
)


@dataclass(frozen=True)
class Made(Options):
    kind: str = option("plain", "plain or odd", "KIND", ("plain", "odd"))
    margin: float | None = option(None, "factor (free)", "M", MARGIN)
    percentile: float = option(99.9, "of all", "P", PERCENTILE)
    leave: tuple[str, ...] = option((), "left alone", "REGEX", flag="leave-layers")
    scale: bool = option(True, "without scales", flag="no-scale")
    inner: int = option(3)


def parse(*words: str, prefix: str = "", **defaults: Any) -> Made:
    parser = Parser(prog="made")
    add_options(parser, Made, prefix, **defaults)
    return options_of(Made, parser.parse_args(words))


def test_an_empty_command_line_gives_the_defaults():
    assert parse() == Made()
    assert parse(percentile=50.0) == Made(percentile=50.0)


def test_a_command_line_sets_each_option():
    words = ("--kind", "odd", "--margin", "2", "--percentile", "9", "--leave-layers", "a", "--leave-layers", "b")
    assert parse(*words, "--no-scale") == Made("odd", 2.0, 9.0, ("a", "b"), scale=False)
    assert parse("--x-margin", "2", "--no-scale", prefix="x-") == Made(margin=2.0, scale=False)
    assert list(offered(Made)) == ["kind", "margin", "percentile", "leave_layers", "no_scale"]


def test_help_shows_defaults():
    parser = Parser(prog="made")
    add_options(parser, Made)
    said = [action.help for action in parser._actions]
    assert said == ["plain or odd (plain)", "factor (free)", "of all (99.9)", "left alone", "without scales"]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (Made, {"kind": "even"}, "unknown kind 'even' (kinds: plain, odd)"),
        (Made, {"margin": 0.5}, "a margin should be at least 1, found 0.5 (below 1 clips observed values)"),
        (Made, {"margin": float("inf")}, "a margin should be at least 1, found inf (below 1 clips observed values)"),
        (Made, {"leave": ("(",)}, "--leave-layers '(' is not a regular expression"),
        (ConvertOptions, {"scaling_mode": "x"}, "unknown scaling mode 'x' (scaling modes: tensor, row, block)"),
        (CalibrationOptions, {"device": "gpu"}, "unknown device 'gpu' (cpu, cuda, cuda:0 or xpu)"),
        (CalibrationOptions, {"text_tokens": -1}, "text tokens should be at least 1, found -1"),
        (CalibrationOptions, {"seed": -1}, "a seed should not be negative, found -1"),
        (SolveOptions, {"percentile": float("nan")}, "a percentile should be above 0 and at most 100, found nan"),
        (SolveOptions, {"row_loss_limit": -0.1}, "--row-loss-limit should be a share between 0 and 1, found -0.1"),
    ],
)
def test_options_are_checked_when_created(kind, options, said):
    with pytest.raises(OptionError) as caught:
        kind(**options)
    assert str(caught.value).startswith(said)


def test_threads_may_create_the_first_objects_at_once():
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from convert_to_quant.options import SolveOptions
sys.setswitchinterval(1e-6)
with ThreadPoolExecutor(16) as pool:
    made = set(pool.map(lambda _: SolveOptions(margin=2.0), range(64)))
assert made == {SolveOptions(margin=2.0)}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_node_has_the_defaults_choices_and_ranges():
    shown = inputs_of(Made, {"percentile": {"min": 0.5, "tooltip": "p"}, "margin": {"max": 9.0}, "kind": {}})
    assert shown == {
        "percentile": ("FLOAT", {"default": 99.9, "min": 0.5, "max": 100.0, "step": 0.01, "tooltip": "p"}),
        "margin": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 9.0, "step": 0.01}),
        "kind": (["plain", "odd"], {"default": "plain"}),
    }


def test_help_lists_every_method_and_every_format():
    parser = Parser(prog="made")
    add_options(parser, SolveOptions)
    assert all(name in parser.format_help() for name in METHODS)
    assert " ".join(EPILOG.partition("formats:")[2].split()) == ", ".join(WRITTEN)
