"""ConvRot: groups of a layer's inputs, and its weights, are rotated to spread outlier channels.

A regular Hadamard matrix H of size 4^k has entries ±1 / √size, is symmetric, and is its own inverse. With W·H in the
file and x·H at run time, (x·H)(W·H)ᵀ = x·Wᵀ. An outlier channel is spread over its group, whose inputs share a scale.
As in comfy-kitchen 0.2.40, `int8_utils`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_GROUP = 256
GROUP_KEY = "convrot_groupsize"


def group_of(in_features: int) -> int:
    """The largest power of 4 from 16 to 256 that divides a number of inputs; 0 for none.

    >>> group_of(3072), group_of(192), group_of(100)
    (256, 64, 0)
    """
    return next((size for size in (LARGEST_GROUP, 64, 16) if in_features and in_features % size == 0), 0)


def said_group(config: Mapping[str, Any]) -> int:
    """The group size in a rotated layer's quantization config; 256 by default, -1 if it is invalid."""
    nested = config.get("params")
    nested = nested if isinstance(nested, dict) else {}
    try:
        return int(config.get(GROUP_KEY, nested.get(GROUP_KEY, LARGEST_GROUP))) or -1
    except (TypeError, ValueError, OverflowError):
        return -1


def is_group(size: int, in_features: int) -> bool:
    """Whether a group size is a power of 4 that divides the number of inputs."""
    return size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1 and in_features % size == 0


@lru_cache(maxsize=16)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The regular Hadamard matrix [size, size] of a power of 4, orthogonal and symmetric."""
    base = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=dtype)
    matrix: Tensor = base
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    normalized: Tensor = (matrix / size**0.5).to(device)  # synchronously, since streams of other threads use it
    return normalized


def rotate_weight(weight_OI: Tensor, group: int) -> Tensor:
    """Rotate a weight in float32.

    A float32 weight is multiplied by H, as in comfy-kitchen. On a CPU a 16-bit weight is multiplied by the factors of
    H, H256 = H16 ⊗ H16, in a quarter of the time; most such sums are exact in float32, in others the last bit may
    differ.
    """
    wide = weight_OI.float()
    if group < 64 or wide is weight_OI or wide.device.type != "cpu":
        return rotate(wide, group)
    inner, outer = (hadamard(size, wide.dtype, wide.device) for size in (16, group // 16))
    grouped = wide.view(-1, group // 16, 16)
    torch.matmul(outer, torch.matmul(grouped, inner), out=grouped)
    return wide


def rotate(x: Tensor, group: int) -> Tensor:
    """Rotate the last dimension in groups, in x's own dtype; applying it twice undoes it. Group 0 does nothing."""
    if not group:
        return x
    grouped = x.reshape(-1, x.shape[-1] // group, group)
    rotated: Tensor = torch.matmul(grouped, hadamard(group, x.dtype, x.device))
    return rotated.reshape(x.shape)
