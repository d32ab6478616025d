"""Weights that are transposed, flattened, or from another model: their shapes contradict those of other tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from . import names

_BLOCK_NORM = re.compile(r"[a-z_]*(?:norm|ln)_?\d*\.weight|(?:input|post_attention)_layernorm\.weight")
_READS_STREAM = re.compile(r"\.(?:qkv|to_qkv|to_q|q_proj|w1|w3|gate_proj|up_proj|fc1)$")
"""Layers whose input is the output of a block's norm."""


def misshapen(
    shapes: Mapping[str, tuple[int, ...]], alone: frozenset[str], filled: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """Find weights whose shapes contradict their biases, the same layers of other blocks, or norms.

    Args:
        shapes: of all tensors but scales, by name; (out, in) of packed weights.
        alone: layers whose weights are stored in shapes of their own, which are not compared.
        filled: for formats with tiles of scales, the multiple to which a layer's rows are padded.

    Yields:
        The layer, and the contradiction.
    """
    norms: dict[str, set[int]] = defaultdict(set)  # sizes of a block's own norms
    same: dict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)  # a layer over all blocks
    for key, shape in shapes.items():
        block, number, rest = _in_block(key)
        if len(shape) == 1 and _BLOCK_NORM.fullmatch(rest):
            norms[f"{block}.{number}"].add(shape[0])
        name, bias = key.removesuffix(names.WEIGHT), shapes.get(key.removesuffix(names.WEIGHT) + names.BIAS, ())
        if name == key or name in alone:
            continue
        rows = shape[0] if shape else 0
        padding = rows - bias[0] if len(bias) == 1 and len(shape) == 2 else 0
        flat = len(bias) == len(shape) == 1 and rows > bias[0] > 0
        if flat or not 0 <= padding < filled.get(name, 1):
            yield name, f"{_sides(shape)} beside a bias of {bias[0]}"
        elif rest and len(shape) == 2:
            same[block, rest][key] = shape
    for layers in same.values():
        (usual, count), *_ = Counter(layers.values()).most_common(1)
        for key, shape in layers.items():
            block, number, _ = _in_block(key)
            name, sizes = key.removesuffix(names.WEIGHT), norms[f"{block}.{number}"]
            if shape == usual[::-1] != usual and 2 * count > len(layers) > 2:
                yield name, f"{_sides(shape)}, but {_sides(usual)} in other blocks"
            elif _READS_STREAM.search(name) and shape[0] in sizes and shape[1] not in sizes:
                yield name, f"{_sides(shape)} after a norm of {shape[0]}"


def _in_block(tensor: str) -> tuple[str, str, str]:
    """The name before the block number, the number, and the rest; three times "" if the tensor is in no block.

    >>> _in_block("double_blocks.3.img_mlp.0.weight"), _in_block("time_embed.2.weight")
    (('double_blocks', '3', 'img_mlp.0.weight'), ('', '', ''))
    """
    parts = tensor.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    if all(part.isdecimal() for part in parts[number + 1 : -1]):
        return "", "", ""
    return ".".join(parts[:number]), parts[number], ".".join(parts[number + 1 :])


def _sides(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
