"""Where channels can be scaled on their way into linear layers without changing the network, as data.

A layer's input channels may be multiplied by any factors f, if its weight's columns are divided by them and whatever
gives these channels is multiplied: W x = (W / f) (f x). Four places of diffusion transformers give channels so that
multiplying them is exact and costs nothing:

    modulated norms    (1 + scale) · norm + shift, with scale and shift rows of the modulation: f · shift, and
                       f · (1 + scale) = 1 + (f · scale + f - 1)
    plain norms        their weight and bias
    attention          mixes tokens and not channels, so the value rows of all streams that it mixes
    gated MLPs         gate · linear: the rows of the linear branch

Everything that reads the channels must be divided, and everything that gives them multiplied; a test runs every family
to see that nothing was forgotten. Names are those of diffusers' classes, `*` is a block's number and `{a,b}` stands for
both; names that a checkpoint lacks are passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Columns = Literal["all", "first", "rest"]


@dataclass(frozen=True)
class Rows:
    """Rows of a module's weight and bias that scale channels, one row for each.

    Attributes:
        module: the module: a linear layer or a norm.
        chunk: which run of as many rows as there are channels; negative from the end.
        of: how many such runs the module must have; any number where None.
        plus_one: what the rows give counts from 1: a modulation's scale.
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
        columns: which columns of the readers: all, as many of the first as the reader has outputs (what attention gives
            to a layer that reads an MLP beside it), or the rest.
        head: a norm over the channels of one attention head, where keys and values have fewer heads than queries.
    """

    readers: tuple[str, ...]
    givers: tuple[Rows, ...]
    columns: Columns = "all"
    head: str = ""


def modulated(modulation: str, readers: str, shift: int = 0, scale: int | None = None, of: int | None = None) -> Fold:
    """A norm whose modulation shifts it by one run of rows and scales it by another, the next one by default."""
    scale = shift + 1 if scale is None else scale
    rows = (Rows(modulation, shift, of), Rows(modulation, scale, of, plus_one=True))
    return Fold(spread(readers), rows)


def normed(norm: str, readers: str) -> Fold:
    """A norm with weights of its own."""
    return Fold(spread(readers), (Rows(norm),))


def given(rows: str, readers: str, chunk: int = 0, columns: Columns = "all", head: str = "") -> Fold:
    """What linear layers give to others channel by channel: through attention, or through a gate."""
    return Fold(spread(readers), tuple(Rows(module, chunk) for module in spread(rows)), columns, head)


def spread(names: str) -> tuple[str, ...]:
    """Names with every alternative in braces in turn.

    >>> spread("attn.{to_q,to_k}")
    ('attn.to_q', 'attn.to_k')
    """
    found = re.search(r"\{([^}]*)\}", names)
    if found is None:
        return (names,)
    return tuple(name for part in found[1].split(",") for name in spread(names.replace(found[0], part, 1)))
