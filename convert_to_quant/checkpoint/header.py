"""The safetensors header: parsed, and trusted only after validation.

A safetensors file is eight bytes of little-endian header length N, N bytes of JSON, then the data block. The JSON maps
each tensor name to {"dtype", "shape", "data_offsets": [start, stop]}, with offsets relative to the data block; the
optional entry "__metadata__" maps strings to strings.

Checks: the lengths against the file size, the JSON structure, duplicate names (most JSON parsers silently keep the
last), each tensor's size against its shape and dtype, and offsets for gaps, overlaps and range. After `parse_header`
every tensor's bytes lie inside the file and none overlap.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import MOST_NAME, HeaderError, cut
from ..formats.fp8 import STORED
from ..untrusted import MAX_BYTES, is_count, parse_json

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    **dict.fromkeys(STORED, 8),
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype in safetensors 0.8."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = MAX_BYTES
"""The safetensors library refuses longer headers."""

AGAIN = "download it again"
OTHER_BEGINNINGS: Mapping[bytes, tuple[str, str]] = {
    b"GGUF": ("this is GGUF", "use the model's safetensors file in BF16, FP16 or FP8"),
    b"version ": ("this is a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    b"<": ("this is a web page", "download the file again; it may need a login or a token"),
    b"{": ("this is JSON text", "the name of a shard index must end in .safetensors.index.json"),
}
"""Other files often found under a checkpoint's name, by their first bytes: what they are, and what to do.

Consulted only if the first eight bytes are no valid header length, since a header of 60 bytes also begins with `<`."""

MAX_DIMENSIONS = 32
"""The limit of numpy 1."""

METADATA_KEY = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """The header entry of one tensor.

    Attributes:
        name: its key.
        dtype: a key of `DTYPE_BITS`.
        shape: sizes per dimension; () is a scalar.
        start, stop: byte offsets into the data block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Size of a tensor in bytes; None if a sub-byte dtype does not fill whole bytes."""
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    return bits // 8 if bits % 8 == 0 else None


@dataclass(frozen=True)
class Header:
    """A validated header.

    Attributes:
        tensors: by name, in data order.
        metadata: the file's `__metadata__`.
        data_start: byte offset of the data block in the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def header_length(prefix: bytes, file_bytes: int, path: Path) -> int:
    """Length of the header's JSON, from the first eight bytes of a file; a HeaderError if it is impossible."""

    def none(why: str, hint: str = AGAIN) -> HeaderError:
        return HeaderError(f"not a safetensors file: {why}", path=path, hint=hint)

    beginning = prefix[:LENGTH_BYTES]
    if len(beginning) < LENGTH_BYTES:
        raise none(f"only {file_bytes} bytes long")
    length = int.from_bytes(beginning, "little")
    if length == 0:
        raise none("its first 8 bytes are 0, as an interrupted download leaves them")
    if length > MAX_HEADER_BYTES:
        for other, (what, hint) in OTHER_BEGINNINGS.items():
            if prefix.lstrip(b" \r\n").startswith(other):
                raise none(what, hint)
        if beginning.isascii() and beginning.decode("ascii").isprintable():
            raise none(f"it begins with the text {beginning.decode('ascii')!r}", f"a failed download? {AGAIN}")
        raise none(f"its first 8 bytes give a header length of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        problem = f"truncated: the header should be {length} bytes long, but the file ends after {file_bytes} bytes"
        raise HeaderError(problem, path=path, hint=AGAIN)
    return length


def parse_header(text: bytes, file_bytes: int, path: Path) -> Header:
    """Parse and validate a header's JSON.

    Args:
        text: the JSON, without the length before it.
        file_bytes: size of the whole file.
        path: for messages.

    Raises:
        HeaderError: one message per cause; see the module's docstring for the checks.
    """
    if not text.startswith(b"{"):
        raise HeaderError("not a safetensors file: the header does not begin with '{'", path=path)
    fields = parse_json(
        text, lambda problem: HeaderError(f"not a safetensors file: the header is {problem}", path=path)
    )
    metadata = fields.pop(METADATA_KEY, None)
    metadata = {} if metadata is None else metadata
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise HeaderError(f"{METADATA_KEY} must map strings to strings", path=path)

    data_start = LENGTH_BYTES + len(text)
    data_bytes = file_bytes - data_start
    infos = sorted((_tensor_info(name, entry, path) for name, entry in fields.items()), key=lambda i: (i.start, i.stop))
    end = 0
    for info in infos:
        if info.stop > data_bytes:
            problem = f"truncated: bytes {info.start}..{info.stop} extend beyond the file's {data_bytes} bytes of data"
            raise HeaderError(problem, path=path, tensor=info.name, hint=AGAIN)
        if info.start != end:
            fault = "overlaps the previous tensor" if info.start < end else "leaves a gap"
            raise HeaderError(f"its data starts at {info.start}, expected {end}: it {fault}",
                              path=path, tensor=info.name)  # fmt: skip
        end = info.stop
    if end != data_bytes:
        problem = f"the tensors end at byte {end} of the data, but the file has {data_bytes}"
        hint = f"another program appended to the file or overwrote it; {AGAIN}"
        raise HeaderError(problem, path=path, hint=hint)
    return Header({info.name: info for info in infos}, metadata, data_start)


def _tensor_info(name: str, entry: object, path: Path) -> TensorInfo:
    """Parse one entry of the header."""
    fail = partial(HeaderError, path=path, tensor=name)
    if not isinstance(entry, dict):
        raise fail(f"its header entry should be an object, found {_shown(entry)}")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise fail(f"its header entry lacks {', '.join(missing)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"unknown dtype {_shown(dtype)}")
    if not isinstance(shape, list) or not all(is_count(size) for size in shape):
        raise fail(f"its shape should be a list of sizes, found {_shown(shape)}")
    if len(shape) > MAX_DIMENSIONS:
        raise fail(f"it has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are supported")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise fail(f"its data_offsets should be two byte offsets, found {_shown(offsets)}")
    start, stop = offsets
    if stop < start:
        raise fail(f"its data_offsets end before they start: {offsets!r}")
    if math.prod(size for size in shape if size) * DTYPE_BITS[dtype] >= 1 << 63:
        raise fail(f"shape {shape} is too large")
    expected = tensor_nbytes(dtype, shape)
    if expected is None:
        raise fail(f"shape {shape} of {dtype} does not fill whole bytes")
    if stop - start != expected:
        raise fail(f"shape {shape} of {dtype} needs {expected} bytes, but its data_offsets span {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), start, stop)


def _shown(value: object) -> str:
    """A header value for a message, cut to a sane length."""
    return cut(repr(value), MOST_NAME)


def serialize_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Serialize a header, padded with spaces so that the data block starts at a multiple of 8 bytes.

    Args:
        tensors: in data order, with their final offsets.
        metadata: omitted if empty.

    Returns:
        The first bytes of the file, length included.
    """
    fields: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for info in tensors:
        fields[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.stop]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
