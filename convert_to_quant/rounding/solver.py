"""Error feedback and descent on the quadratic form of a layer; see the package's docstring."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..formats.record import Format, Lattice, spans
from ..formats.rotation import rotate

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it for error feedback."""

SWEEPS = 0
"""Of descent at most; it ends before where one takes less than `LEAST_GAIN` of the error. None by default: what it
gains on the moments it is given, held-out prompts do not see (docs/rounding.md)."""

LEAST_GAIN = 1e-3
BLOCK = 128
"""Columns whose feedback goes to all later ones at once."""

UNGROUPED = 32
"""Columns that are rounded together where all of a row share one scale."""


def error_of(weight_OI: Tensor, rounded_OI: Tensor, moments_II: Tensor) -> Tensor:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) by rows, float64 [out]."""
    error = (weight_OI - rounded_OI).double()
    return ((error @ moments_II.double()) * error).sum(1)


def rotated_moments(moments_II: Tensor, group: int) -> Tensor:
    """The second moments of rotated inputs, float64."""
    wide = moments_II.double()
    return rotate(rotate(wide, group).T, group) if group else wide


def round_weight(
    weight_OI: Tensor,
    moments_II: Tensor,
    fmt: Format,
    *,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
    ordered: bool = True,
) -> dict[str, Tensor]:
    """Round a weight for the inputs of its layer.

    Args:
        weight_OI: float32 [out, in].
        moments_II: Σ x xᵀ of the inputs, [in, in], on the same device.
        fmt: the format, one that is `roundable`.
        damping: see `DAMPING`.
        sweeps: of descent at most; 0 for error feedback alone.
        ordered: round the columns of the largest inputs first, as far as groups allow.

    Returns:
        What is stored, by suffix.
    """
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    parts = fmt.quantized(weight_OI)
    nearest = fmt.lattice(parts)
    group = fmt.group(fmt.config(shape, 0))
    target = rotate(weight_OI, group)
    moments = rotated_moments(moments_II, group)
    mean = moments.diagonal().mean()
    if not mean > 0:
        return parts
    solver = _Solver(target, moments, nearest, damping, ordered)
    found = solver.feed_back()
    for _ in range(sweeps):
        found = solver.rescale(found)
        found, gained = solver.descend(found)
        if gained < LEAST_GAIN:
            break
    if sweeps:
        found = solver.rescale(found)
    return fmt.stored(solver.better(found), parts)


class _Solver:
    """A weight and the quadratic form that its rounding should make small, with columns in the order of rounding.

    Args:
        weight_OI: float32 [out, in], rotated where the format rotates.
        moments: float64 [in, in], of inputs that are rotated likewise.
        nearest: the weight rounded to nearest.
        damping: share of the mean of the diagonal that is added to it.
        ordered: whether columns of large inputs come first.
    """

    def __init__(self, weight_OI: Tensor, moments: Tensor, nearest: Lattice, damping: float, ordered: bool) -> None:
        self.weight, self.moments = weight_OI, moments
        columns = weight_OI.shape[1]
        self.size = nearest.group or math.gcd(UNGROUPED, columns)
        self.order = _order(moments.diagonal(), nearest.group) if ordered else torch.arange(columns).to(moments.device)
        self.groups = self.order[:: nearest.group] // nearest.group if nearest.group else self.order[:1] * 0
        self.nearest = self._permuted(nearest, self.order, self.groups)
        self.target = weight_OI[:, self.order]
        damped = moments + damping * moments.diagonal().mean() * torch.eye(columns).to(moments)
        self.damped = damped[self.order][:, self.order]
        self.form = self.damped.float()

    @cached_property
    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the form inside of each group: its inverse, and `_normalized` of that; [groups, n, n] but for the last."""
        inside = torch.stack([self.damped[span, span] for span in spans(len(self.damped), self.size)])
        inverse = torch.linalg.inv(inside)
        return inverse.float(), *_normalized(torch.linalg.cholesky(inverse, upper=True))

    @staticmethod
    def _permuted(lattice: Lattice, order: Tensor, groups: Tensor) -> Lattice:
        return replace(lattice, positions=lattice.positions[:, order], numbers=lattice.numbers[:, groups])

    def _numbers(self, lattice: Lattice, span: slice) -> Tensor:
        """The numbers of the scales of columns that are rounded together, [out]."""
        return lattice.numbers[:, span.start // lattice.group if lattice.group else 0]

    def feed_back(self) -> Lattice:
        """Round all columns in turn, each making good what those before it did to the output."""
        lattice = self.nearest
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped))
        factor = torch.linalg.cholesky(inverse, upper=True)
        spread, cost = _normalized(factor)
        wanted = self.target / lattice.unit
        positions, numbers = torch.empty_like(lattice.positions), lattice.numbers.clone()
        for block in spans(wanted.shape[1], BLOCK):
            errors = torch.empty_like(wanted[:, block])
            for span in _within(block, self.size):
                tried = _near(lattice, self._numbers(lattice, span), lattice.reach)
                found = _nearest_plane(wanted[:, span], spread[span, span], cost[span], lattice, tried)
                positions[:, span], errors[:, _inside(span, block)], chosen, _ = found
                if lattice.group:
                    numbers[:, span.start // lattice.group] = chosen
                later = slice(span.stop, block.stop)
                wanted[:, later] -= errors[:, _inside(span, block)] @ spread[span, later]
            wanted[:, block.stop :] -= errors @ spread[block, block.stop :]
        return replace(lattice, positions=positions, numbers=numbers)

    def descend(self, lattice: Lattice) -> tuple[Lattice, float]:
        """Round every group anew for what the others are; and the share of the error that this took."""
        real = lattice.real
        slope = (real - self.target / lattice.unit) @ self.form
        before = ((real - self.target / lattice.unit) * slope * lattice.unit.square()).sum()
        gained = torch.zeros_like(before)
        positions, numbers = lattice.positions.clone(), lattice.numbers.clone()
        reach = max(lattice.reach[0], -1), min(lattice.reach[1], 1)
        for block in spans(real.shape[1], BLOCK):
            moved = torch.zeros_like(real[:, block])
            for span in _within(block, self.size):
                inverse, spread, cost = (part[span.start // self.size] for part in self.own)
                away = slope[:, span] @ inverse
                tried = _near(lattice, self._numbers(lattice, span), reach)
                at, _, number, error = _nearest_plane(real[:, span] - away, spread, cost, lattice, tried)
                saved = (slope[:, span] * away).sum(1) - error
                is_better = saved > 0
                gained += (saved.clamp(min=0).unsqueeze(1) * lattice.unit.square()).sum()
                positions[:, span] = torch.where(is_better.unsqueeze(1), at, positions[:, span])
                if lattice.group:
                    place = span.start // lattice.group
                    numbers[:, place] = torch.where(is_better, number, numbers[:, place])
                levels = lattice.levels(number)
                move = torch.where(is_better.unsqueeze(1), levels.gather(1, at) - real[:, span], 0)
                moved[:, _inside(span, block)] = move
                slope[:, span.start : block.stop] += move @ self.form[span, span.start : block.stop]
            slope[:, : block.start] += moved @ self.form[block, : block.start]
            slope[:, block.stop :] += moved @ self.form[block, block.stop :]
        return replace(lattice, positions=positions, numbers=numbers), float(gained / before.clamp(min=1e-30))

    def rescale(self, lattice: Lattice) -> Lattice:
        """The units of least error for these codes."""
        if not lattice.free:
            return lattice
        real = lattice.real
        pulled = real @ self.form
        own, along = (pulled * real).sum(1, keepdim=True), (pulled * self.target).sum(1, keepdim=True)
        if len(lattice.unit) == 1:
            own, along = own.sum(0, keepdim=True), along.sum(0, keepdim=True)
        unit = along / own
        is_sound = (unit > lattice.unit / 2) & (unit < lattice.unit * 2)
        return replace(lattice, unit=torch.where(is_sound, unit, lattice.unit))

    def better(self, found: Lattice) -> Lattice:
        """Rows of what was found, or rounded to nearest where that is better; columns as they are stored."""
        nearest = self.nearest
        errors = [
            error_of(self.target, lattice.real * lattice.unit, self.moments[self.order][:, self.order])
            for lattice in (nearest, found)
        ]
        if len(found.unit) == 1 and not torch.equal(found.unit, nearest.unit):
            errors = [error.sum(0, keepdim=True) for error in errors]
        keep = (errors[0] < errors[1]).unsqueeze(1)
        mixed: dict[str, Any] = {
            name: torch.where(keep, getattr(nearest, name), getattr(found, name))
            for name in ("positions", "numbers", "unit" if len(found.unit) == len(keep) else "positions")
        }
        back = self.order.argsort(), self.groups.argsort()
        return self._permuted(replace(found, **mixed), *back)


def _order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by the size of their inputs, the largest first; those of a group stand together."""
    size = group or 1
    by_group = diagonal.reshape(-1, size)
    inside = by_group.argsort(1, descending=True)
    outside = by_group.sum(1).argsort(descending=True)
    return (outside.unsqueeze(1) * size + inside[outside]).flatten()


def _normalized(factor: Tensor) -> tuple[Tensor, Tensor]:
    """What an error of one column makes of later ones, and what it costs; float32 [..., n, n] and [..., n]."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    return (factor / diagonal.unsqueeze(-1)).float(), diagonal.square().reciprocal().float()


def _within(block: slice, size: int) -> Iterator[slice]:
    for span in spans(block.stop - block.start, size):
        yield slice(block.start + span.start, block.start + span.stop)


def _inside(span: slice, block: slice) -> slice:
    return slice(span.start - block.start, span.stop - block.start)


def _near(lattice: Lattice, numbers: Tensor, reach: tuple[int, int]) -> Tensor:
    """Numbers of scales in reach, [out, tried]."""
    steps = torch.arange(reach[0], reach[1] + 1, device=numbers.device)
    return (numbers.unsqueeze(1) + steps).clamp_(0, len(lattice.scales) - 1)


def _nearest_plane(
    wanted: Tensor, spread: Tensor, cost: Tensor, lattice: Lattice, tried: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round some columns in turn with feedback, under each of several scales, and keep the best.

    Args:
        wanted: [out, n].
        spread: what an error of each column makes of later ones, [n, n].
        cost: what such an error costs, [n].
        lattice: the format's.
        tried: numbers of scales, [out, tried].

    Returns:
        Positions [out, n], the errors of the columns when they were rounded [out, n], numbers [out], errors [out].
    """
    levels = lattice.levels(tried)
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    left = wanted.T.unsqueeze(2).repeat(1, 1, tried.shape[1])
    positions = torch.empty(left.shape, dtype=torch.int64, device=left.device)
    for column in range(len(left)):
        at = torch.searchsorted(between, left[column].unsqueeze(2))
        positions[column] = at.squeeze(2)
        left[column] -= levels.gather(2, at).squeeze(2)
        left[column + 1 :].addcmul_(spread[column, column + 1 :, None, None], left[column], value=-1)
    error = (left.square() * cost[:, None, None]).sum(0)
    least, best = error.min(1)
    chosen = best.expand(len(left), -1).unsqueeze(2)
    return (
        positions.gather(2, chosen).squeeze(2).T,
        left.gather(2, chosen).squeeze(2).T,
        tried.gather(1, best.unsqueeze(1)).squeeze(1),
        least,
    )
