"""Writing input scales into a checkpoint: as a streaming rewrite, or in place with an undo file.

A change sets a layer's input_scale, its full precision, or both, in the layer's own convention: the scale's name, the
comfy_quant tensor and the header entry must agree afterwards. Everything is planned and validated before the first
byte is written.

Rewrite: unchanged data is copied inside the kernel in a few large pieces and stays byte-identical.

In place: possible if every new value fits where the old one is: a float32 scalar for a scale, padded JSON for a
quantization config, whose end a missing scale can take. With the files locked, they are compared with what the change
was planned from. Then the old and the new bytes go into `FILE.undo`, which is on disk before the first write and
removed after the last; `checkpoint.undo` describes the recovery from a crash.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from . import names
from .checkpoint import Checkpoint, Spec, write_bytes
from .checkpoint.header import LENGTH_BYTES, TensorInfo, serialize_header
from .checkpoint.positioned import lock, opened, pread, sync, sync_folder, write_at
from .checkpoint.reader import CheckpointFile, checkpoint_files, identity
from .checkpoint.undo import (
    Edit,
    find_undo,
    interrupted,
    read_undo,
    refuse_undo_name,
    refuse_unrecovered,
    undo_path,
    undo_record,
)
from .errors import CheckpointError, OutputError, TensorError
from .layers import Layer, LayerTable
from .layout import Source, lay_out, write
from .marks import Config, disables_fp8, has_scale_room, mark_beside, take_room, with_full_precision
from .telling import plural


@dataclass(frozen=True)
class LayerChange:
    """A change of one layer; None keeps the current value.

    Attributes:
        input_scale: the new scale, finite and positive.
        full_precision: the new `full_precision_matrix_mult`.
    """

    input_scale: float | None = None
    full_precision: bool | None = None


@dataclass(frozen=True)
class Patch:
    """A planned change.

    Attributes:
        checkpoint: the input.
        tensors: new or changed tensors: name -> (spec, bytes, an existing tensor beside which a new one goes).
        metadata: the header's metadata afterwards.
        notes: for the user.
        seen: the scales and quantization configs that it was planned from: name -> bytes.
    """

    checkpoint: Checkpoint
    tensors: dict[str, tuple[Spec, bytes, str]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seen: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, spec: Spec, data: bytes, near: str) -> None:
        """Set a tensor; a new one goes beside the existing tensor `near`."""
        assert spec.nbytes == len(data)
        self.tensors[name] = (spec, data, near)


def plan_patch(
    checkpoint: Checkpoint,
    table: LayerTable,
    changes: Mapping[str, LayerChange],
    *,
    metadata: Mapping[str, str] | None = None,
    enable_fp8_matmul: bool = False,
) -> Patch:
    """Validate changes, by layer name, and turn them into tensors; `metadata` has header entries to set.

    With `enable_fp8_matmul`, replace a legacy marker of two elements, which disables FP8 matmuls and input scales.

    Raises:
        TensorError: a layer is not quantized or has dynamic inputs, or a scale is not finite and positive.
    """
    patch = Patch(checkpoint, metadata={**checkpoint.metadata, **(metadata or {})})
    scales = (layer.input_scale for layer in table.quantized.values() if layer.input_scale is not None)
    patch.seen.update({name: checkpoint.raw(name).tobytes() for name in (*scales, *table.marks.tensor.found)})
    for name, change in changes.items():
        layer = table.quantized.get(name)
        if layer is None:
            raise TensorError("the file has no quantized layer of this name", path=checkpoint.path, tensor=name)
        if change.input_scale is not None:
            if not layer.static:
                problem = "readers scale its inputs dynamically, so it has no input scale"
                raise TensorError(problem, path=checkpoint.path, tensor=name)
            _set_scale(patch, layer, table.marks.input_scale(name), change.input_scale)
    _set_full_precision(patch, table, changes, enable_fp8_matmul)
    _heed_marker(patch, table, enable_fp8_matmul)
    return patch


def _set_scale(patch: Patch, layer: Layer, name: str, scale: float) -> None:
    with np.errstate(over="ignore"):
        value = np.float32(scale)
    if not (np.isfinite(value) and value > 0):
        problem = f"an input scale must be finite and positive in float32, found {scale}"
        raise TensorError(problem, path=patch.checkpoint.path, tensor=layer.name)
    info = patch.checkpoint.tensors.get(name)
    shape = info.shape if info is not None and info.dtype == "F32" and info.elements == 1 else ()
    patch.put(name, Spec("F32", shape), value.tobytes(), layer.weight.name)


def _set_full_precision(patch: Patch, table: LayerTable, changes: Mapping[str, LayerChange], enable: bool) -> None:
    """Change the full precision of layers in both the header and the comfy_quant tensors."""
    configs: dict[str, Config] = {}
    unmarked = []
    for name, change in changes.items():
        layer = table.quantized[name]
        if not table.marks.kinds(name):
            disabled = layer.full_precision and not enable  # by a legacy marker of two elements
            if change.full_precision and not disabled:
                unmarked.append(name)
        elif change.full_precision is not None and change.full_precision != layer.full_precision:
            configs[name] = with_full_precision(layer.config, change.full_precision)
            for tensor, (spec, data) in table.marks.tensor.changed(name, configs[name]).items():
                patch.put(tensor, spec, data, tensor)
    patch.metadata.update(table.marks.header.changed(configs))
    if unmarked:
        why = "the file has no quantization configs to declare it"
        if table.marks.legacy.marker is not None:
            why = "a legacy file cannot declare it for single layers: convert the original without --legacy"
        patch.notes.append(
            f"{plural(len(unmarked), 'layer')} should compute in full precision (first: {unmarked[0]}), but {why}"
        )


def _heed_marker(patch: Patch, table: LayerTable, enable: bool) -> None:
    """Note the effect of a legacy marker of two elements, or replace it."""
    marker = table.marks.legacy.marker
    if marker is None:
        if enable:
            patch.notes.append("--enable-fp8-matmul: the file has no legacy marker, so there is nothing to enable")
    elif disables_fp8(marker) and any(layer.marking == "legacy" for layer in table.quantized.values()):
        note = (
            f"the marker {marker.name} has 2 elements: ComfyUI computes every layer in full precision and ignores the "
            "input scales; --enable-fp8-matmul changes that"
        )
        if enable:
            patch.put(marker.name, Spec(marker.dtype, (0,)), b"", marker.name)
            note = f"the marker {marker.name} now lets ComfyUI use FP8 matmuls and the input scales"
        patch.notes.append(note)


def rewrite(patch: Patch, output: Path) -> None:
    """Write the patched checkpoint as a new file, or as shards if `output` is an index.

    Raises:
        OutputError: it cannot be written, or is the input.
    """
    checkpoint = patch.checkpoint
    refuse_unrecovered(checkpoint.path, [file.path for file in checkpoint.files])
    made: dict[str, dict[str, tuple[Spec, Source]]] = {}
    for name, (spec, data, near) in patch.tensors.items():
        place = name if name in checkpoint else near
        made.setdefault(place, {place: (Spec.like(checkpoint.tensors[place]), place)})[name] = spec, data
    layout = lay_out(checkpoint, made, (), patch.metadata)
    write(checkpoint, layout, output, hint="name another output, or add --in-place")


def in_place_edits(patch: Patch) -> list[Edit]:
    """The patch as replacements of bytes in place.

    Raises:
        OutputError: a tensor or the header has too little room.
    """
    checkpoint = patch.checkpoint
    edits = []
    contents, added = _placed(patch)
    for name, data in contents.items():
        file, info = checkpoint.file_of(name), checkpoint.tensors[name]
        old = checkpoint.raw(name).tobytes()
        if old != data:
            edits.append(Edit(checkpoint.files.index(file), file.header.data_start + info.start, data, old))
    for number, file in enumerate(checkpoint.files):
        before = file.header.metadata
        # An existing entry is changed in its own files, a new one goes into the first file.
        own = (key for key in patch.metadata if key in before or (number == 0 and key not in checkpoint.metadata))
        metadata = before | {key: patch.metadata[key] for key in own}
        if metadata == before and not added:
            continue
        text = _header_text(file, metadata, added)
        room = file.header.data_start - LENGTH_BYTES
        if len(text) > room and added:
            take_room(metadata, min(len(text) - room, len(text) - len(_header_text(file, metadata))))
            text = _header_text(file, metadata, added)
        if len(text) > room and names.PROVENANCE_KEY in metadata:
            # Provenance is only informative: without room for the new one, keep the old one.
            del metadata[names.PROVENANCE_KEY]
            kept = {key: text for key, text in before.items() if key == names.PROVENANCE_KEY}
            text = _header_text(file, metadata | kept, added)
        if text == _header_text(file, before):
            continue
        if len(text) > room:
            raise _impossible(f"the header has {room} bytes and needs {len(text)}", file.path)
        edits.append(Edit(number, LENGTH_BYTES, text.ljust(room), file.read(LENGTH_BYTES, room).tobytes()))
    return edits


def _impossible(why: str, path: Path, tensor: str | None = None) -> OutputError:
    hint = "write a new file with -o instead"
    return OutputError(f"cannot be changed in place: {why}", path=path, tensor=tensor, hint=hint)


def _placed(patch: Patch) -> tuple[dict[str, bytes], dict[str, TensorInfo]]:
    """Place a patch in the file itself.

    Returns:
        New bytes by existing tensor; and the new header entries of added input scales and of the comfy_quant tensors
        whose ends they take.
    """
    checkpoint = patch.checkpoint
    contents: dict[str, bytes] = {}
    added: dict[str, TensorInfo] = {}
    for name, (spec, data, near) in sorted(patch.tensors.items(), key=lambda item: item[0] not in checkpoint):
        info = checkpoint.tensors.get(name)
        if info is not None:
            if Spec.like(info) != spec:
                there, wanted = f"{info.dtype} {list(info.shape)}", f"{spec.dtype} {list(spec.shape)}"
                raise _impossible(f"it is {there} and must become {wanted}", checkpoint.path, name)
            contents[name] = data
            continue
        mark = mark_beside(checkpoint, near)
        old = b"" if mark is None else contents.get(mark.name) or checkpoint.raw(mark.name).tobytes()
        end = 0 if mark is None else mark.stop - spec.nbytes
        aligned = (checkpoint.file_of(near).header.data_start + end) % spec.nbytes == 0
        if mark is None or checkpoint.sharded or not aligned or not has_scale_room(old):
            checkpoint.refuse_changed()  # another process may have added one
            raise _impossible("the file has no such tensor yet", checkpoint.path, name)
        contents[mark.name] = old[: -spec.nbytes] + data
        added[mark.name] = replace(mark, shape=(end - mark.start,), stop=end)
        added[name] = TensorInfo(name, spec.dtype, spec.shape, end, mark.stop)
    return contents, added


def _header_text(file: CheckpointFile, metadata: Mapping[str, str], added: Mapping[str, TensorInfo] = {}) -> bytes:
    """The JSON of a file's header with new metadata and tensors, without padding."""
    infos = sorted({**file.header.tensors, **added}.values(), key=lambda info: (info.start, info.stop))
    return serialize_header(infos, metadata)[LENGTH_BYTES:].rstrip(b" ")


