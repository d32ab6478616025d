"""A linear layer that reads its weight from a checkpoint when it runs, and computes as a reader of its format would.

Why it exists. A 12B model does not fit a 16 GB card in bfloat16, and a checkpoint should not be copied into memory to
be watched. `CheckpointLinear` holds on to rows of the file's own layer: on a CPU they stay in mapped pages, on a GPU
as the file's own codes (one byte each), and they become numbers only while the layer runs.

Maths. With weight codes w, weight scale t, input x and input scale s, a quantized layer computes

    q = round(clamp(x / s, ±max))        y = (q · s) (w · t)ᵀ + bias

where q lies on the format's input grid. Where the format has a static scale, s is the file's; else it is absmax / max
of each row of x.

How q comes about is the `Arithmetic`:
    dequantize       no q: y = x (w · t)ᵀ + bias. What a model computes without hardware for it; used for watching.
    comfyui          in x's own dtype, as ComfyUI does on a CPU ("eager"): x · (1 / s), or x / s where s is dynamic.
    comfyui_divide   x / s in float32, as its CUDA and Triton kernels do.
    dynamic_tensor   as comfyui_divide with s = absmax(x) / max. No file can ask ComfyUI for this.
    dynamic_row      the same with one s per row, in any format.
A layer that the file holds in high precision, or marks `full_precision_matrix_mult`, is computed as by "dequantize".

FP8 products are simulated in float32: values and their products are exact there, so only the order of summation differs
from a tensor core's. `fp8_matmul=True` uses the real one (`torch._scaled_mm`) where the layer allows it. Products of
whole numbers add up exactly, as they do in a reader's int32 (`exact_product`), and scales come after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..checkpoint import Checkpoint
from ..formats import DEFAULT
from ..formats.record import Format, scale_grid, spans
from ..layers import Layer, dequantize
from ..lora import LoraMatch

Arithmetic = Literal["dequantize", "comfyui", "comfyui_divide", "dynamic_tensor", "dynamic_row"]
ARITHMETICS: tuple[Arithmetic, ...] = get_args(Arithmetic)

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What the bytes of a weight in high precision are, by the spelling of a safetensors header."""

EXACT_TERMS = 1 << 10
"""Products of two 8-bit integers that float32 adds up exactly: 2¹⁰ · 2⁷ · 2⁷ = 2²⁴."""


