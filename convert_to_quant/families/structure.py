"""What the layers of a model are, by shapes and by how names repeat: for models without a table.

Authors name blocks and modulations as they like (`double_layers.3.modX.1`, `blocks.7.mod_x`, `layers.2.norm1.linear`).
The structure is always the same: a block is a numbered group of layers that repeats with the same children and reads
and writes a residual stream; a modulation turns one vector into several vectors of the stream's width, which no layer
of the block reads as its input.

Every layer name is split at its numbers. A *stack* is the part before a number that is followed by groups of two or
more layers, numbered from 0, or by any groups if it is called a block or a layer. `t_block.1` is none (the number ends
the name), nor is `caption_projection.7.linear`. Of nested stacks the outer one counts, unless the inner one has more
than twice its layers (as in U-Nets, whose levels are numbered too). The *main* stacks are the heaviest one, those in
the same module, and those with the same children that are numbered too or have enough weight. In a block

    stream       widths that are both inputs and outputs of layers, and more than half as frequent as the most frequent
    modulation   k × stream outputs, for k ≥ 4, or for k ≥ 2 from a narrow vector, that no layer of the block reads,
                 or with inputs that no layer of the block writes, for k ≥ 4; layers inside a norm or alone in a
                 Sequential; layers with such a name; and the rest of a Sequential that contains one of these
    router       fewer than a sixteenth as many outputs as inputs, or one output per expert

Also kept: stacks in another module than the main ones (an adapter between text encoder and model), stacks with less
than `SMALL` of the main one's weights (refiners), embeddings, and everything outside of blocks. If that leaves nothing
to quantize, only embeddings and layers whose names show their role are kept.

Limits. A modulation of 2 or 3 vectors from one of the stream's width has the shape of a fused attention projection;
only names, norms and Sequentials tell them apart. Layer inputs are unknown here; calibration measures them.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from .base import MODULATION, OUTSIDE, REFINER, VECTOR, Shape, outside, reason_of

SMALL = 0.08
"""Stacks with a smaller share of the largest one's weights are kept; token refiners have 0.03 to 0.07."""

NARROW = 4
"""A vector is narrow if the stream is at least this many times as wide."""

FEW = 16
"""Outputs are few if there are more than this many times as many inputs."""

ADAPTER = "adapter or encoder beside the main blocks: few weights, and its error reaches every block"
ROUTER = "router or gate: each of its few outputs scales whole tokens"
EMBEDDING = "embedding: a table, which no matmul uses"

_EMBEDDING = re.compile(
    r"relative_attention_bias|embed|shared|embedding_table|(?:embed_|word_)?tokens|word_embeddings|wte|wpe|(?:pos|position|tok|token)_embeddings?"
)
_BESIDE = {
    r"\w*refiner\w*": REFINER,
    r"\w*(?:adapter|connector|resampler|encoder|projector)s?(?:_\w+)?": ADAPTER,
}
"""Words in the names of stacks and their modules that are never the main ones."""

_MODULATION = re.compile(
    r"(?:\w*_)?(?:mod|modulation|adaln|ada_ln|scale_shift|shift_scale|mapper|emb_layers|time_emb_proj)\w*|mod[A-Z]\w*|adaLN\w*"
)
_PRODUCT = re.compile(r"\w*(?:mlp|ff|ffn|feed_?forward|attn|attention|experts?)(?:_\w+)?", re.IGNORECASE)
"""Modules whose layers process tokens, whatever their shapes."""
_TIME = re.compile(r"time(?:step)?_?embed\w*")
_KEYS = re.compile(r"(?:to_|w)?[kv](?:_\w+)?|to_(?:kv|key|value)")
"""Keys and values, possibly of a single head."""
_BLOCKS = re.compile(r"(?:block|layer)s?$", re.IGNORECASE)
"""Names of stacks that may have one group, with one layer."""
_NORM = re.compile(r"\w*norm\w*|ln_?\d*")
_DIGITS = re.compile(r"\d+")


