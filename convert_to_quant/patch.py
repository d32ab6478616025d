"""Scales into the file: as a streaming rewrite, or in place with an undo file.

A change sets a layer's input_scale, or whether it computes in full precision, or both. What that means for the file
depends on how the layer is marked: the scale's spelling, the comfy_quant tensor, the header entry, which must agree
afterwards. All of it is planned and checked before the first byte is written.

Rewrite: the old data is copied inside the kernel in a few large pieces, the new small tensors stand between them where
their alignment puts them. Everything that was not changed is byte-identical.

In place: possible where every new value fits exactly where the old one stands: a float32 scalar for a scale, JSON with
room behind it for a mark. The old bytes go into `FILE.undo`, on the disk before the first write and removed after the
last. Whoever opens the file for a change next finds an undo file that was left by a crash and puts the old bytes back.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import names
from .checkpoint import Checkpoint, CheckpointWriter, Spec, output_files, refuse_same_file, write_bytes
from .checkpoint.header import LENGTH_BYTES, serialize_header
from .convert import FULL_PRECISION_KEY, PROVENANCE_KEY, mark_bytes, quantization_metadata
from .errors import CheckpointError, OptionError, OutputError, TensorError
from .layers import Layer, LayerTable

UNDO_SUFFIX = ".undo"
_UNDO_FORMAT = 1


@dataclass(frozen=True)
class LayerChange:
    """What to change about one layer; None keeps what is there.

    Attributes:
        input_scale: the new scale, finite and positive.
        full_precision: the new `full_precision_matrix_mult`.
    """

    input_scale: float | None = None
    full_precision: bool | None = None


@dataclass(frozen=True)
class Patch:
    """Changes, turned into tensors and metadata; nothing has been written yet.

    Attributes:
        checkpoint: what is changed.
        tensors: new or changed tensors: name -> (spec, bytes).
        replaced: name of the old tensor that a new one takes the place of, where spec or name differ.
        place: new tensor -> a tensor of the checkpoint whose shard it goes into.
        metadata: the header's metadata afterwards.
        notes: what a user should know.
    """

    checkpoint: Checkpoint
    tensors: dict[str, tuple[Spec, bytes]] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    place: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, spec: Spec, data: bytes, near: str) -> None:
        """Set a tensor, beside another of the checkpoint."""
        assert spec.nbytes == len(data)
        self.tensors[name] = (spec, data)
        self.place[name] = near


def plan_patch(
    checkpoint: Checkpoint,
    table: LayerTable,
    changes: Mapping[str, LayerChange],
    *,
    metadata: Mapping[str, str] | None = None,
    enable_fp8_matmul: bool = False,
) -> Patch:
    """Turn changes into tensors, and check them.

    Args:
        checkpoint: what is changed.
        table: its layers.
        changes: by layer name.
        metadata: header entries to set.
        enable_fp8_matmul: replace a legacy marker of two elements, which turns FP8 products and input scales off.

    Returns:
        The patch.

    Raises:
        TensorError: a change names a layer that is not quantized, or a scale that is not finite and positive.
    """
    patch = Patch(checkpoint, metadata={**checkpoint.metadata, **(metadata or {})})
    for name, change in changes.items():
        layer = table.quantized.get(name)
        if layer is None:
            raise TensorError("no FP8 layer of this name in the file", path=checkpoint.path, tensor=name)
        if change.input_scale is not None:
            _set_scale(patch, layer, change.input_scale)
    _set_full_precision(patch, table, changes)
    if table.marker_disables_fp8:
        _legacy_marker(patch, table, enable_fp8_matmul)
    elif enable_fp8_matmul and table.legacy_marker is None:
        patch.notes.append("--enable-fp8-matmul: the file has no legacy marker, so there was nothing to enable")
    return patch


def _set_scale(patch: Patch, layer: Layer, scale: float) -> None:
    value = np.float32(scale)
    if not (np.isfinite(value) and value > 0):
        raise TensorError(
            f"an input scale should be finite and positive in float32, found {scale}",
            path=patch.checkpoint.path,
            tensor=layer.name,
        )
    name = layer.input_scale
    if name is None:
        legacy = layer.weight_scale is not None and layer.weight_scale.endswith(names.WEIGHT_SCALE_LEGACY)
        name = layer.name + (names.INPUT_SCALE_LEGACY if legacy else names.INPUT_SCALE)
        patch.put(name, Spec("F32", ()), value.tobytes(), layer.weight.name)
        return
    info = patch.checkpoint.tensors[name]
    shape = info.shape if info.dtype == "F32" else ()
    patch.put(name, Spec("F32", shape), value.tobytes(), name)


def _set_full_precision(patch: Patch, table: LayerTable, changes: Mapping[str, LayerChange]) -> None:
    """Change marks where a layer's full precision changes, in the header and the tensors alike."""
    header = patch.metadata.get(names.QUANTIZATION_METADATA)
    in_header = set(json.loads(header)["layers"]) if header is not None else set()
    marks: dict[str, dict[str, Any]] = {}
    unmarked = []
    for name, change in changes.items():
        layer = table.quantized[name]
        if change.full_precision is None or change.full_precision == layer.full_precision:
            continue
        if layer.marking not in ("header", "tensor"):
            unmarked.append(name)
            continue
        config = {key: value for key, value in layer.config.items() if key != FULL_PRECISION_KEY}
        if change.full_precision:
            config[FULL_PRECISION_KEY] = True
        marks[name] = config
        if layer.comfy_quant is not None:
            old_bytes = patch.checkpoint.tensors[layer.comfy_quant].nbytes
            data = mark_bytes(config, old_bytes)
            if len(data) > old_bytes:
                data = mark_bytes(config)
            patch.put(layer.comfy_quant, Spec("U8", (len(data),)), data, layer.comfy_quant)
    if header is not None and marks:
        patch.metadata[names.QUANTIZATION_METADATA] = _changed_header_marks(header, in_header, table.prefix, marks)
    if unmarked:
        patch.notes.append(
            f"{len(unmarked)} layers should compute in full precision, but a file without comfy_quant marks cannot say "
            f"so of single layers (first: {unmarked[0]}); convert the original without --legacy for that"
        )


