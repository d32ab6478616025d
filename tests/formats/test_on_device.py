"""Weights on a device: the same bytes as band by band on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.errors import TensorError
from convert_to_quant.formats import FORMATS, WRITTEN
from convert_to_quant.formats.record import Packed
from convert_to_quant.layers import find_layers
from convert_to_quant.options import ConvertOptions
from convert_to_quant.quantize import quantize_weight

GRIDS = [name for name in WRITTEN if not isinstance(FORMATS[name], Packed)]
CPU = torch.device("cpu")


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def source(request, tmp_path):
    """A weight [320, 768] with a row and a part of zeros, and one with a large value."""
    weight = 0.03 * torch.randn(320, 768, generator=torch.Generator().manual_seed(3))
    weight[3], weight[5, :200], weight[200, 7] = 0, -0.0, 40
    path = tmp_path / "in.safetensors"
    save_file({"blocks.0.mlp.weight": weight.to(request.param)}, path)
    return path


def quantized(path: Path, name: str, device: torch.device | None, **options: str) -> dict[str, bytes]:
    """The bytes of each tensor that a layer becomes."""
    made: dict[str, bytearray] = {}

    def sink(suffix: str, data: object, start: int) -> None:
        part = bytes(memoryview(data).cast("B"))  # type: ignore[arg-type]
        tensor = made.setdefault(suffix, bytearray())
        assert start == len(tensor)
        tensor += part

    with open_checkpoint(path) as checkpoint:
        layer = find_layers(checkpoint).plain["blocks.0.mlp"]
        chosen = ConvertOptions(block_size=100, **options)  # type: ignore[arg-type]
        quantize_weight(checkpoint, layer, FORMATS[name], chosen, sink, device=device)
    return {suffix: bytes(data) for suffix, data in made.items()}


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("name", GRIDS)
def test_a_weight_on_a_device_becomes_the_same_bytes(source, name, method):
    if method == "mse" and name not in ("fp8", "int8-tensor"):
        pytest.skip("searches 320 rows one by one")
    assert quantized(source, name, CPU, weight_scale=method) == quantized(source, name, None, weight_scale=method)


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4", "mxfp8", "w6a8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("device", [CPU, None])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, name, bad, device):
    weight = torch.ones(256, 256)
    weight[200, 3] = bad
    save_file({"blocks.0.mlp.weight": weight}, tmp_path / "in.safetensors")
    with pytest.raises(TensorError, match="NaN or infinite"):
        quantized(tmp_path / "in.safetensors", name, device)


def test_threads_of_torch_are_as_many_afterwards(source, tmp_path):
    before = torch.get_num_threads()
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, plan_conversion(checkpoint, ConvertOptions(format="nvfp4")), tmp_path / "out.safetensors")
    assert torch.get_num_threads() == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", WRITTEN)
def test_a_gpu_makes_the_bytes_that_a_cpu_makes(source, tmp_path, name):
    made = {}
    for device in ("cpu", "cuda"):
        with open_checkpoint(source) as checkpoint:
            plan = plan_conversion(checkpoint, ConvertOptions(format=name))
            convert(checkpoint, plan, tmp_path / "out.safetensors", device=device)
        made[device] = load_file(tmp_path / "out.safetensors")
    assert made["cpu"].keys() == made["cuda"].keys()
    for key, wanted in made["cpu"].items():
        one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (wanted, made["cuda"][key]))
        if FORMATS[name].group({}):  # sums of a rotation have another order there
            assert (one != other).float().mean() < (0.3 if wanted.dtype == torch.float32 else 0.01), key
        else:
            assert torch.equal(one, other), key
