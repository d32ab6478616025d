"""A linear layer that reads its weight from a checkpoint when it runs, and computes as a reader of its format does.

A 12B model does not fit a 16 GB GPU in bfloat16. A `CheckpointLinear` refers to rows of the file's own layer: on a CPU
they stay in mapped pages, on a GPU they are the file's own codes, and they are dequantized only while the layer runs.
With weight codes w, weight scale t, input x and input scale s, a quantized layer computes

    q = round(clamp(x / s, ±max))        y = (q · s) (w · t)ᵀ + bias

where q is on the format's input grid. Formats with a static scale take s from the file; others derive it from x per
token or per block (`Format.inputs`). Formats that rotate rotate x first, and w was made from rotated weights. Files
with `pre_quant_scale` multiply x by it before all else. The `Arithmetic` decides how q is computed:

    dequantize       no q: y = x (w · t)ᵀ + bias. What a model computes without hardware for the format; for observing.
    comfyui          in x's own dtype, as ComfyUI on a CPU ("eager"): x · (1 / s), or x / s where s is dynamic.
    comfyui_divide   x / s in float32, as its CUDA and Triton kernels do.
    dynamic_tensor   as comfyui_divide with s = absmax(x) / max. No file can ask ComfyUI for this.
    dynamic_row      the same with one s per token, in any format.

Layers in high precision, and those with `full_precision_matrix_mult`, always use "dequantize" (ComfyUI 0.33 quantizes
inputs of integer formats in spite of that flag). Matmuls are simulated in float32: FP8 values and their products are
exact there, so only the order of summation differs from a tensor core (`benchmarks/fp8_matmul.py`). Products of
integers are summed exactly, as in a reader's int32 (`exact_product`), and scaled afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .. import names
from ..checkpoint import Checkpoint
from ..formats import DEFAULT
from ..formats.int8 import INTEGERS
from ..formats.record import TORCH_NAMES, Packed, Parts, scale_grid, spans
from ..formats.rotation import rotate
from ..layers import Layer, dequantize, read_parts, whole_tiles
from ..lora import LoraMatch, merge_rows

Arithmetic = Literal["dequantize", "comfyui", "comfyui_divide", "dynamic_tensor", "dynamic_row"]
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)

EXACT_TERMS = 1 << 10
"""Number of products of two 8-bit integers that float32 sums exactly: 2¹⁰ · 2⁷ · 2⁷ = 2²⁴."""


def exact_product(codes: Tensor, weight_OI: Tensor) -> Tensor:
    """Multiply 8-bit integers [..., in] and [out, in]: the exact sums, rounded once, float32 [..., out].

    On a GPU its own kernel does so, if it supports the dimensions.
    """
    if codes.device.type == "cuda" and not any(size % 8 for size in weight_OI.shape):
        rows = codes.reshape(-1, codes.shape[-1])
        padded = pad(rows, (0, 0, 0, max(0, 17 - len(rows))))  # the kernel needs more than 16 rows
        return torch._int_mm(padded, weight_OI.t())[: len(rows)].float().reshape(*codes.shape[:-1], -1)
    total = torch.zeros((*codes.shape[:-1], len(weight_OI)), dtype=torch.float64, device=codes.device)
    for part in spans(codes.shape[-1], EXACT_TERMS):
        total += linear(codes[..., part].float(), weight_OI[:, part].float())
    return total.float()


def multiply(codes: Tensor, scale: Tensor, levels: Tensor, weight_scale: Tensor) -> Tensor:
    """The output of a layer without bias, float32 [..., out].

    Inputs are codes [..., in] with a scale, () or [..., 1]; the weight is levels [out, in] with a scale, [1 or out, 1],
    or [out, in] for blocks.
    """
    if codes.is_floating_point() or levels.is_floating_point() or weight_scale.shape[1] > 1:
        return linear(codes.float() * scale, levels.float() * weight_scale)
    return exact_product(codes, levels) * (scale * weight_scale.reshape(-1))


class StoredWeight:
    """Rows of one or more checkpoint layers, as one weight [out, in] that is made when needed.

    Args:
        checkpoint: contains the layers; must stay open.
        pieces: layers and the rows of each, in row order.
        device: of the weight. A CPU reads the file's pages every time; other devices get a copy of the file's bytes.
        keep: keep the finished weight.

    Attributes:
        adapters: added to the layers' weights.
    """

    def __init__(
        self, checkpoint: Checkpoint, pieces: Sequence[tuple[Layer, slice]], device: torch.device, keep: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.pieces = [(layer, slice(*rows.indices(layer.out_features)[:2])) for layer, rows in pieces]
        self.device = device
        self.keep = keep
        self.out_features = sum(rows.stop - rows.start for _, rows in self.pieces)
        self.in_features = self.pieces[0][0].in_features
        self.adapters: LoraMatch | None = None
        self._stored: dict[int, Parts] = {}
        self._kept: dict[torch.dtype, Tensor] = {}

    @property
    def layer(self) -> Layer:
        """The layer of the first row; its config and input scale apply."""
        return self.pieces[0][0]

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes the weight."""
        return self.adapters is not None and any(layer.name in self.adapters.matched for layer, _ in self.pieces)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The real weight [out, in] in `dtype`, rounded once from float32."""
        if dtype in self._kept and not self.adapted:
            return self._kept[dtype]
        parts = [self.part(index).to(dtype) for index in range(len(self.pieces))]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.keep and not self.adapted:
            self._kept[dtype] = weight
        return weight

    def part(self, index: int) -> Tensor:
        """The real weight of a piece with its adapters, float32 [rows, in]."""
        layer, rows = self.pieces[index]
        if self.device.type == "cpu":
            weight_OI = torch.from_numpy(dequantize(self.checkpoint, layer, rows))
        else:
            weight_OI = self.on_device(index)
        if self.adapters is not None and layer.name in self.adapters.matched:
            merged_OI = merge_rows(self.adapters, layer.name, weight_OI.cpu().numpy(), (rows.start, rows.stop))
            weight_OI = torch.from_numpy(merged_OI).to(self.device)
        return weight_OI

    def on_device(self, index: int) -> Tensor:
        """A piece made from the file's bytes on the device, float32 [rows, in]."""
        levels, scale, factors = self.multiplied(index)
        weight_OI = rotate(levels.float() * scale, self.pieces[index][0].group)
        return weight_OI if factors is None else weight_OI * factors.float()

    def multiplied(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A piece as readers multiply it: levels [rows, in], float32 scales, and factors of inputs, [in] or None."""
        layer, rows = self.pieces[index]
        parts = self._stored.get(index) or self._upload(layer, rows)
        if self.device.type != "cpu":
            self._stored[index] = parts
        factors = parts.get(names.PRE_QUANT_SCALE)
        if isinstance(layer.format, Packed):
            levels, scale = layer.format.decode(parts, layer.config)
            first = rows.start % Packed.ROWS
            own = slice(first, first + rows.stop - rows.start)
            return levels[own], scale[own] if len(scale) > 1 else scale, factors
        scale = parts.get(names.WEIGHT_SCALE, torch.ones((1, 1), device=self.device))
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(layer.block[1], 1)[:, : self.in_features]
        return parts[names.WEIGHT], scale, factors

    def _upload(self, layer: Layer, rows: slice) -> Parts:
        """The file's own tensors of a piece on the device, by suffix."""
        if isinstance(layer.format, Packed):
            read = read_parts(self.checkpoint, layer, whole_tiles(layer, rows.start, rows.stop))
            return {key: part.to(self.device) for key, part in read.items()}
        codes = torch.from_numpy(self.checkpoint.bits(layer.weight.name, rows))
        parts = {names.WEIGHT: codes.view(getattr(torch, TORCH_NAMES[layer.weight.dtype])).to(self.device)}
        if layer.weight_scale is not None:
            scales = self.checkpoint.float32(layer.weight_scale)
            grid = scales.reshape(scale_grid(layer.shape, layer.block))
            per_row = grid[np.arange(rows.start, rows.stop) // layer.block[0]]
            parts[names.WEIGHT_SCALE] = torch.from_numpy(per_row).to(self.device)
        return parts


class CheckpointLinear(nn.Module):
    """A linear layer whose weight stays in a checkpoint, with the attributes of `nn.Linear`.

    Args:
        stored: the weight.
        bias: float32 [out], or None.
        dtype: of inputs and outputs.
        arithmetic: how it computes.
        input_scale: for arithmetics with a static scale; None if its file has none.
        full_precision: use "dequantize" whatever the arithmetic.
    """

    def __init__(
        self,
        stored: StoredWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        arithmetic: Arithmetic = "dequantize",
        input_scale: float | None = 1.0,
        full_precision: bool = False,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.in_features = stored.in_features
        self.out_features = stored.out_features
        self.dtype = dtype
        self.arithmetic: Arithmetic = arithmetic
        self.full_precision = full_precision
        # Models ask a module for the dtype of its parameters. This one is empty, but it has a dtype.
        self.dtype_witness = nn.Parameter(torch.empty(0, dtype=dtype, device=stored.device), requires_grad=False)
        scale = None if input_scale is None else torch.tensor(input_scale, dtype=torch.float32, device=stored.device)
        self.register_buffer("input_scale", scale, False)
        self.register_buffer("bias", None if bias is None else bias.to(stored.device, dtype), False)
        self.input_scale: Tensor | None
        self.bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The real weight [out, in], dequantized on every access."""
        return self.stored.dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """From x [..., in] to [..., out], in the layer's dtype."""
        x = x.to(self.dtype)
        if self.full_precision or self.arithmetic == "dequantize":
            return linear(x, self.stored.dense(self.dtype), self.bias)
        y = torch.cat([self.product(x, index) for index in range(len(self.stored.pieces))], -1)
        if self.bias is None:
            return y.to(self.dtype)
        if (self.stored.layer.format or DEFAULT).input_grid is INTEGERS:  # kernels add it after rounding the output
            return y.to(self.dtype) + self.bias
        return (y + self.bias.float()).to(self.dtype)

    def product(self, x: Tensor, index: int) -> Tensor:
        """From x [..., in] to [..., rows of a piece], without bias."""
        layer = self.stored.pieces[index][0]
        fmt = layer.format or DEFAULT
        levels, weight_scale, factors = self.stored.multiplied(index)
        if factors is not None:
            x = x * factors.to(x.dtype)
        codes, scale = fmt.inputs(rotate(x, layer.group), self.input_scale, self.arithmetic)
        if self.stored.adapted:  # a weight with an adapter has no codes
            weight_OI = self.stored.part(index)
            weight_OI = weight_OI if factors is None else weight_OI / factors.float()
            return linear(codes.float() * scale, rotate(weight_OI, layer.group))
        return multiply(codes, scale, levels, weight_scale)
