"""One corrupt file per error, written as bytes, one file a line."""

# ruff: noqa: E501

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as library_reads

from convert_to_quant.checkpoint.header import (
    DTYPE_BITS,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    header_length,
    parse_header,
    serialize_header,
)
from convert_to_quant.checkpoint.reader import CheckpointFile
from convert_to_quant.checkpoint.writer import Spec, lay_out
from convert_to_quant.errors import HeaderError

PATH = Path("model.safetensors")


def parse(content: bytes, more_bytes: int = 0):
    """What the reader makes of a file's bytes, and of some more that it does not look at."""
    file_bytes = len(content) + more_bytes
    length = header_length(content[:LENGTH_BYTES], file_bytes, PATH)
    return parse_header(content[LENGTH_BYTES : LENGTH_BYTES + length], file_bytes, PATH)


def framed(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def one(entry: str, data: bytes = b"12345678") -> bytes:
    return framed(b'{"x":' + entry.encode() + b"}", data)


U8 = '{"dtype":"U8","shape":[%s],"data_offsets":[%s]}'

CORRUPT = {
    "nothing at all": (b"", "not a safetensors file: only 0 bytes long (download it again)"),
    "a text file": (b"just some text, and more", "not a safetensors file: it begins with the text 'just som' (a failed download?"),
    "neither text nor a length": (b"\x89PNG\r\n\x1a\n", "not a safetensors file: its first 8 bytes give a header length of "),
    "GGUF": (b"GGUF\x03\0\0\0", "not a safetensors file: this is GGUF (use the model's safetensors file"),
    "a web page": (b"<!DOCTYPE html>", "not a safetensors file: this is a web page (download the file again"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer, not the file itself (run `git lfs"),
    "JSON without a length": (b'{"weight_map": {}}', "not a safetensors file: this is JSON text (the name of a shard index"),
    "a length of zero": (b"\0\0\0\0\0\0\0\0", "its first 8 bytes are 0, as an interrupted download leaves them"),
    "a length too long for the file": (
        b"\x40\0\0\0\0\0\0\0{}", "truncated: the header should be 64 bytes long, but the file ends after 10 bytes (download"),
    "a length of 2^63": (
        b"\0\0\0\0\0\0\0\x80{}", "give a header length of 9223372036854775808 bytes; the limit is 100000000"),
    "a length that only the eight bytes before it make too long": (
        b'\x0c\0\0\0\0\0\0\0{"x":1}   ', "truncated: the header should be 12 bytes long, but the file ends after 18"),
    "not JSON": (framed(b"{it is not}"), "the header is not JSON (Expecting property name"),
    "spaces before the brace": (framed(b"  {}"), "the header does not begin with '{'"),
    "a name twice": (
        framed(b'{"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"1"),
        "the header is not JSON (the key 'x' appears twice in one object)"),
    "metadata that is a list": (framed(b'{"__metadata__":[]}'), "__metadata__ must map strings to strings"),
    "metadata of numbers": (framed(b'{"__metadata__":{"a":1}}'), "__metadata__ must map strings to strings"),
    "an entry that is no object": (one("[1,2]"), "x: its header entry should be an object, found [1, 2]"),
    "an entry without offsets": (one('{"dtype":"U8","shape":[8]}'), "x: its header entry lacks data_offsets"),
    "an unknown dtype": (one('{"dtype":"F9","shape":[8],"data_offsets":[0,8]}'), "x: unknown dtype 'F9'"),
    "a shape that is a number": (
        one('{"dtype":"U8","shape":8,"data_offsets":[0,8]}'), "x: its shape should be a list of sizes, found 8"),
    "a size that is a bool": (one(U8 % ("true", "0,1"), b"1"), "x: its shape should be a list of sizes, found [True]"),
    "a size of 2^64": (one(U8 % (f"0,{1 << 64}", "0,0"), b""), "x: its shape should be a list of sizes, found [0, 1844"),
    "sizes that no memory holds, beside a zero": (
        one(U8 % (f"0,{1 << 62},4", "0,0"), b""), "x: shape [0, 4611686018427387904, 4] is too large"),
    "33 dimensions": (one(U8 % (",".join("1" * 33), "0,1"), b"1"), "x: it has 33 dimensions; at most 32 are supported"),
    "three offsets": (one(U8 % ("8", "0,4,8")), "x: its data_offsets should be two byte offsets, found [0, 4, 8]"),
    "an offset that is a bool": (one(U8 % ("1", "false,true"), b"1"), "x: its data_offsets should be two byte offsets"),
    "offsets the wrong way round": (one(U8 % ("8", "8,0")), "x: its data_offsets end before they start: [8, 0]"),
    "fewer bytes than the shape takes": (
        one('{"dtype":"F32","shape":[4],"data_offsets":[0,8]}'), "x: shape [4] of F32 needs 16 bytes, but its data_offsets span 8"),
    "half a byte": (one('{"dtype":"F4","shape":[15],"data_offsets":[0,8]}'), "x: shape [15] of F4 does not fill whole bytes"),
    "data cut off": (
        one(U8 % ("16", "0,16")), "x: truncated: bytes 0..16 extend beyond the file's 8 bytes of data (download it again)"),
    "a hole at the beginning": (
        one(U8 % ("4", "4,8")), "x: its data starts at 4, expected 0: it leaves a gap"),
    "overlapping tensors": (
        framed(b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}', b"123456"),
        "y: its data starts at 2, expected 4: it overlaps the previous tensor"),
    "an empty tensor inside another": (
        framed(b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}', b"1234"),
        "y: its data starts at 2, expected 4: it overlaps the previous tensor"),
    "bytes after the last tensor": (one(U8 % ("4", "0,4")), "the tensors end at byte 4 of the data, but the file has 8"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_is_refused_by_its_own_message(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        CheckpointFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


STRICTER = {
    "a name twice", "33 dimensions", "sizes that no memory holds, beside a zero", "half a byte",
    "spaces before the brace",
}  # fmt: skip
"""What the safetensors library may let pass and we do not."""


@pytest.mark.parametrize("name", sorted(CORRUPT.keys() - STRICTER))
def test_the_safetensors_library_refuses_it_as_well(name):
    with pytest.raises((SafetensorError, OverflowError)):
        library_reads(CORRUPT[name][0])


def test_the_longest_header_allowed_is_asked_for_and_one_byte_more_is_not():
    for length, message in ((MAX_HEADER_BYTES, "truncated"), (MAX_HEADER_BYTES + 1, "not a safetensors file")):
        with pytest.raises(HeaderError, match=message):
            header_length(struct.pack("<Q", length), 100, PATH)


def test_metadata_may_be_null():
    text = b'{"__metadata__":null}'
    assert parse(framed(text)) == Header({}, {}, 8 + len(text))


def test_scalars_and_empty_tensors_are_read_and_tensors_come_in_the_order_of_their_data():
    header = parse(
        framed(
            b'{"last":{"dtype":"F32","shape":[],"data_offsets":[3,7]},"empty":{"dtype":"F32","shape":[0,7],'
            b'"data_offsets":[3,3]},"first":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}   ',
            b"1234567",
        )
    )
    assert list(header.tensors) == ["first", "empty", "last"]
    assert header.tensors["last"] == TensorInfo("last", "F32", (), 3, 7)
    assert [(info.elements, info.nbytes) for info in header.tensors.values()] == [(4, 3), (0, 0), (1, 4)]


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")


@given(
    specs=st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 8), max_size=3))),
    metadata=st.dictionaries(names, names),
)  # fmt: skip
def test_what_is_serialized_is_parsed_again_and_the_data_starts_aligned(specs, metadata):
    infos = lay_out({name: Spec(dtype, (8, *shape)) for name, (dtype, shape) in specs.items()})
    header = parse(serialize_header(infos, metadata), infos[-1].stop if infos else 0)
    assert list(header.tensors.values()) == sorted(infos, key=lambda info: (info.start, info.stop))
    assert header.metadata == metadata
    assert header.data_start % 8 == 0


def test_what_a_file_says_at_length_is_cut_in_messages():
    name, dtype = "n" * 100_000, "d" * 100_000
    for entry in ({"dtype": dtype}, {"dtype": dtype, "shape": [], "data_offsets": [0, 0]}, ["x" * 100_000]):
        with pytest.raises(HeaderError) as caught:
            parse(framed(json.dumps({name: entry}).encode()))
        assert len(str(caught.value)) < 1000
        assert caught.value.tensor == name
