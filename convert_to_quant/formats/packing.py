"""How codes of fewer than eight bits share bytes, and how scales of blocks lie in tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 4


def round_up(count: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-count // multiple) * multiple


def in_groups(x: Tensor, size: int) -> Tensor:
    """The last dimension in groups, [..., n / size, size]."""
    return x.reshape(*x.shape[:-1], -1, size)


def absmax_of(groups: Tensor) -> Tensor:
    """The largest magnitude of each group [..., size] as float32 [...].

    The bits of positive floats are in their order, and torch compares integers in half the time.
    """
    return groups.float().abs().view(torch.int32).amax(-1).view(torch.float32)


def pack_nibbles(codes: Tensor, *, high_first: bool = False) -> Tensor:
    """Two codes a byte, uint8 [..., n / 2], of integers [..., n] of which four bits count.

    The first of two is in the lower half of the byte, or with `high_first` in the upper half.
    """
    pairs = codes.to(torch.uint8).contiguous().view(torch.int16) & 0x0F0F  # the first of two in the lower byte
    return ((pairs << 4) | (pairs >> 8) if high_first else pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, *, high_first: bool = False) -> Tensor:
    """The codes 0 to 15 of `pack_nibbles`, uint8 [..., 2n], of bytes [..., n]."""
    packed = packed.view(torch.uint8)
    low, high = packed & 0xF, packed >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def tile_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of a table of scales in tiles."""
    return round_up(rows, TILE_ROWS), round_up(columns, TILE_COLUMNS)


def to_tiles(scales: Tensor) -> Tensor:
    """Scales of blocks in the order in which cuBLAS reads them ("1D block scaling factors layout").

    Tiles of 128 rows and 4 columns stand one after the other. In each, the rows 0, 32, 64 and 96 stand side by side,
    then 1, 33, 65 and 97, and so on.

    Args:
        scales: bytes [rows, columns].

    Returns:
        The same with zeros up to whole tiles, [128 · n, 4 · m].
    """
    rows, columns = tile_shape(*scales.shape)
    full = torch.zeros((rows, columns), dtype=scales.dtype, device=scales.device)
    full[: scales.shape[0], : scales.shape[1]] = scales
    tiles = full.view(rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def from_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """The scales [rows, columns] of `to_tiles`."""
    tiles = tiled.reshape(-1, tiled.shape[1] // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(tiled.shape)[:rows, :columns]