def apply_in_place(patch: Patch) -> int:
    """Change the checkpoint's own files; returns the number of edits.

    Raises:
        OutputError: an in-place change is impossible, or the files cannot be written. The files are unchanged, unless
            the message says that restoring them failed; then the undo file stays.
    """
    checkpoint = patch.checkpoint
    edits = in_place_edits(patch)
    if not edits:
        return 0
    undo = undo_path(checkpoint.path)
    paths = [Path(os.path.realpath(file.path)) for file in checkpoint.files]
    elsewhere = next((path for path in paths if path.parent != undo.parent), None)
    if elsewhere is not None:
        raise _impossible(f"it is not in the folder of {checkpoint.path.name}", elsewhere)
    with _locked([file.path for file in checkpoint.files]) as fds:
        left = find_undo(checkpoint.path, paths)
        if left is not None:
            raise interrupted(checkpoint.path, left)
        refuse_undo_name(checkpoint.path)
        _refuse_changed(patch, fds)
        write_bytes(undo, undo_record(zip(paths, fds, strict=True), edits), like=os.fstat(fds[0]))
        try:
            _write_all(fds, edits)
        except OSError as error:
            _put_back(fds, edits, undo, error)
            problem = f"cannot be changed in place: {error.strerror}; it is unchanged"
            raise OutputError(problem, path=checkpoint.path) from None
        _remove(undo)
    return len(edits)


