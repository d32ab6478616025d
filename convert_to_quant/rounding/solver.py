"""Error feedback on the quadratic form of a layer; see the docstring of the package."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..formats.record import Format, Lattice, spans
from ..formats.rotation import rotate

DAMPING = 0.05
"""Share of the mean of H's diagonal that is added to it for error feedback.

Prompts correlate channels differently from noise: with the usual 1 %, "plain" loses 0.4 dB in W4A8 and 0.5 dB in W6A8
(docs/experiments.md).
"""

BLOCK = 128
"""Columns whose feedback is applied to all later columns at once."""

UNGROUPED = 32
"""Columns that are rounded together if a whole row shares one scale."""


def error_of(weight_OI: Tensor, rounded_OI: Tensor, moments_II: Tensor) -> Tensor:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) per row, float64 [out]."""
    error = (weight_OI - rounded_OI).double()
    return ((error @ moments_II.double()) * error).sum(1)


def rotated_moments(moments_II: Tensor, group: int) -> Tensor:
    """The second moments of rotated inputs, float64."""
    wide = moments_II.double()
    return rotate(rotate(wide, group).T, group) if group else wide


def round_weight(weight_OI: Tensor, moments_II: Tensor, fmt: Format) -> dict[str, Tensor]:
    """Round a weight, float32 [out, in], to a `roundable` format, by the moments of its inputs on the same device.

    Returns:
        The stored tensors, by suffix.
    """
    parts = fmt.quantized(weight_OI)
    nearest = fmt.lattice(parts)
    group = fmt.group(fmt.config((weight_OI.shape[0], weight_OI.shape[1]), 0))
    target = rotate(weight_OI, group)
    moments = rotated_moments(moments_II, group)
    mean = moments.diagonal().mean()
    if not mean > 0:
        return parts
    order = _order(moments.diagonal(), nearest.group)
    groups = order[:: nearest.group] // nearest.group if nearest.group else order[:1] * 0
    spread, cost = _spread(moments[order][:, order], DAMPING * mean)
    fed_back = _feed_back(target[:, order], spread, cost, _permuted(nearest, order, groups))
    found = _permuted(fed_back, order.argsort(), groups.argsort())
    errors = (error_of(target, lattice.real * lattice.unit, moments) for lattice in (nearest, found))
    keep = torch.lt(*errors).unsqueeze(1)
    positions, numbers = (
        torch.where(keep, *pair) for pair in ((nearest.positions, found.positions), (nearest.numbers, found.numbers))
    )
    return fmt.stored(replace(nearest, positions=positions, numbers=numbers), parts)


def _permuted(lattice: Lattice, order: Tensor, groups: Tensor) -> Lattice:
    return replace(lattice, positions=lattice.positions[:, order], numbers=lattice.numbers[:, groups])


def _spread(moments: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The effect of an error of each column on later columns, float32 [in, in], and the cost of such an error, [in].

    Adds the damping to the diagonal of `moments`, float64 [in, in], in place.
    """
    moments.diagonal().add_(damping)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    diagonal = factor.diagonal().clone()
    return factor.div_(diagonal.unsqueeze(1)).float(), diagonal.square().reciprocal().float()


def _feed_back(target: Tensor, spread: Tensor, cost: Tensor, nearest: Lattice) -> Lattice:
    """Round the columns of a target [out, in] in turn; each compensates for the errors of the columns before it.

    The target and the inputs of `_spread` are rotated if the format rotates.
    """
    wanted = target / nearest.unit
    size = nearest.group or math.gcd(UNGROUPED, wanted.shape[1])
    positions, numbers = torch.empty_like(nearest.positions), nearest.numbers.clone()
    for block in spans(wanted.shape[1], BLOCK):
        errors = torch.empty_like(wanted[:, block])
        for inside in spans(block.stop - block.start, size):
            span = slice(block.start + inside.start, block.start + inside.stop)
            place = span.start // nearest.group if nearest.group else 0
            tried = _near(nearest, numbers[:, place])
            given = wanted[:, span], spread[span, span], cost[span], nearest.levels(tried)
            nearest_plane = _one_launch(wanted.device, *(x.shape for x in given)) if wanted.is_cuda else _nearest_plane
            positions[:, span], errors[:, inside], best = nearest_plane(*given)
            numbers[:, place] = tried.gather(1, best).squeeze(1)
            later = slice(span.stop, block.stop)
            wanted[:, later] -= errors[:, inside] @ spread[span, later]
        wanted[:, block.stop :] -= errors @ spread[block, block.stop :]
    return replace(nearest, positions=positions, numbers=numbers)


def _order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by the size of their inputs, largest first; those of a group stay together."""
    size = group or 1
    by_group = diagonal.reshape(-1, size)
    inside = by_group.argsort(1, descending=True)
    outside = by_group.sum(1).argsort(descending=True)
    return (outside.unsqueeze(1) * size + inside[outside]).flatten()


def _near(lattice: Lattice, numbers: Tensor) -> Tensor:
    """Numbers of scales in reach, [out, tried]."""
    steps = torch.arange(lattice.reach[0], lattice.reach[1] + 1, device=numbers.device)
    return (numbers.unsqueeze(1) + steps).clamp_(0, len(lattice.scales) - 1)


def _nearest_plane(wanted: Tensor, spread: Tensor, cost: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round some columns in turn with feedback, for each of several scales, and take the best.

    Args:
        wanted: [out, n].
        spread: see `_spread`, [n, n].
        cost: see `_spread`, [n].
        levels: possible values of weights for each scale, ascending, [out, tried, K].

    Returns:
        Positions in the levels [out, n], the errors of the columns when they were rounded [out, n], and the number of
        the best scale [out, 1].
    """
    between = (levels[..., 1:] + levels[..., :-1]) / 2
    left = wanted.T.unsqueeze(2).repeat(1, 1, levels.shape[1])
    positions = torch.empty(left.shape, dtype=torch.int64, device=left.device)
    for column in range(len(left)):
        at = torch.searchsorted(between, left[column].unsqueeze(2))
        positions[column] = at.squeeze(2)
        left[column] -= levels.gather(2, at).squeeze(2)
        left[column + 1 :].addcmul_(spread[column, column + 1 :, None, None], left[column], value=-1)
    best = (left.square() * cost[:, None, None]).sum(0).argmin(1, keepdim=True)
    chosen = best.expand(len(left), -1, 1)
    return positions.gather(2, chosen).squeeze(2).T, left.gather(2, chosen).squeeze(2).T, best


class OneLaunch:
    """`_nearest_plane` on a GPU as one launch (a CUDA graph) instead of hundreds, which would wait for the host.

    Arguments have the shapes and device of the examples. The next call overwrites the result. For one thread at a time.
    """

    def __init__(self, *examples: Tensor) -> None:
        self.given, self.graph = examples, torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(examples[0].device)
        aside = torch.cuda.Stream(here.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            _nearest_plane(*examples)  # initializes libraries, which cannot be captured
            self.graph.capture_begin(capture_error_mode="thread_local")
            self.found = _nearest_plane(*examples)
            self.graph.capture_end()
        here.wait_stream(aside)

    def __call__(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_nearest_plane`."""
        for own, each in zip(self.given, given, strict=True):
            own.copy_(each)
        self.graph.replay()
        return self.found


@lru_cache(maxsize=16)
def _one_launch(device: torch.device, *shapes: torch.Size) -> OneLaunch:
    return OneLaunch(*(torch.zeros(shape, device=device) for shape in shapes))