def _changed_header_marks(header: str, in_header: set[str], prefix: str, marks: Mapping[str, dict[str, Any]]) -> str:
    """The header entry with some marks changed, in the names and, where it fits, the length it had."""
    fields = json.loads(header)
    for name, config in marks.items():
        bare = name[len(prefix) :] if name.startswith(prefix) else name
        key = name if name in in_header or bare not in in_header else bare
        if key in in_header:
            fields["layers"][key] = config
    text = json.dumps(fields)
    return text.ljust(len(header)) if len(text) <= len(header) else quantization_metadata(fields["layers"])


def _legacy_marker(patch: Patch, table: LayerTable, enable: bool) -> None:
    """Say what a marker of two elements does, or replace it."""
    marker = table.legacy_marker
    assert marker is not None
    if not enable:
        patch.notes.append(
            f"the marker {marker.name} has 2 elements: ComfyUI computes every layer in full precision and ignores the "
            "input scales; --enable-fp8-matmul changes that"
        )
        return
    patch.put(marker.name, Spec(marker.dtype, (0,)), b"", marker.name)
    patch.notes.append(f"the marker {marker.name} now lets ComfyUI use FP8 matrix products and the input scales")


def rewrite(patch: Patch, output: Path) -> None:
    """Write the patched checkpoint as a new file, or as new shards where `output` is an index.

    Args:
        patch: the changes.
        output: not one of the input's files.

    Raises:
        OutputError: it cannot be written, or is the input.
    """
    checkpoint = patch.checkpoint
    inputs = [checkpoint.path, *(file.path for file in checkpoint.files)]
    hint = "name another output, or add --in-place"
    refuse_same_file(output, inputs, hint=hint)
    specs = {name: Spec.like(info) for name, info in checkpoint.tensors.items()}
    copied = {name: name for name in specs if name not in patch.tensors}
    specs |= {name: spec for name, (spec, _) in patch.tensors.items()}
    places = {**{name: name for name in copied}, **patch.place}
    files, index = output_files(output, checkpoint, places.__getitem__, specs)
    for path, _ in files:
        refuse_same_file(path, inputs, hint=hint)
    with CheckpointWriter(files, patch.metadata, index) as writer:
        writer.copy(checkpoint, copied)
        for name, (_, data) in patch.tensors.items():
            writer.write(name, data)


@dataclass(frozen=True)
class Edit:
    """New bytes for a place in a file.

    Attributes:
        file: number of the file in `Checkpoint.files`.
        offset: byte position in that file.
        data: what goes there.
    """

    file: int
    offset: int
    data: bytes


def in_place_edits(patch: Patch) -> list[Edit]:
    """The patch as changes of bytes that keep every size.

    Raises:
        OutputError: something would need more room than it has; names the first such tensor.
    """
    checkpoint = patch.checkpoint
    hint = "write a new file with -o instead"
    edits = []
    for name, (spec, data) in patch.tensors.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise OutputError("in place is not possible: the file has no such tensor yet", path=checkpoint.path,
                              tensor=name, hint=hint)  # fmt: skip
        if Spec.like(info) != spec:
            problem = f"in place is not possible: it is {info.dtype} {list(info.shape)}"
            raise OutputError(f"{problem} and must become {spec.dtype} {list(spec.shape)}", path=checkpoint.path,
                              tensor=name, hint=hint)  # fmt: skip
        file = checkpoint.file_of(name)
        if file.raw(info).tobytes() != data:
            edits.append(Edit(checkpoint.files.index(file), file.header.data_start + info.start, data))
    for number, file in enumerate(checkpoint.files):
        metadata = {**file.header.metadata, **{k: v for k, v in patch.metadata.items() if _belongs(k, patch, number)}}
        if metadata == file.header.metadata:
            continue
        text = serialize_header(file.header.tensors.values(), metadata)[LENGTH_BYTES:].rstrip(b" ")
        room = file.header.data_start - LENGTH_BYTES
        if len(text) > room and set(_changed(metadata, file.header.metadata)) == {PROVENANCE_KEY}:
            continue  # how the file was made is worth saying where there is room, but no reason to refuse
        if len(text) > room:
            raise OutputError(
                f"in place is not possible: the header has {room} bytes and needs {len(text)}",
                path=file.path,
                hint=hint,
            )
        edits.append(Edit(number, LENGTH_BYTES, text.ljust(room)))
    return edits


