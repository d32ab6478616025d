"""Lazy reading and atomic writing of safetensors checkpoints."""

from .header import Header, TensorInfo, serialize_header, tensor_nbytes
from .reader import ALL_ROWS, INDEX_SUFFIX, Checkpoint, open_checkpoint, to_float32
from .writer import (
    CheckpointWriter,
    Entry,
    Spec,
    check_output,
    is_left_over,
    is_one_file,
    output_files,
    refuse_same_file,
    rehearse,
    write_bytes,
    write_checkpoint,
)

__all__ = [
    "ALL_ROWS",
    "INDEX_SUFFIX",
    "Checkpoint",
    "CheckpointWriter",
    "Entry",
    "Header",
    "Spec",
    "TensorInfo",
    "check_output",
    "is_left_over",
    "is_one_file",
    "open_checkpoint",
    "output_files",
    "refuse_same_file",
    "rehearse",
    "serialize_header",
    "tensor_nbytes",
    "to_float32",
    "write_bytes",
    "write_checkpoint",
]
