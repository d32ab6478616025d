"""Parsing of untrusted JSON: headers, quantization configs, indexes, workflows, a server's answers.

Python's parser accepts more than JSON allows, some of which breaks its callers later. Refused here are:

    more than 100 MB, the limit of a safetensors header (MAX_BYTES)
    more than 4 million values: 100 MB of `{},` would take gigabytes and minutes as Python objects (MAX_VALUES)
    nesting deeper than 64 levels, which overflows the stack of recursive code (MAX_DEPTH)
    a key that appears twice in an object: parsers silently keep the last (RFC 8259 calls it unpredictable)
    NaN, Infinity, and numbers beyond float64, which are not JSON
    half a surrogate pair, which is no character and cannot be written again
    bytes that are not UTF-8

Callers check what the values mean.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from .errors import MOST_NAME, Error, cut

MAX_BYTES = 100_000_000
MAX_VALUES = 1 << 22
MAX_DEPTH = 64

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONError(Error):
    """A text is not JSON; callers replace this error with their own, or ignore the text."""


def parse_json(
    text: str | bytes,
    refuse: Callable[[str], Error] = JSONError,
    *,
    most_bytes: int = MAX_BYTES,
    lenient: bool = False,
) -> Any:
    """Parse a JSON text.

    Args:
        text: the text, or its UTF-8 bytes, with or without a byte order mark.
        refuse: makes the error from the problem, "not JSON (...)".
        most_bytes: a longer text is refused unread.
        lenient: read NaN, Infinity and numbers beyond float64 as null, and accept half a surrogate pair, since ComfyUI
            sends both for some nodes.

    Returns:
        Objects as dicts, arrays as lists; nested at most `MAX_DEPTH` deep.

    Raises:
        Error: made by `refuse`.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    convert_to_quant.untrusted.JSONError: not JSON (the key 'a' appears twice in one object)
    """

    def finite(number: str) -> float | None:
        value = float(number)
        if math.isfinite(value):
            return value
        if lenient:
            return None
        raise JSONError(f"{number[:40]} is not a JSON number, or beyond float64")

    try:
        if len(text) > most_bytes:
            raise JSONError(f"{len(text):,} bytes, expected at most {most_bytes:,}")
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        if _values(decoded) > MAX_VALUES:
            raise JSONError(f"more than {MAX_VALUES:,} values")
        value = json.loads(decoded, object_pairs_hook=_unique, parse_float=finite, parse_constant=finite)
        if is_deep(value):
            raise JSONError(f"nested deeper than {MAX_DEPTH} levels")
        if not lenient and _SURROGATE.search(decoded):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        problem = f"nested deeper than {MAX_DEPTH} levels"
    except UnicodeEncodeError:
        problem = "half a surrogate pair in a text"
    except (JSONError, ValueError) as error:  # a ValueError: not UTF-8, not JSON, an integer of 5,000 digits
        problem = str(error)
    else:
        return value
    raise refuse(f"not JSON ({problem})")


def is_count(value: object) -> bool:
    """Whether a value is a non-negative int64; True and 1.0 are not."""
    return type(value) is int and 0 <= value < 1 << 63


def is_texts(value: object) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise JSONError(f"the key {cut(repr(key), MOST_NAME)} appears twice in one object")
    return result


def _values(text: str) -> int:
    """The approximate number of values in a JSON text, by its brackets and commas.

    Those inside strings are subtracted only if they would exceed the limit.

    >>> _values('{"a": [1, 2]}')
    3
    """
    found = sum(map(text.count, "{[,"))
    if found <= MAX_VALUES:
        return found
    text = text.replace("\\\\", "").replace('\\"', "")  # the remaining quotation marks delimit strings
    return sum(map(re.sub('"[^"]*"', "", text).count, "{[,"))


def is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than `MAX_DEPTH`."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, (dict, list))]
    return bool(level)