def _changed(new: Mapping[str, str], old: Mapping[str, str]) -> list[str]:
    return [key for key in new if new[key] != old.get(key)]


def _belongs(key: str, patch: Patch, number: int) -> bool:
    """Whether a metadata entry is written into this file: where it is already, else into the first."""
    holders = [i for i, file in enumerate(patch.checkpoint.files) if key in file.header.metadata]
    return number in (holders or [0])


def apply_in_place(patch: Patch) -> int:
    """Change the checkpoint's own files.

    Args:
        patch: the changes.

    Returns:
        The number of places that changed.

    Raises:
        OutputError: not possible in place, or the files cannot be written; they are as they were.
    """
    checkpoint = patch.checkpoint
    edits = in_place_edits(patch)
    if not edits:
        return 0
    with _locked([file.path for file in checkpoint.files]) as fds:
        undo = _undo_path(checkpoint.path)
        if undo.exists():
            raise OutputError(
                "an interrupted change left an undo file; it must be recovered first", path=undo, hint="run again"
            )
        write_bytes(undo, _undo_record(checkpoint, edits, fds))
        _sync_folder(undo.parent)
        try:
            for edit in edits:
                _write_at(fds[edit.file], edit.offset, edit.data)
            for fd in fds:
                os.fsync(fd)
        except OSError as error:
            raise OutputError(
                f"the change failed ({error.strerror}); the old bytes are in {undo.name} and come back with the next "
                "change",
                path=checkpoint.path,
            ) from None
        undo.unlink()
    return len(edits)


def _undo_path(path: Path) -> Path:
    return path.with_name(path.name + UNDO_SUFFIX)


def _undo_record(checkpoint: Checkpoint, edits: Iterable[Edit], fds: list[int]) -> bytes:
    """The old bytes, with what it takes to know the files again; the first line is a checksum of the second."""

    def old(edit: Edit) -> str:
        return base64.b64encode(os.pread(fds[edit.file], len(edit.data), edit.offset)).decode("ascii")

    files = zip(checkpoint.files, fds, strict=True)
    record = {
        "format": _UNDO_FORMAT,
        "files": [{"name": file.path.name, "bytes": os.fstat(fd).st_size} for file, fd in files],
        "edits": [[edit.file, edit.offset, old(edit)] for edit in edits],
    }
    body = json.dumps(record).encode("ascii")
    return f"{zlib.crc32(body):08x}\n".encode("ascii") + body


def recover(path: Path) -> bool:
    """Put back what an interrupted in-place change left half done.

    Args:
        path: the checkpoint that was changed: a file, or an index.

    Returns:
        Whether there was anything to put back.

    Raises:
        OutputError: the undo file is damaged or does not belong to these files, or they are in use.
    """
    undo = _undo_path(path)
    try:
        checksum, _, body = undo.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return False
    if checksum != f"{zlib.crc32(body):08x}".encode("ascii"):
        raise OutputError("the undo file is damaged, so nothing was put back", path=undo, hint="see what is in it")
    record = json.loads(body)
    files = [path.parent / file["name"] for file in record["files"]]
    with _locked(files) as fds:
        for file, fd, known in zip(files, fds, record["files"], strict=True):
            if os.fstat(fd).st_size != known["bytes"]:
                raise OutputError(f"the undo file {undo.name} belongs to a file of another size", path=file)
        for number, offset, data in record["edits"]:
            _write_at(fds[number], offset, base64.b64decode(data))
        for fd in fds:
            os.fsync(fd)
        undo.unlink()
    return True


def _write_at(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system lets one."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _locked(paths: Iterable[Path]) -> Iterator[list[int]]:
    """Open files for reading and writing, with nobody else changing them meanwhile."""
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fds.append(os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
                _lock(fds[-1])
            except FileNotFoundError:
                raise CheckpointError("no such file", path=path) from None
            except BlockingIOError:
                raise OutputError("another process is changing this file", path=path, hint="wait for it") from None
            except OSError as error:
                raise OutputError(f"cannot be changed in place: {error.strerror}", path=path) from None
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _lock(fd: int) -> None:
    """Take the file for ourselves, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_in_place(checkpoint: Checkpoint, output: Path | None) -> None:
    """Refuse options that contradict in-place work.

    Raises:
        OptionError: an output was named that is not the input.
    """
    if output is not None and output.resolve() != checkpoint.path.resolve():
        raise OptionError(f"--in-place changes {checkpoint.path}; leave -o out, or drop --in-place to write {output}")
