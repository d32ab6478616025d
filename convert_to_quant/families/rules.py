"""Rules for names: which rows of which checkpoint layer a foreign name means.

A linear layer has several names. Its authors call a fused projection ``double_blocks.0.img_attn.qkv``; diffusers splits
it into ``transformer_blocks.0.attn.to_q``, ``to_k`` and ``to_v``; LoRA trainers use either. To run a model or merge an
adapter, we need the rows of the checkpoint's layer that a foreign name means. Each family states them as data.

A `Rule` pairs two patterns with the part of the checkpoint's layer that the other name means. In a pattern ``*`` is a
block number and ``**`` any rest; both sides have the same ones in the same order. Parts are measured from the layer's
shape [out, in]:

    QKV             [in + 2 k, in]  q is the first ``in`` rows, k and v share the rest (k < in: grouped queries)
    QKV_MLP         [3 in + m, in]  q, k, v of ``in`` rows each, then the MLP's m rows
    HALVES, THIRDS  [n k, in]       equal pieces
    SHIFT_SCALE     [2 in, in]      diffusers stores scale, shift; layers of other shapes are not swapped
    GATE_LINEAR     [2 k, in]       diffusers stores the linear half of a gated MLP, then its gate

Norms, convolutions and tables have rules too, so a family's table is all that diffusers' class needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

Rows = Callable[[int, int], tuple[int, ...]]
"""(out, in) of a fused layer -> the row count of each piece; () for a shape that is not fused in this way."""


@dataclass(frozen=True)
class Target:
    """The part of a checkpoint's layer that a foreign name means.

    Attributes:
        layer: Name of the checkpoint's layer.
        rows: First row and row after the last, of the weight [out, in]; None for all.
        swap_halves: The foreign tensor has the two halves of these rows in the other order.
        first: Row of the foreign tensor that is the first of these; not 0 if that tensor spans several layers.
    """

    layer: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False
    first: int = field(default=0, repr=False)


def qkv_rows(out_features: int, in_features: int) -> tuple[int, ...]:
    """Query of `in` rows; key and value share the rest.

    >>> qkv_rows(3840, 2304)
    (2304, 768, 768)
    """
    key_rows, odd = divmod(out_features - in_features, 2)
    return () if odd or not 0 < key_rows <= in_features else (in_features, key_rows, key_rows)


def qkv_mlp_rows(out_features: int, in_features: int) -> tuple[int, ...]:
    """Query, key and value of `in` rows each, then the MLP.

    >>> qkv_mlp_rows(21504, 3072)
    (3072, 3072, 3072, 12288)
    """
    mlp_rows = out_features - 3 * in_features
    return () if mlp_rows <= 0 else (in_features, in_features, in_features, mlp_rows)


def _equal(count: int) -> Rows:
    return lambda out_features, _: () if out_features % count else (out_features // count,) * count


@dataclass(frozen=True)
class Part:
    """A run of pieces of a fused layer, or all of any layer.

    Attributes:
        fused: How the layer is fused; None means all of it.
        first, stop: The first piece, and the one after the last.
        swapped: (out, in) -> whether the two halves of a whole layer are in the other order.
    """

    fused: Rows | None = None
    first: int = 0
    stop: int = 0
    swapped: Callable[[int, int], bool] = lambda *_: False

    def target(self, layer: str, out_features: int, in_features: int) -> Target | None:
        """This part of `layer` [out, in], or None if its shape is not fused in this way."""
        if self.fused is None:
            return Target(layer, swap_halves=self.swapped(out_features, in_features))
        sizes = self.fused(out_features, in_features)
        return Target(layer, (sum(sizes[: self.first]), sum(sizes[: self.stop]))) if sizes else None


WHOLE = (Part(),)
SHIFT_SCALE = (Part(swapped=lambda out_features, in_features: out_features == 2 * in_features),)
GATE_LINEAR = (Part(swapped=lambda *_: True),)
QKV_OF_MLP = (Part(qkv_mlp_rows, 0, 3),)
QKV, QKV_MLP, HALVES, THIRDS = (
    tuple(Part(fused, piece, piece + 1) for piece in range(count))
    for fused, count in ((qkv_rows, 3), (qkv_mlp_rows, 4), (_equal(2), 2), (_equal(3), 3))
)


@dataclass(frozen=True)
class Rule:
    """`other` is another name for the part `part` of the checkpoint's layer `layer`; both are patterns."""

    layer: str
    other: str
    part: Part = WHOLE[0]


Row = tuple[str, str] | tuple[str, str, tuple[Part, ...]]