def quantize_inputs(x: Tensor, static: Tensor, fmt: Format, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Codes of a layer's inputs.

    Args:
        x: [..., in].
        static: the layer's input scale, float32 ().
        fmt: of the layer.
        arithmetic: any but "dequantize".

    Returns:
        Codes like x, and the float32 scale that they carry, () or [..., 1].
    """
    grid = fmt.input_grid
    assert grid is not None, fmt.name
    own = arithmetic == "comfyui"
    if not fmt.dynamic and arithmetic in ("comfyui", "comfyui_divide"):
        scale = static
        scaled = x * (1.0 / scale).to(x.dtype) if own else x.float() / scale
    else:
        absmax = x.abs().amax() if arithmetic == "dynamic_tensor" else x.abs().amax(-1, keepdim=True)
        scale = torch.where(absmax > 0, (absmax.float() / grid.max).clamp(min=fmt.least_scale), fmt.zero_scale)
        divisor = scale.to(x.dtype) if own else scale
        scaled = (x if own else x.float()) / torch.where(divisor == 0, torch.finfo(divisor.dtype).tiny, divisor)
    dtype: torch.dtype = getattr(torch, grid.name)
    if dtype.is_floating_point:
        return scaled.clamp(-grid.max, grid.max).to(dtype), scale
    return scaled.round().clamp(torch.iinfo(dtype).min, grid.max).to(dtype), scale


def exact_product(codes: Tensor, weight_OI: Tensor) -> Tensor:
    """Products of 8-bit integers, summed exactly.

    Args:
        codes: [..., in].
        weight_OI: [out, in].

    Returns:
        float32 [..., out]: the exact sums, rounded once.
    """
    total = torch.zeros((*codes.shape[:-1], len(weight_OI)), dtype=torch.float64, device=codes.device)
    for part in spans(codes.shape[-1], EXACT_TERMS):
        total += linear(codes[..., part].float(), weight_OI[:, part].float())
    return total.float()


class StoredWeight:
    """Rows of one or more checkpoint layers, as one weight [out, in] that is made when asked for.

    Args:
        checkpoint: where they are; must stay open.
        pieces: layers and the rows taken of each, in row order.
        device: where the weight is needed. On a CPU the file's pages are read each time, elsewhere the file's bytes
            are copied to the device once.
        keep: hold on to the finished weight.

    Attributes:
        adapters: what is added to the layers' weights.
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
        self._stored: list[tuple[Tensor, Tensor | None]] = []
        self._kept: dict[torch.dtype, Tensor] = {}

    @property
    def layer(self) -> Layer:
        """The layer of the first row; marks and input scale are its."""
        return self.pieces[0][0]

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes it."""
        return self.adapters is not None and any(layer.name in self.adapters.matched for layer, _ in self.pieces)

    @property
    def scaled_by_row(self) -> bool:
        """Whether one scale serves each whole row, so that it can follow the product."""
        return all(layer.weight_scale is not None and layer.granularity != "block" for layer, _ in self.pieces)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The real weight.

        Returns:
            [out, in] in `dtype`, rounded once from float32.
        """
        if dtype in self._kept and not self.adapted:
            return self._kept[dtype]
        parts = [self._part(index).to(dtype) for index in range(len(self.pieces))]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.keep and not self.adapted:
            self._kept[dtype] = weight
        return weight

    def _part(self, index: int) -> Tensor:
        layer, rows = self.pieces[index]
        weight_OI = self._read_pages(layer, rows) if self.device.type == "cpu" else self.on_device(index)
        if self.adapters is not None and layer.name in self.adapters.matched:
            change_OI = np.zeros(tuple(weight_OI.shape), np.float32)
            self.adapters.add_to(change_OI, layer.name, (rows.start, rows.stop))
            weight_OI += torch.from_numpy(change_OI).to(self.device)
        return weight_OI

    def _read_pages(self, layer: Layer, rows: slice) -> Tensor:
        weight_OI = dequantize(self.checkpoint, layer, rows)
        self.checkpoint.release(layer.weight.name)
        return torch.from_numpy(weight_OI)

    def on_device(self, index: int) -> Tensor:
        """A piece made of the file's bytes on the device, float32 [rows, in]."""
        codes_OI, scale = self.stored()[index]
        weight_OI = codes_OI.float()
        if scale is not None:
            block_in = self.pieces[index][0].block[1]
            if scale.shape[1] > 1:
                scale = scale.repeat_interleave(block_in, 1)[:, : self.in_features]
            weight_OI *= scale
        return weight_OI

    def stored(self) -> list[tuple[Tensor, Tensor | None]]:
        """The file's own values and scales on the device, per piece: [rows, in] and [rows, blocks per row] or None."""
        if self.device.type == "cpu":
            return [self._upload(layer, rows) for layer, rows in self.pieces]
        if not self._stored:
            self._stored = [self._upload(layer, rows) for layer, rows in self.pieces]
        return self._stored

    def _upload(self, layer: Layer, rows: slice) -> tuple[Tensor, Tensor | None]:
        codes = torch.from_numpy(np.array(self.checkpoint.bits(layer.weight.name)[rows]))
        dtype = TORCH_DTYPES[layer.weight.dtype] if layer.format is None else getattr(torch, layer.format.codes.name)
        codes_OI = codes.view(dtype).to(self.device)
        self.checkpoint.release(layer.weight.name)
        if layer.weight_scale is None:
            return codes_OI, None
        scales = self.checkpoint.float32(layer.weight_scale)
        grid = scales.reshape(scale_grid(layer.shape, layer.block))
        per_row = grid[np.arange(rows.start, rows.stop) // layer.block[0]]
        return codes_OI, torch.from_numpy(per_row).to(self.device)


class CheckpointLinear(nn.Module):
    """A linear layer whose weight stays in a checkpoint. Quacks like `nn.Linear`.

    Args:
        stored: the weight.
        bias: float32 [out], or None.
        dtype: of inputs and outputs.
        arithmetic: how it computes.
        input_scale: scale of its input, for arithmetics with a static one.
        full_precision: compute as by "dequantize" whatever the arithmetic.
        fp8_matmul: multiply in FP8 on a CUDA device where the shapes allow it, instead of simulating that.
    """

    def __init__(
        self,
        stored: StoredWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        *,
        arithmetic: Arithmetic = "dequantize",
        input_scale: float = 1.0,
        full_precision: bool = False,
        fp8_matmul: bool = False,
    ) -> None:
        super().__init__()
        self.stored = stored
        self.in_features = stored.in_features
        self.out_features = stored.out_features
        self.dtype = dtype
        self.arithmetic: Arithmetic = arithmetic
        self.full_precision = full_precision
        self.fp8_matmul = fp8_matmul
        # Models ask a module for the dtype of its parameters. This one is empty, but it has a dtype.
        self.dtype_witness = nn.Parameter(torch.empty(0, dtype=dtype, device=stored.device), requires_grad=False)
        self.register_buffer("input_scale", torch.tensor(input_scale, dtype=torch.float32, device=stored.device), False)
        self.register_buffer("bias", None if bias is None else bias.to(stored.device, dtype), False)
        self.input_scale: Tensor
        self.bias: Tensor | None

    def extra_repr(self) -> str:
        """As of `nn.Linear`, with the layer's name in the checkpoint."""
        return f"{self.stored.layer.name}, in_features={self.in_features}, out_features={self.out_features}"

    @property
    def weight(self) -> Tensor:
        """The real weight [out, in], made anew on every read."""
        return self.stored.dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """From x [..., in] to [..., out], in the layer's dtype."""
        x = x.to(self.dtype)
        if self.full_precision or self.arithmetic == "dequantize":
            return linear(x, self.stored.dense(self.dtype), self.bias)
        codes, scale = quantize_inputs(x, self.input_scale, self.stored.layer.format or DEFAULT, self.arithmetic)
        if self.fp8_matmul and scale.ndim == 0 and self.fits_fp8_matmul():
            return self._scaled_matmul(codes, scale)
        if not codes.is_floating_point() and not self.stored.adapted and self.stored.scaled_by_row:
            return self._integer_matmul(codes, scale)
        y = linear(codes.float() * scale, self.stored.dense(torch.float32))
        return (y if self.bias is None else y + self.bias.float()).to(self.dtype)

    def _integer_matmul(self, codes: Tensor, scale: Tensor) -> Tensor:
        parts = [exact_product(codes, weight_OI) * (scale * weight_scale.reshape(-1))
                 for weight_OI, weight_scale in self.stored.stored() if weight_scale is not None]  # fmt: skip
        y = torch.cat(parts, -1).to(self.dtype)
        return y if self.bias is None else y + self.bias

    def fits_fp8_matmul(self) -> bool:
        """Whether the device can multiply this layer's codes as they are."""
        sides, fmt = (self.in_features, self.out_features), self.stored.layer.format
        return (
            self.stored.device.type == "cuda"
            and not self.stored.adapted
            and len(self.stored.pieces) == 1
            and fmt is not None
            and not fmt.dynamic
            and bool(fmt.cards)
            and self.stored.layer.granularity == "tensor"
            and not any(side % fmt.side_multiple for side in sides)
        )

    def _scaled_matmul(self, codes: Tensor, scale: Tensor) -> Tensor:
        weight_OI, weight_scale = self.stored.stored()[0]
        assert weight_scale is not None
        # The kernel adds a bias only to 16-bit results.
        fuses_bias = self.bias is not None and self.dtype != torch.float32
        y: Tensor = torch._scaled_mm(
            codes.reshape(-1, self.in_features),
            weight_OI.t(),
            scale_a=scale.reshape(()),
            scale_b=weight_scale[0, 0].reshape(()),
            bias=self.bias if fuses_bias else None,
            out_dtype=self.dtype,
        )
        if self.bias is not None and not fuses_bias:
            y = y + self.bias
        return y.reshape(*codes.shape[:-1], self.out_features)
