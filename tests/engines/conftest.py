"""Tiny models for the engines' tests, and an independent Flux.1 to hold the engine against."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from convert_to_quant.formats import DEFAULT_GRID

AXES = (4, 6, 6)
HEAD = sum(AXES)


def rotary(ids):
    """Angles of positions [L, 3] -> rotations as complex numbers [L, HEAD / 2]."""
    angles = [ids[:, axis, None] / 10000 ** (torch.arange(0, size, 2) / size) for axis, size in enumerate(AXES)]
    angle = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angle), angle)


def attend(q, k, v, rotation):
    """[B, heads, L, HEAD] each -> [B, L, heads · HEAD]."""

    def turn(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2)

    scores = turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(HEAD)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Scale(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(HEAD))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.scale


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = Scale(), Scale()

    def split(self, qkv):
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class Attention(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden), Norms()


class Modulation(nn.Module):
    def __init__(self, hidden, count):
        super().__init__()
        self.count, self.lin = count, nn.Linear(hidden, count * hidden)

    def forward(self, vector):
        return self.lin(functional.silu(vector))[:, None].chunk(self.count, -1)


class Embedder(nn.Module):
    def __init__(self, size, hidden):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(size, hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.out_layer(functional.silu(self.in_layer(x)))


def normed(x, shift, scale):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def mlp(hidden):
    return nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden))


class Double(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(hidden, 6), Modulation(hidden, 6)
        self.img_attn, self.txt_attn = Attention(hidden), Attention(hidden)
        self.img_mlp, self.txt_mlp = mlp(hidden), mlp(hidden)

    def forward(self, image, text, vector, rotation):
        modulations = {"img": self.img_mod(vector), "txt": self.txt_mod(vector)}
        parts = []
        for stream, x in (("txt", text), ("img", image)):
            shift, scale, *_ = modulations[stream]
            attention = getattr(self, f"{stream}_attn")
            parts.append(attention.norm.split(attention.qkv(normed(x, shift, scale))))
        mixed = attend(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)), rotation)
        results = []
        for stream, x, y in (("img", image, mixed[:, text.shape[1] :]), ("txt", text, mixed[:, : text.shape[1]])):
            _, _, gate, shift, scale, mlp_gate = modulations[stream]
            z = x + gate * getattr(self, f"{stream}_attn").proj(y)
            results.append(z + mlp_gate * getattr(self, f"{stream}_mlp")(normed(z, shift, scale)))
        return results[0], results[1]


class Single(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden
        self.linear1, self.linear2 = nn.Linear(hidden, 7 * hidden), nn.Linear(5 * hidden, hidden)
        self.norm, self.modulation = Norms(), Modulation(hidden, 3)

    def forward(self, x, vector, rotation):
        shift, scale, gate = self.modulation(vector)
        fused = self.linear1(normed(x, shift, scale))
        mixed = attend(*self.norm.split(fused[..., : 3 * self.hidden]), rotation)
        act = functional.gelu(fused[..., 3 * self.hidden :], approximate="tanh")
        return x + gate * self.linear2(torch.cat([mixed, act], -1))


class Final(nn.Module):
    def __init__(self, hidden, channels):
        super().__init__()
        self.linear = nn.Linear(hidden, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))


class ReferenceFlux(nn.Module):
    """Flux.1 as published, on tokens, with the checkpoint's own names and every size free."""

    def __init__(
        self, *, hidden = 2 * HEAD, depth = 2, singles = 2, text = 24, vector = 20,
        channels = 16, guidance = False,
    ):  # fmt: skip
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(channels, hidden), nn.Linear(text, hidden)
        self.time_in, self.vector_in = Embedder(256, hidden), Embedder(vector, hidden)
        if guidance:
            self.guidance_in = Embedder(256, hidden)
        self.double_blocks = nn.ModuleList(Double(hidden) for _ in range(depth))
        self.single_blocks = nn.ModuleList(Single(hidden) for _ in range(singles))
        self.final_layer = Final(hidden, channels)

    def forward(self, image, text, vector, sigma, size):
        """image [B, height · width, channels], text [B, T, text], vector [B, vector] -> as image."""
        height, width = size

        def clock(value):
            angle = 1000 * value * torch.exp(-math.log(10000) * torch.arange(128) / 128)
            return torch.cat([angle.cos(), angle.sin()])[None].expand(len(image), -1)

        ids = torch.zeros(text.shape[1] + height * width, 3)
        for row in range(height):
            for column in range(width):
                ids[text.shape[1] + row * width + column] = torch.tensor([0.0, row, column])
        rotation = rotary(ids)
        emb = self.time_in(clock(sigma)) + self.vector_in(vector)
        if hasattr(self, "guidance_in"):
            emb = emb + self.guidance_in(clock(3.5))
        x, y = self.img_in(image), self.txt_in(text)
        for block in self.double_blocks:
            x, y = block(x, y, emb, rotation)
        z = torch.cat([y, x], 1)
        for block in self.single_blocks:
            z = block(z, emb, rotation)
        shift, scale = self.final_layer.adaLN_modulation(emb)[:, None].chunk(2, -1)
        return self.final_layer.linear(normed(z[:, text.shape[1] :], shift, scale))


@pytest.fixture
def reference_flux():
    """The independent Flux.1."""
    return ReferenceFlux


Save = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path, build):
    """save_model(state, quantize=lambda name: bool, prefix=""): a float32 checkpoint, FP8 where asked for."""

    def save(
        state, quantize = lambda _: False, prefix = "",
        input_scale = None, **config,
    ):  # fmt: skip
        tensors = {}
        for name, value in state.items():
            array = value.detach().numpy().astype(np.float32)
            layer = name.removesuffix(".weight")
            if not (name.endswith(".weight") and array.ndim == 2 and quantize(layer)):
                tensors[prefix + name] = array
                continue
            scale = np.float32(np.abs(array).max() / 448)
            tensors[prefix + name] = ("F8_E4M3", DEFAULT_GRID.encode(array / scale))
            tensors[prefix + layer + ".weight_scale"] = scale
            if input_scale is not None:
                tensors[prefix + layer + ".input_scale"] = np.float32(input_scale)
            tensors[prefix + layer + ".comfy_quant"] = build.mark(format="float8_e4m3fn", **config)
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.safetensors"
        path.write_bytes(build.file_bytes(tensors, {"made by": json.dumps("a test")}))
        return path

    return save
