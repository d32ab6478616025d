"""Packing of 4-bit codes into bytes, and the tiled layout of block scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 4


def round_up(count: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-count // multiple) * multiple


def in_groups(x: Tensor, size: int) -> Tensor:
    """Split the last dimension into groups, [..., n / size, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def absmax_of(groups: Tensor) -> Tensor:
    """The largest magnitude of each group [..., size] as float32 [...].

    Compares bits, which sort like positive floats do; torch compares integers twice as fast.
    """
    return groups.float().abs().view(torch.int32).amax(-1).view(torch.float32)


def pack_nibbles(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Pack integers [..., n] of 4 bits into uint8 [..., n / 2], the first of two in the lower or the upper half."""
    pairs = codes.to(torch.uint8).contiguous().view(torch.int16) & 0x0F0F  # the first of two in the lower byte
    return ((pairs << 4) | (pairs >> 8) if high_first else pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """Undo `pack_nibbles`: codes 0 to 15, uint8 [..., 2n], of bytes [..., n]."""
    packed = packed.view(torch.uint8)
    low, high = packed & 0xF, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def tile_shape(rows: int, columns: int) -> tuple[int, int]:
    """The tiled shape of scales [rows, columns]."""
    return round_up(rows, TILE_ROWS), round_up(columns, TILE_COLUMNS)


def to_tiles(scales: Tensor) -> Tensor:
    """Lay out block scales, bytes [rows, columns], as cuBLAS reads them ("1D block scaling factors layout").

    Tiles of 128 rows and 4 columns follow one another, padded with zeros: [128 · n, 4 · m]. In each, rows 0, 32, 64 and
    96 come side by side, then 1, 33, 65 and 97, and so on.
    """
    rows, columns = tile_shape(*scales.shape)
    full = torch.zeros((rows, columns), dtype=scales.dtype, device=scales.device)
    full[: scales.shape[0], : scales.shape[1]] = scales
    tiles = full.view(rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def from_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_tiles`: scales [rows, columns]."""
    tiles = tiled.reshape(-1, tiled.shape[1] // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(tiled.shape)[:rows, :columns]