@dataclass
class Stack:
    """Numbered groups of layers with the same children.

    Attributes:
        name: the part before the number, with "#" for numbers.
        layers: name of each layer -> the rest after the number, with "#" for numbers.
        numbers: names of its groups.
        weights: elements of its layers.
        kept: why all of it stays in high precision; "" if it does not.
    """

    name: str
    layers: dict[str, str] = field(default_factory=dict)
    numbers: set[str] = field(default_factory=set)
    weights: int = 0
    kept: str = ""

    @property
    def children(self) -> set[str]:
        """The layers of a group."""
        return set(self.layers.values())

    @property
    def module(self) -> str:
        """The module that contains it."""
        return self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.name} ({len(self.numbers)} × {len(self.layers) // max(len(self.numbers), 1)} layers)"


@dataclass(frozen=True)
class Structure:
    """The repeated blocks of a model, heaviest first, and which layers stay in high precision, and why."""

    stacks: tuple[Stack, ...]
    kept: Mapping[str, str]

    @property
    def main(self) -> list[Stack]:
        """The stacks whose layers are quantized."""
        return [stack for stack in self.stacks if not stack.kept]

    def block_weights(self, shapes: Mapping[str, Shape]) -> int:
        """Number of weights in the main stacks, convolutions included."""
        places = {place for stack in self.main for place in stack.numbers}
        inside = (shape for name, shape in shapes.items() if any(name[:end] in places for end in _dots(name)))
        return sum(math.prod(shape) for shape in inside if len(shape) > 1)

    def __str__(self) -> str:
        main = ", ".join(map(str, self.main)) or "none"
        beside = "; ".join(f"{stack} kept: {stack.kept}" for stack in self.stacks if stack.kept)
        return f"repeated blocks by their structure: {main}" + (f"; {beside}" if beside else "")


def study(shapes: Mapping[str, Shape], *, all_stacks: bool = False) -> Structure:
    """Find the blocks of a model, and the layers that stay in high precision, by names without prefix and shapes.

    `all_stacks` quantizes every stack, as in text encoders with a vision tower.

    >>> found = study({f"blocks.{n}.{layer}.weight": (64, 64) for n in range(2) for layer in ("q", "proj")})
    >>> str(found.main[0]), found.kept
    ('blocks (2 × 2 layers)', {})
    """
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    linear = {name: (shape[0], shape[1]) for name, shape in layers.items() if len(shape) == 2}
    stacks = _stacks(linear)
    for stack in stacks:
        stack.kept = "" if all_stacks or not stacks else _beside(stack, stacks)
    home = {name: stack for stack in stacks for name in stack.layers}
    groups: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, shape in linear.items():
        if name in home:
            groups[_group(name, home[name])][name] = shape
    said: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # in the last block, often nothing reads a layer
    for block in groups.values():
        roles = dict(_roles(block, home, layers))
        for name in block:
            said[home[name].name, home[name].layers[name]][roles.get(name, "")] += 1

    def reason(name: str) -> str:
        stack = home.get(name)
        if stack is None:
            parts = name.split(".")
            return EMBEDDING if any(map(_EMBEDDING.fullmatch, parts)) else outside(name)
        return stack.kept or said[stack.name, stack.layers[name]].most_common(1)[0][0]

    kept = {name: why for name in linear if (why := reason(name))}
    if len(kept) == len(linear):  # no structure was found
        kept = {name: why for name, why in kept.items() if name not in home and why != OUTSIDE}
    return Structure(tuple(stacks), kept)


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _split(name: str) -> Iterator[tuple[str, str, str]]:
    """Every number in a name that a module follows: the part before it, the number, and the rest."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        rest = parts[place + 1 :]
        if part.isdecimal() and rest and not rest[0].isdecimal():
            yield ".".join(parts[:place]), part, ".".join("#" if each.isdecimal() else each for each in rest)


def _stacks(linear: Mapping[str, tuple[int, int]]) -> list[Stack]:
    """The stacks that count, heaviest first."""
    candidates: dict[str, Counter[str]] = defaultdict(Counter)
    places = {name: [(_DIGITS.sub("#", before), before, number, rest) for before, number, rest in _split(name)]
              for name in linear}  # fmt: skip
    for found in places.values():
        for stack, _, _, rest in found:
            candidates[stack][rest] += 1
    first = {stack for found in places.values() for stack, _, number, _ in found if int(number) == 0}
    nested: dict[str, set[str]] = defaultdict(set)
    own: dict[str, set[str]] = {stack: set(children) for stack, children in candidates.items()}
    for found in places.values():
        for place, (stack, _, _, rest) in enumerate(found):
            inner = [one for one, *_ in found[place + 1 :] if len(candidates[one]) > 1]
            nested[stack].update(inner)
            if inner:
                own[stack].discard(rest)
    good = {
        stack
        for stack, children in own.items()
        if (_BLOCKS.search(stack) or (stack in first and len(children) > 1))
        and all(len(candidates[inner]) <= 2 * len(children) for inner in nested[stack])
    }
    stacks: dict[str, Stack] = {}
    for name, (rows, columns) in linear.items():
        for stack, before, number, rest in places[name]:
            if stack in good:
                one = stacks.setdefault(stack, Stack(stack))
                one.layers[name] = rest
                one.numbers.add(f"{before}.{number}")
                one.weights += rows * columns
                break
    return sorted(stacks.values(), key=lambda one: -one.weights)


def _group(name: str, stack: Stack) -> str:
    """The numbered group of a stack that a layer is in."""
    return next(place for place in stack.numbers if name.startswith(place + "."))


def _beside(stack: Stack, stacks: list[Stack]) -> str:
    """Why a stack is not one of the main ones; "" if it is."""

    def said(one: Stack) -> str:
        return next(filter(None, (reason_of(part, _BESIDE) for part in one.name.split("."))), "")

    largest = next((one for one in stacks if not said(one)), stacks[0])
    if stack is largest:
        return ""
    small = stack.weights < SMALL * largest.weights
    alike = 2 * len(stack.children & largest.children) > len(stack.children | largest.children)
    if alike and "#" in stack.name and "#" in largest.name:
        return ""  # levels of one network
    if said(stack):
        return said(stack)
    if stack.module != largest.module and (small or not alike):
        return ADAPTER
    return REFINER if small else ""


def _roles(
    block: Mapping[str, tuple[int, int]], home: Mapping[str, Stack], layers: Collection[str]
) -> Iterator[tuple[str, str]]:
    """The layers of one block that are kept, each with the reason."""
    taken, given = {columns for _, columns in block.values()}, {rows for rows, _ in block.values()}
    uses = Counter(side for shape in block.values() for side in shape)
    most = max((uses[width] for width in taken & given), default=0)
    stream = {width for width in taken & given if 2 * uses[width] > most}
    numbered = {(before, number) for name in block for before, number, _ in _split(name)}
    experts = set(Counter(before for before, _ in numbered if before.endswith("experts")).values())
    sequentials = set()
    for name, (rows, columns) in block.items():
        parts = home[name].layers[name].split(".")
        product = any(map(_PRODUCT.fullmatch, parts))
        if any(map(_EMBEDDING.fullmatch, parts)):
            yield name, EMBEDDING
        elif any(map(_TIME.fullmatch, parts)):
            yield name, VECTOR
        elif _sounds_modulating(name, layers) or (not product and _modulates((rows, columns), stream, taken, given)):
            parent, _, last = name.rpartition(".")
            sequentials.update([parent] if last.isdecimal() else [])
            yield name, MODULATION
        elif not _KEYS.fullmatch(parts[-1]) and (0 < rows * FEW < columns or (rows in experts and rows < columns)):
            yield name, ROUTER
    yield from ((name, MODULATION) for name in block if name.rpartition(".")[0] in sequentials)


def _sounds_modulating(name: str, layers: Collection[str]) -> bool:
    """Whether a layer is called a modulation, or is inside a norm, or alone behind an activation."""
    parent, _, last = name.rpartition(".")
    module = parent.rpartition(".")[2]
    alone = last == "1" and not any(f"{parent}.{number}" in layers for number in ("0", "2", "3"))
    alone = alone and not module.startswith(("to_out", "ff"))  # behind a dropout or a norm
    in_norm = _NORM.fullmatch(module) and last.startswith("lin")
    return bool(alone or in_norm or _MODULATION.fullmatch(last) or _MODULATION.fullmatch(module))


def _modulates(shape: tuple[int, int], stream: set[int], taken: set[int], given: set[int]) -> bool:
    """Whether a layer's output is several vectors of a stream's width, and no layer of its block reads them as one.

    `stream` are the widths of the block's streams; `taken` and `given`, the input and output widths of its layers.
    """
    rows, columns = shape
    foreign = columns not in stream | given
    joined = taken - given  # outputs of attention, or of attention and an MLP side by side

    def modulates(width: int) -> bool:
        read = {rows, rows / 2} & taken - {width}  # whole, or one half gating the other
        read |= {rows / 3, rows + width, rows / 2 + width, rows - 2 * width, (rows - width) / 2} & joined
        times = rows / width
        narrow = columns * NARROW <= width
        return times.is_integer() and ((not read and times >= (2 if narrow else 4)) or (foreign and times >= 4))

    return any(map(modulates, stream))
