"""A checkpoint with scaled channels: it reads as the folded one, and its header lists the factors.

Factors are powers of two, so that nothing is rounded in BF16 (except values below 2⁻¹²⁶) and float32. Two kinds of
tensors would round, and become float32: float16, whose range is small, and biases that are increased by f - 1.

The header entry (`names.FOLDING_KEY`, JSON) has what adapters need: the columns and rows of layers and their factors, 8
bits per channel, compressed with zlib.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..checkpoint import Checkpoint, tensor_nbytes, to_float32
from ..checkpoint.reader import BIT_DTYPES
from ..errors import CheckpointError
from ..formats.record import narrow_bfloat16, spans
from ..untrusted import is_count, parse_json
from .groups import Exponents, Group, Place

VERSION = 1
PLACES = ("columns", "rows", "ones")
EXACT = frozenset({"BF16", "F32", "F64"})
"""Types that powers of two scale exactly."""

BAND_VALUES = 1 << 22
MOST_CHANNELS = 1 << 20


@dataclass(frozen=True)
class Scaling:
    """Exponents of factors, int8, by the full names of the tensors that they scale.

    Attributes:
        columns: divide columns, [in].
        rows: multiply rows, [out].
        ones: of f; rows are increased by f - 1 as well, [out].
    """

    columns: dict[str, Exponents] = field(default_factory=dict)
    rows: dict[str, Exponents] = field(default_factory=dict)
    ones: dict[str, Exponents] = field(default_factory=dict)

    @staticmethod
    def of(groups: Iterable[Group], prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Scaling:
        """The scaling of groups, for tensors of these shapes whose names have a prefix."""
        scaling = Scaling()
        for group in groups:
            for kind, axis in (("columns", 1), ("rows", 0), ("ones", 0)):
                exponents = group.column_exponents if axis else group.exponents
                for place in getattr(group, kind):
                    shape = shapes.get(prefix + place.tensor, ())
                    if len(shape) > axis:  # else the header is of another file
                        whole = getattr(scaling, kind).setdefault(prefix + place.tensor, none(shape[axis]))
                        part = exponents[place.first : place.first + place.count]
                        run = whole[place.start : place.start + len(part)]
                        run += part[: len(run)]
        return scaling


def none(count: int) -> Exponents:
    """Exponents of rows or columns that stay unchanged."""
    return np.zeros(count, np.int8)


class Folded(Checkpoint):
    """A checkpoint, which must stay open, read as if its channels were scaled, with other metadata."""

    def __init__(self, checkpoint: Checkpoint, scaling: Scaling, metadata: Mapping[str, str]) -> None:
        vars(self).update(vars(checkpoint))
        self._stored, self._scaling = checkpoint, scaling
        self.computed = frozenset({*scaling.columns, *scaling.rows})
        self.tensors = dict(checkpoint.tensors)
        for name in self.computed:
            info = self.tensors[name]
            size = tensor_nbytes("F32", info.shape)
            if size is not None and (info.dtype not in EXACT or name in scaling.ones):
                self.tensors[name] = replace(info, dtype="F32", stop=info.start + size)
        self.metadata = {**metadata}

    def _scaled(self, name: str, rows: slice) -> NDArray[Any]:
        """Some rows of a tensor, in the numpy dtype of `BIT_DTYPES`, [rows, columns]."""
        info, dtype = self.tensors[name], self._stored.tensors[name].dtype
        source = self._stored.bits(name, rows)
        flat = source.reshape(len(source), -1)
        result = np.empty(flat.shape, BIT_DTYPES[info.dtype])

        def powers(of: Mapping[str, Exponents], count: int) -> Any:
            return np.ldexp(np.float32(1), of.get(name, none(count)).astype(np.int32))

        multiplied = powers(self._scaling.rows, info.shape[0])[rows, None]
        divided = powers(self._scaling.columns, flat.shape[1])
        ones = powers(self._scaling.ones, info.shape[0])[rows, None].astype(np.float64) - 1
        for band in spans(len(flat), max(1, BAND_VALUES // flat.shape[1])):
            values = flat[band] if dtype == "F64" else to_float32(flat[band], dtype)
            scaled = values * multiplied[band] / divided
            if name in self._scaling.ones:
                scaled = scaled + ones[band]  # float64, so it is rounded once
            result[band] = narrow_bfloat16(scaled) if info.dtype == "BF16" else scaled
        return result

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """See `Checkpoint.raw`."""
        if name not in self.computed:
            return super().raw(name, start, stop)
        info = self.tensors[name]
        row_bytes = info.nbytes // info.shape[0]
        stop = info.nbytes if stop is None else stop
        first = start // row_bytes
        data = self._scaled(name, slice(first, -(-stop // row_bytes))).reshape(-1).view(np.uint8)
        return data[start - first * row_bytes :][: stop - start]


def fold_checkpoint(checkpoint: Checkpoint, groups: Sequence[Group]) -> Folded:
    """A checkpoint with scaled groups of channels, and its header entry. The original must stay open."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    scaling = Scaling.of(groups, names.strip_prefix(shapes)[0], shapes)
    return Folded(checkpoint, scaling, {**checkpoint.metadata, names.FOLDING_KEY: written(groups)})


def written(groups: Sequence[Group]) -> str:
    """Groups as a header entry."""
    entry = [
        {
            **{kind: [astuple(place) for place in getattr(group, kind)] for kind in PLACES},
            "head": group.head,
            "repeat": group.repeat,
            "exponents": base64.b64encode(zlib.compress(group.exponents.tobytes(), 9)).decode(),
        }
        for group in groups
    ]
    return json.dumps({"format_version": VERSION, "groups": entry})


def read_groups(checkpoint: Checkpoint) -> list[Group]:
    """The scaled groups of a checkpoint, from its header; none if it is not folded.

    Raises:
        CheckpointError: the header entry is damaged.
    """

    def damaged(problem: str) -> CheckpointError:
        return CheckpointError(f"its header entry for folding is {problem}", path=checkpoint.path)

    entry: Any = parse_json(checkpoint.metadata.get(names.FOLDING_KEY, '{"groups": []}'), damaged)
    try:
        return [_read_group(group) for group in entry["groups"]]
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error, binascii.Error):
        raise damaged("damaged") from None


def _read_group(entry: Any) -> Group:
    unpacked = zlib.decompressobj().decompress(base64.b64decode(entry["exponents"]), MOST_CHANNELS)
    exponents = np.frombuffer(unpacked, np.int8)
    places = {key: [_read_place(place) for place in entry[key]] for key in PLACES}
    head, repeat = entry["head"], entry["repeat"]
    if not (is_count(head) and is_count(repeat) and len(exponents) * repeat <= MOST_CHANNELS):
        raise TypeError
    group = Group(**places, head=head, repeat=repeat, exponents=exponents)
    group.column_exponents  # noqa: B018  # raises if sizes do not fit
    return group


def _read_place(entry: Any) -> Place:
    tensor, *numbers = entry
    if not isinstance(tensor, str) or not all(is_count(number) for number in numbers):
        raise TypeError
    return Place(tensor, *numbers)
