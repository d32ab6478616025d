"""Kinds of adapters: their tensors, and the change of a weight that these define.

An adapter of a layer [out, in] is a few small tensors under one name. `KINDS` maps each set of tensors to ΔW, as in the
papers; a kind is one entry.

    LoRA              up · down, with `mid` in between where a convolution was split further
    LoHa              (w1_a · w1_b) ∘ (w2_a · w2_b)                     arXiv 2108.06098
    LoKr              w1 ⊗ w2, either of which may be a product        arXiv 2212.10650
    full difference   the change itself

ΔW is multiplied by alpha / rank if the file has an alpha and the kind has a rank. With a magnitude m (DoRA, arXiv
2402.09353), the weight becomes m · (W + ΔW) / ‖W + ΔW‖, with norms per row or per column, as the shape of m shows.
LyCORIS and PEFT compute the same (tests compare with both). ComfyUI 0.33 divides rows by ‖W‖ instead, which is the same
to first order.

A `Matrix` is such a formula, evaluated for the rows requested, so a change needs no more memory than the rows merged at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, to_float32
from .checkpoint.reader import FLOAT_DTYPES
from .errors import LoraError

Float32 = NDArray[np.float32]
Rows = slice | NDArray[np.int64]
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix whose rows are computed on request, float32; its file and first tensor are for messages."""

    shape: tuple[int, int]
    rows: Callable[[Rows], Float32]
    checkpoint: Checkpoint
    tensor: str

    def _made(self, shape: tuple[int, int], rows: Callable[[Rows], Float32]) -> Matrix:
        return Matrix(shape, rows, self.checkpoint, self.tensor)

    @property
    def T(self) -> Matrix:  # noqa: N802 - as numpy has it
        """Transposed; for small matrices, since all of it is read."""
        return self._made(self.shape[::-1], lambda rows: self.rows(ALL).T[rows])

    def __matmul__(self, other: Matrix) -> Matrix:
        """The matrix product; the ranks must agree."""
        if self.shape[1] != other.shape[0] or not self.shape[1]:
            problem = f"its rank is {self.shape[1]}, but {other.tensor} has rank {other.shape[0]}"
            if not self.shape[1] and not other.shape[0]:
                problem = f"the rank of {other.tensor} is 0"
            raise LoraError(problem, path=self.checkpoint.path, tensor=self.tensor)
        return self._made((self.shape[0], other.shape[1]), lambda rows: self.rows(rows) @ other.rows(ALL))

    def __mul__(self, other: Matrix) -> Matrix:
        """The elementwise product; the shapes must agree."""
        if self.shape != other.shape:
            problem = f"it makes {list(self.shape)}, but {other.tensor} makes {list(other.shape)}"
            raise LoraError(problem, path=self.checkpoint.path, tensor=self.tensor)
        return self._made(self.shape, lambda rows: self.rows(rows) * other.rows(rows))

    def kron(self, other: Matrix) -> Matrix:
        """The Kronecker product: row i is row i // n of this one times row i % n of the other, which has n rows."""
        height, shape = other.shape[0], (self.shape[0] * other.shape[0], self.shape[1] * other.shape[1])

        def rows(wanted: Rows) -> Float32:
            outer, inner = np.divmod(np.arange(shape[0])[wanted], height)
            made: Float32 = self.rows(ALL)[outer][:, :, None] * other.rows(ALL)[inner][:, None, :]
            return made.reshape(-1, shape[1])

        return self._made(shape, rows)


def stored(checkpoint: Checkpoint, tensor: str) -> Matrix:
    """A tensor of a file as a matrix; a convolution's kernel dimensions become columns.

    Raises:
        LoraError: It is not a matrix of finite floats.
    """
    info = checkpoint.tensors[tensor]
    refusal = partial(LoraError, path=checkpoint.path, tensor=tensor)
    if info.dtype not in FLOAT_DTYPES:
        raise refusal(f"a factor should be floats, found {info.dtype}")
    if len(info.shape) < 2:
        raise refusal(f"a factor should have 2 dimensions, found shape {list(info.shape)}")

    def rows(wanted: Rows) -> Float32:
        bits = checkpoint.bits(tensor, wanted) if isinstance(wanted, slice) else checkpoint.bits(tensor)[wanted]
        values = to_float32(bits, info.dtype)
        return values.reshape(len(values), shape[1])

    shape = info.shape[0], info.elements // max(info.shape[0], 1)
    if not np.isfinite(rows(ALL)).all():
        raise refusal("has NaN or infinite values", hint="the file is damaged")
    return Matrix(shape, rows, checkpoint, tensor)


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        title: Its name for people.
        change: Computes ΔW, without alpha / rank, from its tensors by role.
        rank: The role of the tensor whose number of rows is the rank; "" if alpha is not used.
    """

    title: str
    change: Callable[[Mapping[str, Matrix]], Matrix]
    rank: str = ""


WHOLE, PRODUCT, TUCKER = ("w{}",), ("w{}_a", "w{}_b"), ("w{}_a", "w{}_b", "t{}")
"""The tensors that may store one of the two matrices of LoHa or LoKr."""


def _half(parts: Mapping[str, Matrix], kind: str, side: int) -> Matrix:
    """One of the two matrices of LoHa or LoKr."""
    whole, a, b, t = (f"{kind}_{name}" for name in (f"w{side}", f"w{side}_a", f"w{side}_b", f"t{side}"))
    if whole in parts:
        return parts[whole]
    return (parts[a].T @ parts[t] if t in parts else parts[a]) @ parts[b]


def _of_halves(
    title: str, kind: str, joined: Callable[[Matrix, Matrix], Matrix], ways: Sequence[tuple[str, ...]]
) -> Iterator[tuple[frozenset[str], Kind]]:
    """The kinds that consist of two matrices, for all ways to store each."""

    def change(parts: Mapping[str, Matrix]) -> Matrix:
        return joined(_half(parts, kind, 1), _half(parts, kind, 2))

    for one, two in product(ways, repeat=2):
        roles = [f"{kind}_{name.format(side)}" for side, names in ((2, two), (1, one)) for name in names]
        yield frozenset(roles), Kind(title, change, next((role for role in roles if role.endswith("_b")), ""))


KINDS: Mapping[frozenset[str], Kind] = {
    frozenset(("down", "up")): Kind("LoRA", lambda parts: parts["up"] @ parts["down"], "down"),
    frozenset(("down", "mid", "up")): Kind("LoRA", lambda parts: parts["up"] @ parts["mid"] @ parts["down"], "down"),
    **dict(_of_halves("LoHa", "hada", Matrix.__mul__, (PRODUCT, TUCKER))),
    **dict(_of_halves("LoKr", "lokr", Matrix.kron, (WHOLE, PRODUCT, TUCKER))),
    frozenset(("diff",)): Kind("full difference", lambda parts: parts["diff"]),
}
"""Roles of an adapter's tensors (`names.ADAPTER_ROLES`) -> their kind."""


def kind_of(roles: frozenset[str]) -> Kind | str:
    """The kind of adapter with these roles, or the role that the likeliest kind still lacks; "" if there is none.

    >>> kind_of(frozenset({"down"})), kind_of(frozenset({"up", "lokr_w1"}))
    ('up', '')
    """
    if roles in KINDS:
        return KINDS[roles]
    return next((min(whole - roles) for whole in sorted(KINDS, key=len) if roles < whole), "")
