"""Untrusted JSON and sessions that are refused; `fuzz/` tests every parser on mutated files."""

from __future__ import annotations

import functools
import json
from typing import ClassVar

import pytest

from convert_to_quant.engines import session
from convert_to_quant.errors import StatisticsError
from convert_to_quant.stats import Statistics
from convert_to_quant.untrusted import MAX_DEPTH, MAX_VALUES, JSONError, parse_json

# the parser


def test_brackets_and_commas_in_strings_are_not_values():
    text = json.dumps({"workflow": json.dumps({"a\\": "[{" * MAX_VALUES})})
    assert parse_json(text)["workflow"].count("[") == MAX_VALUES


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        (b'{"\xff": 1}', "'utf-8' codec can't decode"),
        ('{"a":[' + "[]," * MAX_VALUES + "1]}", f"more than {MAX_VALUES:,} values"),
        ("[" + "1," * MAX_VALUES + "1]", f"more than {MAX_VALUES:,} values"),
        ("[" * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 500 + "1" + "}" * 500, f"nested deeper than {MAX_DEPTH} levels"),
        ('[{"a": 1, "b": 2, "a": 3}]', "the key 'a' appears twice in one object"),
        ("[NaN]", "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("1e999", "1e999 is not a JSON number, or beyond float64"),
        ("1" * 5000, "Exceeds the limit"),
        (r'["\ud800"]', "half a surrogate pair"),
        (r'{"\uDFFF": 1}', "half a surrogate pair"),
    ],
    ids=range(13),
)
def test_what_is_not_json_is_refused(text, problem):
    with pytest.raises(JSONError, match=r"not JSON \(") as caught:
        parse_json(text)
    assert problem in str(caught.value)


def test_the_error_is_the_caller_s():
    with pytest.raises(StatisticsError, match=r"^a: x: not JSON \(") as caught:
        parse_json("{", functools.partial(StatisticsError, path="a", tensor="x"))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_text_may_be_as_long_and_deep_as_the_limits():
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deep, most_bytes=len(deep)) == json.loads(deep)
    with pytest.raises(JSONError, match="nested deeper"):
        parse_json(f"[{deep}]")
    with pytest.raises(JSONError, match="expected at most 127"):
        parse_json(deep, most_bytes=len(deep) - 1)


def test_surrogate_pairs_and_a_byte_order_mark_are_accepted():
    assert parse_json(r'["\ud83d\ude00", "\\ud800"]') == ["😀", r"\ud800"]
    assert parse_json('\ufeff{"a": 1}'.encode()) == {"a": 1}


def test_lenient_parsing_accepts_nan_and_half_surrogates():
    assert parse_json("[NaN, -Infinity, 1e999, 2.5]", lenient=True) == [None, None, None, 2.5]
    assert parse_json(r'["\ud800"]', lenient=True) == ["\ud800"]
    with pytest.raises(JSONError, match="nested deeper"):
        parse_json("[" * 100_000, lenient=True)


class Recorded:
    """What a session needs of a recording."""

    layers: ClassVar = {"blocks.0": (16, 32), "blocks.1": (16, 32)}


@pytest.mark.parametrize("value", [{"g": [[1.0], 2.0]}, {"g": [1.0]}, {"g": "ab"}, [], None])
def test_a_session_whose_ranges_are_hostile_is_refused(tmp_path, value):
    running = session.Session(tmp_path / "out.safetensors", {}, resume=True)
    state = {"options": running.options, "done": [], "ranges": value}
    assert running.partial is not None
    Statistics.empty(Recorded.layers).save(running.partial, {session.METADATA_KEY: json.dumps(state)})
    with pytest.raises(StatisticsError, match="damaged: "):
        running._begun(Recorded())  # type: ignore[arg-type]
