"""Finds the channels that a family declares (`families.folds`) in a checkpoint: columns and rows of its tensors.

A checkpoint may fuse tensors that diffusers splits, or swap halves; `engines.provenance` knows where each row of
diffusers' tensors is. A group is left out if scaling it would not be exact: a reader is only a part of a stored layer,
a tensor is already quantized, or a modulation has no bias to increase by f - 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import families, names
from ..checkpoint import Checkpoint

if TYPE_CHECKING:
    from ..engines.denoiser import Plan
    from ..families.folds import Fold

Exponents = NDArray[np.int8]

PLAIN = frozenset({"BF16", "F16", "F32", "F64"})
"""Types of tensors that can be scaled."""


@dataclass(frozen=True)
class Place:
    """A run of channels in a tensor.

    Attributes:
        tensor: its bare name.
        start: the first column or row of the run.
        first: number of its factor.
        count: length of the run.
    """

    tensor: str
    start: int
    first: int
    count: int


@dataclass
class Group:
    """Channels that are scaled together.

    Attributes:
        columns: of weights, divided by the factors.
        rows: of weights and biases, multiplied by the factors.
        ones: of biases, increased by f - 1 as well.
        head, repeat: each run of `head` factors applies to `repeat` runs of columns.
        exponents: f = 2^exponents, one for each row.
    """

    columns: list[Place] = field(default_factory=list)
    rows: list[Place] = field(default_factory=list)
    ones: list[Place] = field(default_factory=list)
    head: int = 1
    repeat: int = 1
    exponents: Exponents = field(default_factory=lambda: np.zeros(0, np.int8))

    @property
    def column_exponents(self) -> Exponents:
        """The exponents of the columns."""
        return self.exponents.reshape(-1, self.head).repeat(self.repeat, 0).reshape(-1)


def find_groups(checkpoint: Checkpoint, plan: Plan, layers: Collection[str]) -> list[Group]:
    """The channels of a checkpoint that can be scaled and that some layers, by their full names, read.

    Members of a family with parts of their own have none: scaling is proved only for the family's plain form.
    """
    family = families.family(plan.family)
    has_optional = any(re.fullmatch(plan.architecture.optional, name) for name in plan.full_names)
    if plan.architecture is not family.architecture or has_optional:
        return []
    modules = {name.removesuffix(names.WEIGHT) for name in plan.sources if name.endswith(names.WEIGHT)}
    groups = [_group(checkpoint, plan, fold, number) for fold in family.folds for number in _numbers(fold, modules)]
    wanted = {layer + names.WEIGHT for layer in layers}
    return [
        group
        for group in groups
        if group is not None and any(plan.full_names[place.tensor] in wanted for place in group.columns)
    ]


def _numbers(fold: Fold, modules: Collection[str]) -> list[str]:
    """Numbers of the blocks with a reader."""
    patterns = [re.compile(re.escape(reader).replace(r"\*", "([0-9]+)")) for reader in fold.readers]
    found = (pattern.fullmatch(name) for pattern in patterns for name in modules)
    return sorted({match[1] for match in found if match}, key=int)


def _group(checkpoint: Checkpoint, plan: Plan, fold: Fold, number: str) -> Group | None:
    """The channels of one block; None if it has none, or scaling them would not be exact."""
    group = Group()
    read: dict[tuple[str, int], int] = {}
    sizes = set()
    for reader in fold.readers:
        name = reader.replace("*", number) + names.WEIGHT
        if name not in plan.sources:
            continue
        outputs, inputs = plan.shapes[name]
        start = outputs if fold.columns == "rest" else 0
        sizes.add({"all": inputs, "first": outputs, "rest": inputs - outputs}[fold.columns])
        for piece in plan.sources[name]:
            read[piece.tensor, start] = read.get((piece.tensor, start), 0) + piece.stop - piece.start
    if len(sizes) != 1:
        return None
    channels = factors = sizes.pop()
    for rows in fold.givers:
        module = rows.module.replace("*", number)
        if module + names.WEIGHT not in plan.sources:
            continue
        height = plan.shapes[module + names.WEIGHT][0]
        if fold.head and height < channels:
            factors = height
            group.head, group.repeat = plan.shapes[fold.head.replace("*", number) + names.WEIGHT][0], channels // height
        start = rows.chunk * factors + (height if rows.chunk < 0 else 0)
        if not 0 <= start <= height - factors or rows.of not in (None, height / factors):
            return None
        if rows.plus_one and module + names.BIAS not in plan.sources:
            return None
        for suffix in (names.WEIGHT, names.BIAS):
            places = list(_runs(plan, module + suffix, start, factors))
            group.rows += places
            group.ones += places if rows.plus_one and suffix == names.BIAS else []
    group.columns = [Place(tensor, start, 0, channels) for tensor, start in read]
    infos = {place.tensor: checkpoint.tensors[plan.full_names[place.tensor]] for place in (*group.columns, *group.rows)}
    plain = all(info.dtype in PLAIN for info in infos.values())
    whole = all(infos[tensor].shape[0] == height for (tensor, _), height in read.items())
    return group if group.rows and plain and whole else None


def _runs(plan: Plan, name: str, start: int, count: int) -> Iterator[Place]:
    """The runs of some rows of a tensor of diffusers in the checkpoint."""
    top = 0
    for piece in plan.sources.get(name, ()):
        height = piece.stop - piece.start
        low, high = max(start, top), min(start + count, top + height)
        if low < high:
            yield Place(piece.tensor, piece.start + low - top, low - start, high - low)
        top += height
