"""Builders of tiny checkpoints. They lay files out by hand, so that our own writer is never its own oracle."""

from __future__ import annotations

import difflib
import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from tiny_flux import flux, flux_file, flux_tensors

__all__ = ["flux", "flux_file", "flux_tensors"]

DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "uint8": "U8", "int8": "I8", "int32": "I32",
          "int64": "I64", "bool": "BOOL", "uint16": "U16"}  # fmt: skip

# A busy machine is no reason for a property to fail.
settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("patient")

Tensor = Any
"""A numpy array, or (safetensors dtype, array of its bit patterns)."""


def to_bfloat16(values: Any) -> np.ndarray:
    """Bit patterns (uint16) of the nearest bfloat16, ties to even, of finite values."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp8(values: Any, dtype: str = "F8_E4M3") -> Tensor:
    """A tensor of the FP8 codes nearest to values, by torch's own cast."""
    import torch

    wide = torch.from_numpy(np.asarray(values, np.float32))
    codes = wide.to({"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype])
    return dtype, codes.view(torch.uint8).numpy()


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with its tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        dtype, array = tensor if isinstance(tensor, tuple) else (DTYPES[tensor.dtype.name], tensor)
        content = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(np.shape(array)),
                        "data_offsets": [len(data), len(data) + len(content)]}  # fmt: skip
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def mark(**config: Any) -> np.ndarray:
    """A comfy_quant tensor."""
    return np.frombuffer(json.dumps(config).encode(), np.uint8)


def quantized(
    names: Sequence[str], marking: str, *, shape: tuple[int, int] = (16, 32), input_scale: float | None = 1.0,
    dtype: str = "F8_E4M3", **config: Any,
) -> tuple[dict[str, Tensor], dict[str, str]]:  # fmt: skip
    """Tensors and metadata of FP8 layers, each marked as "header", "tensor", "both", "legacy", or "none".

    Weights are reproducible finite codes, the weight scale of layer i is 0.5 + i. A legacy file still needs its marker.
    """
    form = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    weight_scale, input_key = (
        ("scale_weight", "scale_input") if marking == "legacy" else ("weight_scale", "input_scale")
    )
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        tensors[f"{name}.{weight_scale}"] = np.float32(0.5 + number)
        if input_scale is not None:
            tensors[f"{name}.{input_key}"] = np.float32(input_scale)
        codes = np.random.default_rng(number).integers(0, 0x78, shape).astype(np.uint8)
        tensors[f"{name}.weight"] = (dtype, codes)
        if marking in ("tensor", "both"):
            tensors[f"{name}.comfy_quant"] = mark(format=form, **config)
    metadata = {}
    if marking in ("header", "both"):
        layers = {name: {"format": form, **config} for name in names}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return tensors, metadata


@pytest.fixture(scope="session")
def build():
    """The builders of this file."""
    return SimpleNamespace(to_bfloat16=to_bfloat16, fp8=fp8, file_bytes=file_bytes, mark=mark, quantized=quantized)


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint into the test's folder: save("name.safetensors", tensors, metadata)."""

    def save(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        path = tmp_path / name
        path.write_bytes(file_bytes(tensors, metadata))
        return path

    return save


@pytest.fixture
def save_shards(tmp_path):
    """Write shards and their index: save_shards("name", [tensors, tensors], metadata) gives the index's path."""

    def save_shards(
        stem: str, shards: Sequence[Mapping[str, Tensor]], metadata: Mapping[str, str] | None = None
    ) -> Path:
        weight_map = {}
        for number, tensors in enumerate(shards, 1):
            name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            (tmp_path / name).write_bytes(file_bytes(tensors, metadata))
            weight_map |= dict.fromkeys(tensors, name)
        path = tmp_path / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
        return path

    return save_shards


@pytest.fixture
def statistics():
    """statistics({layer: shape}, absmax): what layers saw that received rows of absmax · number of the layer.

    Or of {layer: absmax}; other layers saw nothing.
    """
    import torch

    from convert_to_quant.recorder import Recording

    def make(shapes: Mapping[str, tuple[int, int]], absmax: float | Mapping[str, float] = 1.0, rows: int = 4) -> Any:
        recording = Recording(shapes, {name: [name] for name in shapes})
        for number, (name, (_, in_features)) in enumerate(shapes.items()):
            value = absmax.get(name) if isinstance(absmax, Mapping) else absmax * (number + 1)
            if value is not None:
                recording.observe(number, torch.full((1, rows, in_features), value))
        return recording.statistics(samples=1, engine="a test")

    return make


@pytest.fixture
def golden():
    """Compare a screen with the golden one of a name, or write it: golden(name, screen)."""

    def compare(name: str, shown: str) -> None:
        path = Path(__file__).parent / "golden" / f"{name.replace(' ', '_')}.txt"
        if os.environ.get("GOLDEN") == "write":
            path.write_text(shown, encoding="utf-8")
        wanted = path.read_text(encoding="utf-8") if path.exists() else ""
        difference = difflib.unified_diff(wanted.splitlines(), shown.splitlines(), str(path), "now", lineterm="")
        assert shown == wanted, "\n".join(["GOLDEN=write writes it anew", *difference])

    return compare


class Terminal(io.StringIO):
    """A stream that a person seems to look at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal():
    """What makes such streams."""
    return Terminal
