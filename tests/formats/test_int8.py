"""INT8 from the weight to the product, bit for bit that of comfy-kitchen's eager backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from convert_to_quant import quantize as quantize_module
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines.quantized_linear import Arithmetic, CheckpointLinear, StoredWeight, exact_product
from convert_to_quant.formats import FORMATS
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import ConvertOptions

NAME = "blocks.0.linear"
SHAPE = (48, 1100)
"""More columns than float32 adds up exactly at once, and a side that is no multiple of 8."""
GRID = FORMATS["int8"].codes
both = pytest.mark.parametrize(("form", "per_row"), [("int8", True), ("int8-tensor", False)])
float_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture
def kitchen() -> Any:
    """comfy-kitchen's eager quantizers."""
    return pytest.importorskip("comfy_kitchen.backends.eager.quantization")


def weights(dtype: torch.dtype) -> Tensor:
    """Rows of many magnitudes, one of zeros, one that is tiny, and ties."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 0, SHAPE[0])[:, None]
    weight[3], weight[4] = 0, 1e-33
    weight[5] = torch.arange(SHAPE[1]) % 255 / 2 - 63.5
    return weight.to(dtype)


def converted(folder: Path, weight: Tensor, **options: Any) -> dict[str, Tensor]:
    safetensors.torch.save_file({f"{NAME}.weight": weight}, folder / "in.safetensors")
    with open_checkpoint(folder / "in.safetensors") as checkpoint:
        convert(checkpoint, plan_conversion(checkpoint, ConvertOptions(**options)), folder / "out.safetensors")
    return safetensors.torch.load_file(folder / "out.safetensors")


@float_dtypes
@both
@pytest.mark.parametrize("band_values", [quantize_module.BAND_VALUES, 7 * SHAPE[1]])
def test_weights_are_those_of_comfy_kitchen_bit_for_bit(
    *, tmp_path: Path, monkeypatch: Any, kitchen: Any, dtype: torch.dtype, form: str, per_row: bool, band_values: int
) -> None:
    monkeypatch.setattr(quantize_module, "BAND_VALUES", band_values)
    weight = weights(dtype)
    quantize = kitchen.quantize_int8_rowwise if per_row else kitchen.quantize_int8_tensorwise
    codes, scale = quantize(weight.float())
    read = converted(tmp_path, weight, format=form)
    assert torch.equal(read[f"{NAME}.weight"], codes)
    assert (read[f"{NAME}.weight_scale"].shape, scale.shape) == (((48, 1),) * 2 if per_row else ((),) * 2)
    assert torch.equal(read[f"{NAME}.weight_scale"], scale)
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        layer = find_layers(checkpoint).quantized[NAME]
        real = kitchen.dequantize_int8_simple(codes, scale)
        np.testing.assert_array_equal(dequantize(checkpoint, layer), real.numpy())


@both
def test_a_file_says_all_that_readers_need_and_nothing_more(tmp_path: Path, form: str, per_row: bool) -> None:
    read = converted(tmp_path, weights(torch.bfloat16), format=form)
    assert set(read) == {f"{NAME}.{suffix}" for suffix in ("weight", "weight_scale", "comfy_quant")}
    assert json.loads(read[f"{NAME}.comfy_quant"].numpy().tobytes()) == {"format": "int8_tensorwise"}
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        layer = find_layers(checkpoint).quantized[NAME]
    assert (layer.granularity, layer.dynamic, layer.static) == ("row" if per_row else "tensor", True, False)


@pytest.mark.parametrize("form", ["int8", "int8-tensor"])
def test_mse_scales_are_never_worse_and_clip_where_that_is_better(tmp_path: Path, form: str) -> None:
    weight = torch.full((16, 64), 1.03)
    weight[:, 0] = 2.0

    def error(**options: Any) -> float:
        converted(tmp_path, weight, format=form, **options)
        with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
            real = dequantize(checkpoint, find_layers(checkpoint).quantized[NAME])
        return float(np.square(real - weight.numpy()).sum())

    assert error(weight_scale="mse") < error() / 2


def test_codes_are_the_nearest_whole_numbers_ties_to_even() -> None:
    numbers = np.float32([-200, -127.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.6, 127.4, np.inf])
    assert GRID.encode(numbers).tolist() == [-128, -128, -2, 0, 0, 2, 2, 127, 127, 127]
    codes = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(GRID.decode(codes), codes.astype(np.float32))
    assert (GRID.levels.tolist(), GRID.largest_rounded) == (list(range(128)), 127.5)


def layer_of(folder: Path, dtype: torch.dtype, arithmetic: Arithmetic, form: str = "int8") -> CheckpointLinear:
    converted(folder, weights(torch.bfloat16), format=form)
    checkpoint = open_checkpoint(folder / "out.safetensors")
    layer = find_layers(checkpoint).quantized[NAME]
    pieces = [(layer, slice(8, 48)), (layer, slice(0, 8))]
    stored = StoredWeight(checkpoint, pieces, torch.device("cpu"))
    return CheckpointLinear(stored, torch.linspace(-1, 1, SHAPE[0]), dtype, arithmetic=arithmetic)


def inputs(dtype: torch.dtype) -> Tensor:
    x = torch.randn((2, 5, SHAPE[1]), generator=torch.Generator().manual_seed(1))
    x[0, 0] *= 1e3
    x[1, 2] = 0
    return x.to(dtype)


@float_dtypes
@both
def test_products_are_those_of_comfy_kitchen_bit_for_bit(
    *, tmp_path: Path, kitchen: Any, dtype: torch.dtype, form: str, per_row: bool
) -> None:
    linear, x = layer_of(tmp_path, dtype, "comfyui", form), inputs(dtype)
    quantize = kitchen.quantize_int8_rowwise if per_row else kitchen.quantize_int8_tensorwise
    codes, scale = quantize(weights(torch.bfloat16).float())
    order = [*range(8, 48), *range(8)]
    expected = kitchen.int8_linear(x, codes[order], scale[order] if per_row else scale, linear.bias, dtype)
    assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("arithmetic", ["comfyui_divide", "dynamic_row"])
def test_kernels_divide_inputs_in_float32(tmp_path: Path, arithmetic: Arithmetic) -> None:
    linear, x = layer_of(tmp_path, torch.bfloat16, arithmetic), inputs(torch.bfloat16)
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)
    codes = (x.float() / scale).round()
    assert codes.abs().max() == 127
    exact = codes.double() @ linear.stored.dense(torch.float64).T * scale + linear.bias.double()
    assert torch.allclose(linear(x).double(), exact, rtol=2**-6, atol=2**-6)
    assert not torch.equal(linear(x), layer_of(tmp_path, torch.bfloat16, "comfyui")(x))


def test_sums_of_products_are_exact_where_float32_would_round() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(100, 128, (3, 20_000), generator=generator).to(torch.int8)
    weight = torch.randint(100, 128, (5, 20_000), generator=generator).to(torch.int8)
    exact = codes.int() @ weight.int().T
    assert int(exact.max()) > 1 << 24
    assert torch.equal(exact_product(codes, weight), exact.float())


def test_an_adapter_is_added_to_the_real_weight(tmp_path: Path) -> None:
    linear, x = layer_of(tmp_path, torch.float32, "comfyui_divide"), inputs(torch.float32)
    before = linear(x)

    class Ones:
        matched = (NAME,)

        @staticmethod
        def add_to(change: Any, _name: str, _rows: Any) -> None:
            change += 1

    linear.stored.adapters = Ones()  # type: ignore[assignment]
    rounded = (x / (scale := x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127)).round() * scale
    expected = before + rounded.sum(-1, keepdim=True)
    assert torch.allclose(linear(x), expected, rtol=1e-5, atol=1e-3)


# the command line


@pytest.fixture
def flux(save: Callable[..., Path]) -> Path:
    random = np.random.default_rng(0)
    return save("in.safetensors", {
        "blocks.0.linear.weight": random.standard_normal((32, 48)).astype(np.float32),
        "blocks.1.linear.weight": random.standard_normal((32, 48)).astype(np.float32),
    })  # fmt: skip


def test_actcal_has_nothing_to_calibrate_and_says_so_in_a_line(flux: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "out.safetensors")
    assert main(["-i", str(flux), "-o", out, "--format", "int8", "--actcal"]) == 0
    said = capsys.readouterr()
    assert "note: nothing to calibrate: readers of INT8 layers scale inputs as they come\n" in said.err
    assert "2 of 2 linear layers to int8_tensorwise" in said.out + said.err
    before = Path(out).read_bytes()
    for target in (["--in-place"], ["-o", str(tmp_path / "more.safetensors")]):
        assert main(["-i", out, "--actcal", *target]) == 1
        said = capsys.readouterr()
        nothing = "nothing to calibrate: readers of its INT8 layers scale inputs as they come"
        assert said.err.startswith(f"error: {out}: {nothing} (convert_to_quant inspect out.safetensors says how")
    assert Path(out).read_bytes() == before


def test_actcal_calibrates_the_layers_of_a_mix_that_have_a_static_scale(
    flux: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out.safetensors"
    words = ["-i", str(flux), "-o", str(out), "--format", "int8", "--layer-format", "blocks.0=nvfp4"]
    assert main([*words, "--actcal", "--actcal-engine", "layer"]) == 0
    assert "calibrated 1 of 1 layers by guessing from the weights" in capsys.readouterr().err
    with open_checkpoint(out) as checkpoint:
        assert [name for name in checkpoint if name.endswith("input_scale")] == ["blocks.0.linear.input_scale"]
        assert 0 < checkpoint.float32("blocks.0.linear.input_scale") < 1


def test_after_writing_a_line_says_what_reads_the_file(flux: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["-i", str(flux), "-o", str(tmp_path / "out.safetensors"), "--format", "int8"]) == 0
    said = capsys.readouterr().err
    assert "note: INT8 is read by ComfyUI since June 2026 (PR 14636), and fast on Turing and later" in said
    assert "--actcal" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--format", "int9"],
            "no format 'int9' that can be written (one of fp8, fp8-row, fp8-block, int8",
        ),
        (["--format", "awq-w4a16"], "no format 'awq-w4a16' that can be written"),
        (["--format", "int8", "--scaling_mode", "row"], "--scaling_mode is for fp8, and int8 says how it is scaled"),
        (["--format", "int8", "--legacy"], "legacy files hold fp8 only, in all layers"),
        (["--format", "fp8-row", "--legacy"], "legacy files hold fp8 only, in all layers"),
    ],
)
def test_what_does_not_go_together_is_refused(flux: Path, capsys: Any, flags: list[str], message: str) -> None:
    assert main(["-i", str(flux), "--dry-run", *flags]) == 2
    assert message in capsys.readouterr().err


def test_both_ways_to_ask_for_fp8_rows_write_the_same(flux: Path, tmp_path: Path) -> None:
    contents = []
    for flags in (["--format", "fp8-row"], ["--scaling_mode", "row"]):
        assert main(["-i", str(flux), "-o", str(tmp_path / "out.safetensors"), *flags]) == 0
        with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
            contents.append({name: checkpoint.raw(name).tobytes() for name in checkpoint})
    assert contents[0] == contents[1]
