"""W4A8 and W6A8: weights of 4 or 6 bits, which readers expand to INT8 with one scale per row.

    level = round(clamp(value(code) · s_rel, ±127))        W·H = level · s_channel

s_rel is an E4M3 scale per 16 weights of a row, s_channel a float32 scale per row. Inputs are rotated like the weights
(`rotation`) and quantized to INT8 per token. At 4 bits value(code) is an entry of a codebook of 16 in the file, at 6
bits an integer from -31 to 31. The scale of 16 weights is found by two rounds of least squares: codes for the scale,
then the scale for the codes; at 6 bits the neighboring E4M3 scales are tried too.

Rounds like comfy-kitchen 0.2.40 (`quantize_w4a8_int8_weight`). Its codebook is the Lloyd-Max quantizer of groups of 16
normally distributed numbers divided by their largest; if rotated weights have heavier tails, a codebook is fitted.

Two codes share a byte, the first in the lower half. At 6 bits these are the lower four bits of each code plus 32; a
second plane holds the upper two bits, four codes per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..lazy_torch import torch
from .fp8 import E4M3FN
from .int8 import INTEGERS, ConvRot
from .packing import absmax_of, in_groups, pack_nibbles, unpack_nibbles
from .record import AMPERE_GPUS, Lattice, Parts, Shape, Stored, Weight
from .rotation import rotate_weight

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
ROTATED = 256
ROUNDS = 2
LEAST = 1e-8
SIX_BIT_LEVELS = 31
LEAST_CODE = -8
"""The value of the first of 16 codes without a codebook."""

# fmt: off
NORMAL_CODEBOOK = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)
# fmt: on
HEAVY_TAILS = -0.1
"""Excess kurtosis above which a codebook is fitted; normally distributed groups are near -0.5."""

SAMPLED, SAMPLED_FOR_TAILS, SAMPLED_FOR_FIT = 1 << 22, 1 << 19, 300_000


@lru_cache(maxsize=64)
def limits_of(codebook: tuple[float, ...]) -> NDArray[np.float32]:
    """The largest number that still rounds down, between each two neighbors of a codebook.

    Found by bisection, since comfy-kitchen compares distances that are rounded to float32.
    """
    level = np.array(codebook, np.float32)
    low, high = level[:-1], level[1:]
    limit: NDArray[np.float32]
    limit, nearer = low, np.where(low < high, high, np.nextafter(low, np.float32(np.inf)))
    for _ in range(64):
        middle = ((limit.astype(np.float64) + nearer) / 2).astype(np.float32)
        is_nearer = np.abs(middle - high) < np.abs(middle - low)
        limit, nearer = np.where(is_nearer, limit, middle), np.where(is_nearer, middle, nearer)
    return limit


def count_exceeded(numbers: Tensor, limits: Tensor) -> Tensor:
    """Codes of numbers [n, 16]: how many of the ascending limits [k] or [k, n] each exceeds, integers [n, 16]."""
    if not numbers.is_cpu:
        found: Tensor = torch.searchsorted(limits.movedim(0, -1).contiguous(), numbers, out_int32=True)
        return found
    # numpy compares ten times as fast as torch, and even faster relative to a search.
    by_row = limits.dim() == 1
    compared = (numbers if by_row else numbers.T.contiguous()).numpy()
    count = np.zeros(compared.shape, np.uint8)
    for limit in limits.numpy():
        count += (compared > limit).view(np.uint8)
    return torch.from_numpy(count if by_row else count.T)


def _sample(values: Tensor, count: int) -> Tensor:
    flat = values.flatten()
    if len(flat) <= count:
        return flat
    generator = torch.Generator(device=flat.device).manual_seed(0)
    return flat[torch.randint(0, len(flat), (count,), device=flat.device, generator=generator)]


def codebook_for(normalized: Tensor) -> Tensor:
    """The codebook of weights that were divided by the largest of their group: the default or a fitted one."""
    tails = _sample(normalized, SAMPLED_FOR_TAILS)
    kurtosis = ((tails - tails.mean()) / (tails.std() + 1e-9)).pow(4).mean() - 3.0
    if kurtosis.item() <= HEAVY_TAILS:
        return torch.tensor(NORMAL_CODEBOOK, device=normalized.device)
    samples = _sample(normalized, SAMPLED_FOR_FIT)
    codebook = torch.quantile(samples, torch.linspace(0, 1, 16, device=samples.device))
    for _ in range(25):  # Lloyd's algorithm: each level becomes the mean of the samples nearest to it
        chosen = (samples.unsqueeze(-1) - codebook).abs().argmin(-1)
        means = [samples[chosen == level] for level in range(16)]
        codebook = torch.stack([mine.mean() if len(mine) else old for mine, old in zip(means, codebook, strict=True)])
    return codebook.contiguous()


class W4A8(ConvRot):
    """See the module's docstring; the width of the rows distinguishes 4 bits from 6."""

    def storage(self, shape: tuple[int, int], block_size: int) -> dict[str, Stored]:
        codebook = dict.fromkeys(self.optional, ("F32", (16,)))
        return {**super().storage(shape, block_size), names.S_CHANNEL: ("F32", (shape[0],)), **codebook}

    def shape(self, stored: Shape, parts: Mapping[str, Shape]) -> tuple[int, int] | None:
        shape, groups = super().shape(stored, parts), parts.get(names.S_REL, ())
        return shape if shape and len(groups) == 2 and shape[1] == groups[1] * GROUP else None

    def whole(self, weight: Weight) -> dict[str, Tensor]:
        sample = in_groups(rotate_weight(rows_sampled(weight), ROTATED), GROUP)
        return {names.CODEBOOK: codebook_for(sample / sample.abs().amax(-1, keepdim=True).clamp(min=LEAST)).cpu()}

    def values(self, parts: Parts, device: torch.device) -> Tensor:
        """Values of the codes, ascending; without a codebook, integers around 0, as in readers."""
        whole = torch.arange(LEAST_CODE, -LEAST_CODE, dtype=torch.float32)
        return parts.get(names.CODEBOOK, whole).to(device)

    def fit(self, groups: Tensor, values: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        """Least-squares scales [n, 1] of groups [n, 16], and the quantized weights at these scales."""
        scale = absmax_of(groups).unsqueeze(-1)
        scale = (scale / SIX_BIT_LEVELS if self.code_bits == 6 else scale).clamp_(min=LEAST)
        level = self.assign(groups / scale, values, limits)
        for _ in range(ROUNDS):
            scale = (groups * level).sum(-1, keepdim=True) / level.square_().sum(-1, keepdim=True).clamp_(min=LEAST)
            scale.clamp_(min=LEAST)
            level = self.assign(groups / scale, values, limits)
        return scale, level.mul_(scale)

    def assign(self, normalized: Tensor, values: Tensor, limits: Tensor) -> Tensor:
        """The nearest values to weights that were divided by their scale, the lower one at ties."""
        codes = count_exceeded(normalized, limits)
        return values.index_select(0, codes.flatten().int()).reshape(normalized.shape)

    def quantize(self, weight_OI: Tensor, whole: Parts, _method: str) -> dict[str, Tensor]:
        values = self.values(whole, torch.device("cpu"))
        limits = torch.from_numpy(limits_of(tuple(values.tolist()))).to(weight_OI.device)
        values = values.to(weight_OI.device)  # now, while these copies wait for no other work
        rotated = rotate_weight(weight_OI, ROTATED)
        scale, real = self.fit(rotated.reshape(-1, GROUP), values, limits)
        s_channel = (absmax_of(real.reshape(rotated.shape)) / INTEGERS.max).clamp_(min=LEAST)
        s_rel = (scale.reshape(len(rotated), -1) / s_channel.unsqueeze(1)).to(torch.float8_e4m3fn)
        target = rotated.div_(s_channel.unsqueeze(1)).reshape(-1, GROUP)
        s_rel, codes = self.choose(target, s_rel, values)
        return {names.WEIGHT: self.pack(codes.reshape(rotated.shape)), names.S_REL: s_rel, names.S_CHANNEL: s_channel}

    def choose(self, target: Tensor, s_rel: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored scales and nearest codes of weights [n, 16] in units of s_channel.

        Levels are integers, so their midpoints and half their gaps are exact in float32. The upper level becomes nearer
        in float32 half a unit in the last place of the half gap above the midpoint.
        """
        level = levels(values.unsqueeze(1), s_rel.float().flatten())  # [16, n]
        half = (level[1:] - level[:-1]) / 2
        half -= (half.view(torch.int32) - 1).clamp_(min=0).view(torch.float32)
        limits = (level[1:] + level[:-1]) / 2 + half / 2
        return s_rel, count_exceeded(target, limits)

    def pack(self, codes: Tensor) -> Tensor:
        return pack_nibbles(codes).view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack_nibbles(packed).int()

    def lattice(self, parts: Parts) -> Lattice:
        codes = self.unpack(parts[names.WEIGHT])
        meanings = self.values(parts, torch.device("cpu")).tolist()
        meanings = [math.nan, *meanings[1:]] if self.code_bits == 6 else meanings
        numbers = parts[names.S_REL].view(torch.uint8).long()
        scaled = {"group": GROUP, "scales": torch.tensor(E4M3FN.levels).float(), "numbers": numbers}
        return Lattice.of(meanings, codes, parts[names.S_CHANNEL], reach=(-3, 3), whole=True, **scaled)

    def decode(self, parts: Parts, _config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        codes = self.unpack(parts[names.WEIGHT])
        numbers = in_groups(self.values(parts, codes.device)[codes], GROUP)
        s_rel = parts[names.S_REL]
        s_rel = s_rel.view(torch.float8_e4m3fn) if s_rel.dtype == torch.uint8 else s_rel
        whole = (numbers * s_rel.float().unsqueeze(-1)).flatten(-2).round().clamp(-INTEGERS.max, INTEGERS.max)
        return whole.to(torch.int8), parts[names.S_CHANNEL].float().reshape(-1, 1)


class W6A8(W4A8):
    """Six bits without a codebook: values are integers, and the lowest of the 64 codes is unused."""

    def whole(self, _weight: Weight) -> dict[str, Tensor]:
        return {}

    def values(self, _parts: Parts, device: torch.device) -> Tensor:
        return torch.arange(-SIX_BIT_LEVELS - 1.0, SIX_BIT_LEVELS + 1.0, device=device)

    def assign(self, normalized: Tensor, _values: Tensor, _limits: Tensor) -> Tensor:
        return normalized.round_().clamp_(-SIX_BIT_LEVELS, SIX_BIT_LEVELS)

    def choose(self, target: Tensor, s_rel: Tensor, _values: Tensor) -> tuple[Tensor, Tensor]:
        bits, reached = s_rel.view(torch.uint8).reshape(-1, 1), edges(target)
        # Use the scale or its neighbor in E4M3 with the least squared error in a reader's levels.
        best_bits, best = bits, torch.empty(0)
        for number, tried in enumerate((bits, (bits - 1).clamp(min=1), (bits + 1).clamp(max=0x7E))):
            _, below, above = around(target, reached, tried.view(torch.float8_e4m3fn).float())
            error = torch.minimum(below, above).square_().sum(-1, keepdim=True)
            if number == 0:
                best = error
                continue
            better = error < best
            best = torch.where(better, error, best)
            best_bits = torch.where(better, tried, best_bits)
        best_rel = best_bits.view(torch.float8_e4m3fn)
        code, below, above = around(target, reached, best_rel.float())
        code += (below - above).sign_().clamp_(min=0)  # 1 where the level above is nearer; torch compares slowly
        code = code.clamp_(-SIX_BIT_LEVELS, SIX_BIT_LEVELS).to(torch.int8).add_(SIX_BIT_LEVELS + 1)
        return best_rel.reshape(s_rel.shape), code

    def pack(self, codes: Tensor) -> Tensor:
        quads = in_groups((codes >> 4).to(torch.uint8), 4)
        upper = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
        return torch.cat([pack_nibbles(codes), upper], 1).view(torch.int8)

    def unpack(self, packed: Tensor) -> Tensor:
        width = packed.shape[1] * 2 // 3
        lower, upper = packed.view(torch.uint8)[:, :width], packed.view(torch.uint8)[:, width:]
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
        quads = (upper.unsqueeze(-1) >> shifts) & 3
        return unpack_nibbles(lower).int() | (quads.flatten(-2).int() << 4)


def levels(values: Tensor, s_rel: Tensor) -> Tensor:
    """INT8 levels of float32 values times the scale of their group."""
    return (values * s_rel).round_().clamp_(-INTEGERS.max, INTEGERS.max)


def edges(target: Tensor) -> Tensor:
    """The least product code · s_rel whose level is not below a number.

    A level round(code · s_rel) is not below a number if it is at least the next integer n, so the product must be at
    least n - ½, and more if n is odd, since ties go to even. Products are multiples of 2⁻⁹.
    """
    whole = target.ceil()
    half = whole / 2
    edge = whole - 0.5 + half.sub_(half.floor()).mul_(2.0**-10)
    edge += (whole - whole.clamp(1 - INTEGERS.max, INTEGERS.max)).mul_(1e9)  # levels end at ±127
    return edge


def around(target: Tensor, edge: Tensor, s_rel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 6-bit levels on both sides of numbers [n, 16], from their `edges` and float32 s_rel [n, 1].

    Returns:
        The code of the last level below each number, or -32; the distances to that level and to the next one, or to
        the first or last level if there is none.
    """
    code = (edge / s_rel).ceil_().clamp_(-SIX_BIT_LEVELS, SIX_BIT_LEVELS + 1)
    above = levels(code.clamp(max=SIX_BIT_LEVELS), s_rel).sub_(target).abs_()
    code -= 1
    below = levels(code.clamp(min=-SIX_BIT_LEVELS), s_rel).sub_(target).abs_()
    return code, below, above


def rows_sampled(weight: Weight) -> Tensor:
    """Evenly spaced rows of a weight, at most 4 Mi values."""
    count, columns = weight.shape
    wanted = max(1, SAMPLED // columns)
    return weight.rows(torch.linspace(0, count - 1, wanted).long() if count > wanted else torch.arange(count))


FOUR = W4A8(
    name="w4a8",
    title="W4A8",
    mark={"format": "asym_w4a8_int8"},
    dtypes=("I8", "U8"),
    bits=4.5,
    code_bits=4,
    scales=(names.S_REL, names.S_CHANNEL),
    optional=(names.CODEBOOK,),
    scale_dtypes=("F8_E4M3", "U8", "F32"),
    granularity="block",
    group_width=GROUP,
    input_grid=INTEGERS,
    heeds_full_precision=False,
    sides=(1, ROTATED),
    fallback="int8",
    ranged_by=names.S_CHANNEL,
    cards="Ampere and later",
    native=AMPERE_GPUS,
    since="August 2026 (PR 15308)",
)
FORMATS = (
    FOUR,
    W6A8(**{**vars(FOUR), "name": "w6a8", "title": "W6A8", "bits": 6.5, "code_bits": 6, "optional": (),
            "since": "October 2026 (comfy-kitchen 0.2.40)"}),
)  # fmt: skip
