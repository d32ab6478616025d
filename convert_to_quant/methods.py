"""Methods of choosing a layer's input range from statistics: one table for help, options, solver and nodes.

Importing it loads nothing heavy, because help lists the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .stats import Statistics


class Method(NamedTuple):
    """A method of choosing scales.

    Attributes:
        choose: from statistics of L layers and a percentile to their ranges, float64 [L].
        words: its description for users.
        reason: its description in a layer's result.
    """

    choose: Callable[[Statistics, float], NDArray[np.float64]]
    words: str
    reason: str


def _by_percentile(seen: Statistics, percentile: float) -> Any:
    from .stats import BIN_EDGES

    ranges = seen.quantiles(percentile / 100)
    return ranges * (ranges >= BIN_EDGES[1])  # values in the bin of the zeros count as zeros


METHODS: Mapping[str, Method] = {
    "absmax": Method(lambda seen, _: seen.absmax.astype("float64"), "clips no observed value", "absmax"),
    "percentile": Method(_by_percentile, "clips the values above it", "percentile {percentile:g}"),
}
