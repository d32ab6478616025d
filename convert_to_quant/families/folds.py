"""Channels that can be scaled on their way into linear layers without changing the network, as data.

A layer's input channels may be multiplied by any factors f if its weight's columns are divided by them and the source
of these channels is multiplied: W x = (W / f) (f x). In diffusion transformers, four sources can be scaled exactly and
at no cost:

    modulated norms    (1 + scale) · norm + shift, with scale and shift rows of the modulation: f · shift, and
                       f · (1 + scale) = 1 + (f · scale + f - 1)
    plain norms        their weight and bias
    attention          mixes tokens, not channels, so the value rows of all streams that it mixes
    gated MLPs         gate · linear: the rows of the linear branch

Every reader of the channels must be divided, and every source multiplied; a test runs every family. Names are those of
diffusers' classes, `*` is a block's number and `{a,b}` stands for both; missing names are skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Columns = Literal["all", "first", "rest"]


@dataclass(frozen=True)
class Rows:
    """Rows of a module's weight and bias that scale channels, one row per channel.

    Attributes:
        module: a linear layer or a norm.
        chunk: index of the run of rows, from the end if negative.
        of: number of runs that the module must have, if not None.
        plus_one: the rows compute a factor minus 1: a modulation's scale.
    """

    module: str
    chunk: int = 0
    of: int | None = None
    plus_one: bool = False


@dataclass(frozen=True)
class Fold:
    """Channels that can be scaled.

    Attributes:
        readers: all modules that read them.
        givers: all rows that scale them.
        columns: of the readers: all, as many of the first as the reader has outputs (attention, in a layer that also
            reads an MLP), or the rest.
        head: a norm over the channels of one attention head, if keys and values have fewer heads than queries.
    """

    readers: tuple[str, ...]
    givers: tuple[Rows, ...]
    columns: Columns = "all"
    head: str = ""


def modulated(modulation: str, readers: str, shift: int = 0, scale: int | None = None, of: int | None = None) -> Fold:
    """A norm with a modulation: `shift` and `scale` are runs of its rows, adjacent by default."""
    scale = shift + 1 if scale is None else scale
    rows = (Rows(modulation, shift, of), Rows(modulation, scale, of, plus_one=True))
    return Fold(spread(readers), rows)


def normed(norm: str, readers: str) -> Fold:
    """A norm with its own weights."""
    return Fold(spread(readers), (Rows(norm),))


def given(rows: str, readers: str, chunk: int = 0, columns: Columns = "all", head: str = "") -> Fold:
    """Outputs of linear layers that reach others channel by channel: through attention, or through a gate."""
    return Fold(spread(readers), tuple(Rows(module, chunk) for module in spread(rows)), columns, head)


def spread(names: str) -> tuple[str, ...]:
    """All names that alternatives in braces stand for.

    >>> spread("attn.{to_q,to_k}")
    ('attn.to_q', 'attn.to_k')
    """
    found = re.search(r"\{([^}]*)\}", names)
    if found is None:
        return (names,)
    return tuple(name for part in found[1].split(",") for name in spread(names.replace(found[0], part, 1)))
