"""Layouts of released models: names, dtypes and shapes of their tensors, at full size and small."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "layouts.json.xz"

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
Shapes = dict[str, tuple[int, ...]]

IN_STACK = re.compile(r"(.*?(?:blocks|layers|norms|refiner)\.)(\d+)(\..*)")


@cache
def layouts() -> dict[str, Layout]:
    """Every layout by its name: its tensors' dtypes and shapes."""
    return json.loads(lzma.decompress(DATA.read_bytes()))


def shapes_of(name: str) -> Shapes:
    """The shapes of a layout's tensors."""
    return {tensor: tuple(shape) for tensor, (_, shape) in layouts()[name].items()}


def small(name: str, hidden: str, **sizes: int) -> Shapes:
    """A layout with the first and the last block of each stack.

    Args:
        name: of the layout.
        hidden: its hidden size and the small one, which also scales multiples: "3072 to 32".
        sizes: other sizes to replace: n128=16.
    """
    full, less = map(int, hidden.split(" to "))
    found: Shapes = {}
    stacks = {tensor: IN_STACK.fullmatch(tensor) for tensor in layouts()[name]}
    last = {place[1]: place[2] for place in stacks.values() if place}
    for tensor, shape in shapes_of(name).items():
        place = stacks[tensor]
        if place is None or int(place[2]) == 0:
            own = tensor
        elif place[2] == last[place[1]]:
            own = f"{place[1]}1{place[3]}"
        else:
            continue
        multiples = {size: size // full * less for size in shape if size % full == 0}
        found[own] = tuple(sizes.get(f"n{size}", multiples.get(size, size)) for size in shape)
    return found


def hunyuan_authors(name: str) -> str:
    """The name that HunyuanVideo's authors use for a tensor that ComfyUI renames on loading."""
    for pattern, replacement in (
        (r"txt_in\.t_embedder\.in_layer\.", "txt_in.t_embedder.mlp.0."),
        (r"txt_in\.t_embedder\.out_layer\.", "txt_in.t_embedder.mlp.2."),
        (r"txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
        (r"txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
        (r"(time|guidance)_in\.in_layer\.", r"\1_in.mlp.0."),
        (r"(time|guidance)_in\.out_layer\.", r"\1_in.mlp.2."),
        (r"(mod|modulation)\.lin\.", r"\1.linear."),
        (r"(blocks.*)mlp\.0\.", r"\1mlp.fc1."),
        (r"(blocks.*)mlp\.2\.", r"\1mlp.fc2."),
        (r"attn\.(qkv|proj)\.", r"attn_\1."),
        (r"attn\.norm\.query_norm\.scale", "attn_q_norm.weight"),
        (r"attn\.norm\.key_norm\.scale", "attn_k_norm.weight"),
        (r"\.norm\.query_norm\.scale", ".q_norm.weight"),
        (r"\.norm\.key_norm\.scale", ".k_norm.weight"),
    ):
        name = re.sub(pattern, replacement, name)
    return name
