"""JSON that somebody else wrote: headers, marks, indexes, workflows, a server's answers.

Python's own parser takes more than JSON allows, and some of what it takes breaks whoever uses it later. What is refused
here, in one sentence each:

    more than 100 MB, the most that a safetensors header may have (MAX_BYTES)
    more than 4 million values: as Python objects, 100 MB of `{},` would take gigabytes and minutes (MAX_VALUES)
    nested deeper than 64 levels: code that walks such values recursively would overflow the stack (MAX_DEPTH)
    the same key twice in an object: parsers keep the last without a word (RFC 8259 calls it unpredictable)
    NaN, Infinity and numbers beyond float64, which JSON does not have
    half a surrogate pair, which is no character and cannot be written again
    bytes that are not UTF-8

What the values mean is for the caller to check.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from .errors import MOST_NAME, Error, cut

MAX_BYTES = 100_000_000
MAX_VALUES = 1 << 22
MAX_DEPTH = 64

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONError(Error):
    """A text is not JSON; callers put their own error in its place, or go on without the text."""


def parse_json(
    text: str | bytes,
    refuse: Callable[[str], Error] = JSONError,
    *,
    most_bytes: int = MAX_BYTES,
    lenient: bool = False,
) -> Any:
    """The value of a JSON text.

    Args:
        text: the text, or its UTF-8 bytes, with or without a byte order mark.
        refuse: makes the error, which names the file and key, from what is wrong: "not JSON (...)".
        most_bytes: a longer text is refused unread.
        lenient: take NaN, Infinity and numbers beyond float64 for null, and half a surrogate pair for a text: ComfyUI
            answers so for some nodes.

    Returns:
        Objects as dicts, arrays as lists; nested at most `MAX_DEPTH` deep.

    Raises:
        Error: whatever `refuse` makes.

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
        raise JSONError(f"{number[:40]} is no number of JSON, or beyond float64")

    try:
        if len(text) > most_bytes:
            raise JSONError(f"{len(text):,} bytes, and at most {most_bytes:,} are read")
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
    """Whether a value is a whole number that an int64 holds and that is not negative; True and 1.0 are none."""
    return type(value) is int and 0 <= value < 1 << 63


def is_texts(value: object) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JSONError(f"the key {cut(repr(twice), MOST_NAME)} appears twice in one object")
    return result


def _values(text: str) -> int:
    """About how many values a JSON text holds, as its brackets and commas say.

    Those inside of texts do not count where there are too many for that.

    >>> _values('{"a": [1, 2]}')
    3
    """
    found = sum(map(text.count, "{[,"))
    if found <= MAX_VALUES:
        return found
    text = text.replace("\\\\", "").replace('\\"', "")  # the quotation marks that are left begin and end texts
    return sum(map(re.sub('"[^"]*"', "", text).count, "{[,"))


def is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than `MAX_DEPTH`, found level by level."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, (dict, list))]
    return bool(level)