def _refuse_changed(patch: Patch, fds: list[int]) -> None:
    """Refuse files that changed since the patch was planned.

    Modification times are as coarse as the system's clock, so headers, scales and quantization configs are compared
    too: other in-place changes touch nothing else.
    """
    for file, fd in zip(patch.checkpoint.files, fds, strict=True):
        start = file.header.data_start
        seen = [(file.header.tensors[name], data) for name, data in patch.seen.items() if name in file.header.tensors]
        same = (
            identity(fd) == file.identity
            and zlib.crc32(pread(fd, start - LENGTH_BYTES, LENGTH_BYTES)) == file.header_crc
            and all(pread(fd, len(data), start + info.start) == data for info, data in seen)
        )
        if not same:
            problem = "it was changed or replaced since it was opened, so nothing was written"
            raise OutputError(problem, path=file.path, hint="run the command again")


def _put_back(fds: list[int], edits: list[Edit], undo: Path, cause: OSError) -> None:
    """Restore the old bytes after a failed change."""
    try:
        _write_all(fds, [edit.undone for edit in edits])
    except OSError:
        problem = f"the change failed ({cause.strerror}), and so did restoring the old bytes, which are in this file"
        raise OutputError(problem, path=undo, hint="the next in-place command restores them first") from None
    _remove(undo)


