"""The safetensors header: what a file says of its tensors, believed only after it is checked.

A safetensors file is eight bytes of little-endian header length N, N bytes of JSON, then the data block. The JSON maps
each tensor name to {"dtype", "shape", "data_offsets": [start, stop]} with offsets counted from the data block's start;
the optional entry "__metadata__" maps strings to strings.

Checked here, since a header is input like any other: the lengths against the file, the JSON against the form above,
names for duplicates (JSON parsers keep the last of two silently), every tensor's size against its shape and dtype,
offsets for holes, overlaps and range. After `parse_header` every tensor's bytes lie inside the file, none shared.
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
"""Bits per element of every dtype that safetensors 0.8 knows."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = MAX_BYTES
"""The safetensors library refuses longer headers; so a file that has one is of no use to anybody."""

OTHER_BEGINNINGS: Mapping[bytes, tuple[str, str]] = {
    b"GGUF": ("this is GGUF", "take the model's safetensors file in BF16, FP16 or FP8"),
    b"version ": ("this is a Git LFS pointer, which stands for the file", "`git lfs pull` gets the file itself"),
    b"<": ("this is a web page", "download the file again; it may need a login or a token"),
    b"{": ("this is JSON text", "an index of shards is read under a name that ends in .safetensors.index.json"),
}
"""What people have under a checkpoint's name instead of one, by its first bytes: what it is, and what to do.

Looked at only where the first eight bytes are no possible header length: 60 begins with `<` as well."""

AGAIN = "download it again"
MAX_DIMENSIONS = 32
"""numpy 1 has no arrays of more."""

METADATA_KEY = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        name: its key.
        dtype: in safetensors' spelling, a key of `DTYPE_BITS`.
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
        """Size of the tensor in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes that a tensor takes, or None where a sub-byte dtype does not fill whole bytes."""
    bits = DTYPE_BITS[dtype] * math.prod(shape)
    return bits // 8 if bits % 8 == 0 else None


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: by name, in the order of their data.
        metadata: the file's `__metadata__`.
        data_start: byte offset of the data block in the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def header_length(prefix: bytes, file_bytes: int, path: Path) -> int:
    """Length of the JSON that follows, from a file's first eight bytes.

    Raises:
        HeaderError: the file is too short, or the length cannot be true.
    """

    def none(why: str, hint: str | None = None) -> HeaderError:
        return HeaderError(f"not a safetensors file: {why}", path=path, hint=hint)

    beginning = prefix[:LENGTH_BYTES]
    if len(beginning) < LENGTH_BYTES:
        raise none(f"only {file_bytes} bytes long", AGAIN)
    length = int.from_bytes(beginning, "little")
    if length == 0:
        raise none("its first 8 bytes are 0, as downloads that stopped leave them", AGAIN)
    if length > MAX_HEADER_BYTES:
        for other, (what, hint) in OTHER_BEGINNINGS.items():
            if prefix.lstrip(b" \r\n").startswith(other):
                raise none(what, hint)
        if beginning.isascii() and beginning.decode("ascii").isprintable():
            hint = f"downloads that fail leave such files; {AGAIN}"
            raise none(f"it begins with the text {beginning.decode('ascii')!r}", hint)
        most = f"at most {MAX_HEADER_BYTES} are allowed"
        raise none(f"its first 8 bytes announce a header of {length} bytes, and {most}", AGAIN)
    if LENGTH_BYTES + length > file_bytes:
        problem = f"the header should be {length} bytes long, but the file ends after {file_bytes} bytes"
        raise HeaderError(f"truncated: {problem}", path=path, hint=AGAIN)
    return length


def parse_header(text: bytes, file_bytes: int, path: Path) -> Header:
    """Parse and check the JSON of a header, without the length before it; `file_bytes` is the size of the whole file.

    Raises:
        HeaderError: one message per cause; see the module's docstring for what is checked.
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
            problem = f"its bytes {info.start}..{info.stop} reach beyond the file's {data_bytes} bytes of data"
            raise HeaderError(f"truncated: {problem}", path=path, tensor=info.name, hint=AGAIN)
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            problem = f"its data starts at {info.start}, but {end} was expected: it {fault}"
            raise HeaderError(problem, path=path, tensor=info.name)
        end = info.stop
    if end != data_bytes:
        problem = f"the tensors end at byte {end} of the data, but the file has {data_bytes}"
        hint = f"something was appended to it, or another file written over it; {AGAIN}"
        raise HeaderError(problem, path=path, hint=hint)
    return Header({info.name: info for info in infos}, metadata, data_start)


def _tensor_info(name: str, entry: object, path: Path) -> TensorInfo:
    """One entry of the header, checked by itself."""
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
        raise fail(f"it has {len(shape)} dimensions, and at most {MAX_DIMENSIONS} can be read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
        raise fail(f"its data_offsets should be two byte positions, found {_shown(offsets)}")
    start, stop = offsets
    if stop < start:
        raise fail(f"its data_offsets end before they start: {offsets!r}")
    if math.prod(size for size in shape if size) * DTYPE_BITS[dtype] >= 1 << 63:
        raise fail(f"a tensor of shape {shape} is too large for any memory")
    expected = tensor_nbytes(dtype, shape)
    if expected is None:
        raise fail(f"shape {shape} of {dtype} does not fill whole bytes")
    if stop - start != expected:
        raise fail(f"shape {shape} of {dtype} takes {expected} bytes, but its data_offsets span {stop - start}")
    return TensorInfo(name, dtype, tuple(shape), start, stop)


def _shown(value: object) -> str:
    """A value of the header for a message; it may be of any length."""
    return cut(repr(value), MOST_NAME)


def serialize_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a header, padded with spaces so that the data block starts at a multiple of 8 bytes.

    Args:
        tensors: in the order of their data, with offsets already counted from the data block's start.
        metadata: left out where empty.

    Returns:
        The first bytes of the file.
    """
    fields: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    for info in tensors:
        fields[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.stop]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