def rules(*rows: Row) -> tuple[Rule, ...]:
    """A table of rows (layer, other name), with the parts if the other name is not the whole layer.

    `{a,b}` lists alternatives; braces of both names correspond in order. The other name may have one brace more, with a
    name per part.

    >>> [(rule.layer, rule.other) for rule in rules(("{img,txt}_attn.proj", "attn.to_{out,add_out}"))]
    [('img_attn.proj', 'attn.to_out'), ('txt_attn.proj', 'attn.to_add_out')]
    >>> [(rule.other, rule.part.first) for rule in rules(("attn.qkv", "attn.to_{q,k,v}", QKV))]
    [('attn.to_q', 0), ('attn.to_k', 1), ('attn.to_v', 2)]
    """
    return tuple(rule for row in rows for rule in _spread(*row))


def under(layer_root: str, other_root: str | None = None) -> Callable[..., tuple[Rule, ...]]:
    """`rules` whose layers share a prefix, and whose other names share another, or the same."""
    beginning = layer_root if other_root is None else other_root
    return lambda *rows: rules(*((layer_root + row[0], beginning + row[1], *row[2:]) for row in rows))


_CHOICES = re.compile(r"\{([^}]*)\}")


def _spread(layer: str, other: str, parts: tuple[Part, ...] = WHOLE) -> Iterator[Rule]:
    ours, theirs = _CHOICES.search(layer), _CHOICES.search(other)
    if theirs is None:
        yield Rule(layer, other, *parts)
    elif ours is None:
        for name, part in zip(theirs[1].split(","), parts, strict=True):
            yield from _spread(layer, other.replace(theirs[0], name, 1), (part,))
    else:
        for one, another in zip(ours[1].split(","), theirs[1].split(","), strict=True):
            yield from _spread(layer.replace(ours[0], one, 1), other.replace(theirs[0], another, 1), parts)


def turned(table: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules with both names exchanged."""
    return tuple(Rule(rule.other, rule.layer, rule.part) for rule in table)


def both_ways(table: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules in both directions."""
    rows = tuple(table)
    return (*rows, *turned(rows))


_WILDCARD = re.compile(r"(\*\*|\*)")


@cache
def _matcher(pattern: str) -> re.Pattern[str]:
    kinds = {"*": "([0-9]+)", "**": "(.+)"}
    return re.compile("".join(kinds.get(piece) or re.escape(piece) for piece in _WILDCARD.split(pattern)))


Index = Mapping[str, list[Rule]]
"""Rules by the first word of their layer's name, so that a layer is tried against dozens of them, not hundreds."""


def index(table: Iterable[Rule]) -> Index:
    """Index rules by the first word of their layer's name."""
    found: dict[str, list[Rule]] = {}
    for rule in dict.fromkeys(table):
        found.setdefault(rule.layer.partition(".")[0], []).append(rule)
    return found


def translations(name: str, table: Index) -> Iterator[tuple[str, Part]]:
    """The other names of a layer, each with the part that it means."""
    for rule in table.get(name.partition(".")[0], ()):
        found = _matcher(rule.layer).fullmatch(name)
        if found is not None:
            rest = iter(found.groups())
            yield _WILDCARD.sub(lambda _, rest=rest: next(rest), rule.other), rule.part  # type: ignore[misc]


def spelled(name: str, spellings: Index) -> tuple[str, ...]:
    """A layer's name, and its other names in checkpoints."""
    return (name, *(other for other, _ in translations(name, spellings)))


def meanings(layer: str, shape: tuple[int, int], table: Index, spellings: Index) -> Iterator[tuple[str, Target]]:
    """Every name that a rule gives to a layer [out, in] under any of its own names, and the part that it means."""
    for spelling in spelled(layer, spellings):
        for other, part in translations(spelling, table):
            target = part.target(layer, *shape)
            if target is not None:
                yield other, target


Targets = dict[str, tuple[Target, ...]]
"""{name: every part it may mean}; several are an ambiguity, which the caller reports."""


def targets(layers: Mapping[str, tuple[int, int]], table: Index, spellings: Index) -> Targets:
    """Say what every own name of some layers, and every name that a rule gives to one, means.

    `spellings` are rules for whole layers, applied before those of `table`.
    """
    found: dict[str, dict[Target, None]] = {}
    for layer, shape in layers.items():
        own = ((spelling, Target(layer)) for spelling in spelled(layer, spellings))
        for name, target in (*own, *meanings(layer, shape, table, spellings)):
            found.setdefault(name, {})[target] = None
    return {name: tuple(meant) for name, meant in found.items()}