def _remove(undo: Path) -> None:
    """Remove an undo file after the change."""
    try:
        undo.unlink()
    except OSError as error:
        problem = f"cannot be removed: {error.strerror}; its change counts as interrupted"
        raise OutputError(problem, path=undo, hint="the next in-place command restores the old bytes") from None
    sync_folder(undo.parent)


def recover(path: Path) -> bool:
    """Restore the old bytes after an interrupted in-place change of a file or index, possibly renamed since.

    Returns:
        Whether there was anything to restore.

    Raises:
        OutputError: the undo file is damaged, belongs to other files or another user, or changes weights; the files
            are in use; or the undo file of a change could not have its name.
    """
    paths = checkpoint_files(path)
    if find_undo(path, paths) is None:
        refuse_undo_name(path)
        return False
    with _locked(paths) as fds:
        where = find_undo(path, paths)
        if where is None:
            return False  # the lock's last holder has finished
        edits = read_undo(where).check(paths, fds)
        try:
            _write_all(fds, edits)
        except OSError as error:
            raise OutputError(f"the old bytes cannot be restored: {error.strerror}", path=path) from None
        _remove(where)
    return True


def _write_all(fds: list[int], edits: Iterable[Edit]) -> None:
    """Write edits and flush them to disk."""
    for edit in edits:
        write_at(fds[edit.file], edit.data, edit.offset)
    for fd in fds:
        sync(fd)


@contextlib.contextmanager
def _locked(paths: Sequence[Path]) -> Iterator[list[int]]:
    """Open files for reading and writing, and lock them."""
    fds: list[int] = []
    at = paths[0]
    with contextlib.ExitStack() as stack:
        try:
            for at in paths:
                fds.append(stack.enter_context(opened(at, os.O_RDWR)))
                lock(fds[-1])
            at = paths[0]
            yield fds
        except FileNotFoundError:
            raise CheckpointError("no such file", path=at) from None
        except BlockingIOError:
            problem, hint = "another process is changing this file", "wait until it has finished"
            raise OutputError(problem, path=at, hint=hint) from None
        except OSError as error:
            raise OutputError(f"cannot be changed in place: {error.strerror}", path=at) from None
