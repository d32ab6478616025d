"""LoRA files and their relatives: which layers of a checkpoint they change, and by how much.

Why it exists. An adapter changes a layer's weight, and with it the ranges of everything behind that layer move. Whoever
calibrates or converts a checkpoint with its adapters has to know exactly what belongs to which layer: a change on the
wrong layer is worse than none.

The maths. An adapter means, with the change ΔW of its kind (`adapters`),

    W[rows] += strength · (alpha / rank) · ΔW          alpha absent: alpha / rank = 1

where `rows` is all of the layer or, for a name like ``attn.to_k``, the slice that it has in a fused layer. With a
magnitude m (DoRA), V = W + (alpha / rank) · ΔW and W += strength · (m · V / ‖V‖ - W). Several adapters of one layer act
one after the other, in the order of the files.

How names are matched. `families.lora_names` knows every name that each layer may have, and the file's names are looked
up in it, without prefixes and separators, but whole: exactly or not at all. Of several layers that a name may mean, the
one whose shape fits is meant; if that does not decide, the name is reported as ambiguous, and so are two names of one
file that claim the same rows; neither is applied. Everything in a file ends up in one list of the report: matched,
unmatched, ambiguous, unsupported (other kinds, other shapes) or text encoder.

Merging. `merge_rows` adds adapters to a layer's rows before these are quantized. A quantizer's steps may be larger than
what an adapter adds: `Survival` measures how much of it is left.

Limits. numpy on the CPU, in float32. Factors stay in the mapped file and are widened when they are used, so a match
costs no memory. Factors of text encoders are never read. Ranges are found with changed linear layers alone; merging
also adds differences of biases and norms. What is for convolutions is reported. rsLoRA's alpha / sqrt(r) leaves no
trace in a file's tensors and is read as alpha / r, as ComfyUI does.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import names
from .adapters import ALL, Float32, Kind, Matrix, Rows, kind_of, stored
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.reader import FLOAT_DTYPES, INTEGER_DTYPES
from .errors import LoraError, OptionError, StrPath
from .families import LoraNames, Target, lora_names
from .layers import LayerTable, dequantize
from .names import (
    ADAPTER_ROLES,
    BIAS,
    UNSUPPORTED_ADAPTERS,
    WEIGHT,
    for_text_encoder,
    squeezed,
    strip_prefix,
    unwrap,
)
from .telling import plural

BESIDE = frozenset({"alpha", "magnitude", "bias", "reshape"})
"""Roles of tensors that stand beside those that make a change."""

BESIDE_TITLES = {"bias": "bias difference", "diff": "difference of a norm"}
SAMPLED_ROWS = 64
"""Rows that stand for the directions a change reads, where its kind has no factor that names them."""
BAND_ROWS = 256
"""Rows of a weight that are read at a time to find norms of its columns."""

LEFT_OVER = ("unmatched", "ambiguous", "unsupported", "text_encoder")
"""Lists of what is not applied."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of a file.

    Attributes:
        name: The tensors' common name, without their suffixes.
        kind: What it is.
        change: ΔW without `scale`, [out, in].
        scale: alpha / rank, or 1.
        rank: Where its kind has one.
        directions: The factor whose rows are what it reads of inputs, where its kind has one.
        magnitude_tensor: DoRA's magnitude, of one value per row, or per column where `per_column`.
        kernel: It is of a convolution that sees more than single points.
    """

    name: str
    kind: Kind
    change: Matrix
    scale: float = 1.0
    rank: int | None = None
    directions: Matrix | None = None
    magnitude_tensor: str | None = None
    per_column: bool = False
    kernel: bool = False


@dataclass(eq=False)
class Lora:
    """A LoRA file that was read and found sound.

    Attributes:
        checkpoint: The open file.
        strength: The user's factor on all of it.
        adapters: By name.
        beside: Name, and role ("bias" or "diff") -> a tensor that is the difference of a bias or a norm.
        unsupported: Names, and what about each cannot be applied.
        text_encoder: Names of a text encoder's adapters.
        unknown: Tensors of no known kind.
    """

    checkpoint: Checkpoint
    strength: float = 1.0
    adapters: dict[str, Adapter] = field(default_factory=dict)
    beside: dict[tuple[str, str], str] = field(default_factory=dict)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    text_encoder: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path


@dataclass(frozen=True, eq=False)
class Delta:
    """What one adapter does to one layer.

    Attributes:
        lora: The file.
        adapter: The adapter.
        target: The layer, as the checkpoint names it, and the rows that it means there.
    """

    lora: Lora
    adapter: Adapter
    target: Target

    @property
    def scale(self) -> float:
        """The factor on the change: strength · alpha / rank."""
        return self.lora.strength * self.adapter.scale

    def span(self, out_features: int) -> tuple[int, int]:
        """First row and row after the last of a layer of so many rows."""
        return self.target.rows or (0, out_features)

    def apply(self, weight_OI: Float32, start: int, column_norms_I: Float32 | None = None) -> None:
        """Change some of the rows that it means, in place.

        Args:
            weight_OI: float32 [rows, in].
            start: The first of them, counted from the first row that it means.
            column_norms_I: ‖V‖ of each column, float32 [in], where the magnitude is per column.
        """
        rows = self._rows(start, len(weight_OI))
        if self.adapter.magnitude_tensor is None:
            change_OI = self.adapter.change.rows(rows)
            change_OI *= np.float32(self.scale)
            weight_OI += change_OI
            return
        change_OI = self.decomposed(weight_OI, start)
        magnitude = self.lora.checkpoint.float32(self.adapter.magnitude_tensor).reshape(-1)
        norms = column_norms_I
        if norms is None:
            norms, magnitude = np.linalg.norm(change_OI, axis=1, keepdims=True), magnitude[rows, None]
        change_OI *= magnitude / np.maximum(norms, np.finfo(np.float32).tiny)
        change_OI -= weight_OI
        weight_OI += np.float32(self.lora.strength) * change_OI

    def decomposed(self, weight_OI: Float32, start: int) -> Float32:
        """V = W + (alpha / rank) · ΔW of some rows; arguments as of `apply`."""
        change_OI = self.adapter.change.rows(self._rows(start, len(weight_OI)))
        decomposed: Float32 = weight_OI + np.float32(self.adapter.scale) * change_OI
        return decomposed

    def _rows(self, start: int, count: int) -> Rows:
        """The adapter's rows for some that it means, as the file has them."""
        start += self.target.first
        if not self.target.swap_halves:
            return slice(start, start + count)
        height = self.adapter.change.shape[0]
        swapped: Rows = (np.arange(start, start + count) + height // 2) % height
        return swapped


@dataclass(frozen=True)
class Finding:
    """Something in a LoRA file that is not applied.

    Attributes:
        file: Path of the file.
        name: An adapter's name, or a tensor's.
        reason: Why.
        layers: The checkpoint's layers it is about, where known.
    """

    file: str
    name: str
    reason: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Addition:
    """Values that a file adds to a bias, a norm, or another tensor that no adapter changes.

    Attributes:
        lora: The file.
        tensor: Its tensor.
        target: The checkpoint's tensor, and the values of it that it means.
    """

    lora: Lora
    tensor: str
    target: Target


Weights = Callable[[str, slice], Float32]
"""Some rows of a layer's weight before anything is added, float32 [rows, in]."""


@dataclass
class LoraMatch:
    """What some LoRA files do to a checkpoint's layers, and what of them is left over.

    Attributes:
        shapes: The checkpoint's layers -> (out, in).
        weights: Reads their weights, where they are at hand: DoRA's magnitudes per column need all rows.
        matched: Layer -> what is added to it, in the order of the files.
        beside: Other tensors of the checkpoint -> what is added to them; only for merging.
        unmatched: Adapters whose names fit no layer, and tensors of no known kind.
        ambiguous: Adapters that may mean several parts, or that claim rows which another one of their file claims.
        unsupported: Adapters of kinds or shapes that cannot be applied, with their layers.
        text_encoder: Adapters of text encoders.
    """

    shapes: dict[str, tuple[int, int]]
    weights: Weights | None = None
    matched: dict[str, list[Delta]] = field(default_factory=dict)
    beside: dict[str, list[Addition]] = field(default_factory=dict)
    unmatched: list[Finding] = field(default_factory=list)
    ambiguous: list[Finding] = field(default_factory=list)
    unsupported: list[Finding] = field(default_factory=list)
    text_encoder: list[Finding] = field(default_factory=list)
    _norms: dict[tuple[str, int], Float32] = field(default_factory=dict, repr=False)

    def add_to(self, weight_OI: Float32, layer: str, start: int = 0, count: int | None = None) -> None:
        """Merge the first `count` adapters of a layer, or all, into its rows from `start` on, float32 [rows, in]."""
        assert weight_OI.shape[1] == self.shapes[layer][1]
        for number, delta in enumerate(self.matched.get(layer, ())[:count]):
            first, last = delta.span(self.shapes[layer][0])
            low, high = max(start, first), min(start + len(weight_OI), last)
            if low < high:
                norms = self._column_norms(layer, number) if delta.adapter.per_column else None
                delta.apply(weight_OI[low - start : high - start], low - first, norms)

    def _column_norms(self, layer: str, number: int) -> Float32:
        """‖V‖ per column for an adapter of a layer, float32 [in]; all its rows are read, once."""
        if (layer, number) not in self._norms:
            assert self.weights is not None
            delta = self.matched[layer][number]
            first, last = delta.span(self.shapes[layer][0])
            squares = np.zeros(self.shapes[layer][1])
            for start in range(first, last, BAND_ROWS):
                weight_OI = self.weights(layer, slice(start, min(start + BAND_ROWS, last)))
                self.add_to(weight_OI, layer, start, number)
                squares += np.square(delta.decomposed(weight_OI, start - first), dtype=np.float64).sum(0)
            self._norms[layer, number] = np.sqrt(squares).astype(np.float32)
        return self._norms[layer, number]

    @property
    def loras(self) -> list[Lora]:
        """The files of which something is applied, in their order."""
        found = [delta.lora for some in self.matched.values() for delta in some]
        found += [each.lora for some in self.beside.values() for each in some]
        return list(dict.fromkeys(found))

    def changed_tensor(self, checkpoint: Checkpoint, name: str) -> Float32:
        """A tensor of `beside` with everything added, float32."""
        values: Float32 = checkpoint.float32(name)
        for each in self.beside[name]:
            added = each.lora.checkpoint.float32(each.tensor).reshape(-1)
            if each.target.swap_halves:
                added = np.roll(added, len(added) // 2)
            part = values.reshape(-1)[slice(*(each.target.rows or (0, None)))]
            part += np.float32(each.lora.strength) * added[each.target.first : each.target.first + len(part)]
        return values

    def summary(self) -> str:
        """One line for the user, e.g. "304 adapters on 152 layers, 2 unmatched"."""
        adapters = sum(len(deltas) for deltas in self.matched.values())
        rest = "".join(f", {len(found)} {kind}" for kind, found in self._left_over().items() if found)
        rest = rest.replace("text_encoder", "for text encoders")
        beside = f", {len(self.beside)} biases and norms" if self.beside else ""
        return f"{plural(adapters, 'adapter')} on {plural(len(self.matched), 'layer')}{beside}{rest}"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values: names, files, kinds, ranks, scales and rows, no weights."""

        def told(delta: Delta) -> dict[str, Any]:
            adapter = delta.adapter
            kind = {"kind": adapter.kind.title, "rank": adapter.rank, "dora": adapter.magnitude_tensor is not None}
            place = {"scale": delta.scale, "rows": delta.target.rows}
            return {"file": str(delta.lora.path), "name": adapter.name, **kind, **place}

        return {
            "matched": {layer: [told(delta) for delta in deltas] for layer, deltas in self.matched.items()},
            "beside": {name: [str(each.lora.path) for each in some] for name, some in self.beside.items()},
            **{kind: [asdict(finding) for finding in found] for kind, found in self._left_over().items()},
        }

    def notes(self) -> list[str]:
        """Lines for the user: the summary, then what is left over, by reason, with its count and first names."""
        lines = [f"LoRA: {self.summary()}"]
        for kind, found in self._left_over().items():
            for reason, count in Counter(finding.reason for finding in found).items():
                names = [finding.name for finding in found if finding.reason == reason]
                more = f" and {count - len(names[:3])} more" if count > 3 else ""
                lines.append(f"LoRA {kind.replace('_', ' ')}: {', '.join(names[:3])}{more} ({reason})")
        return lines

    def _left_over(self) -> dict[str, list[Finding]]:
        return {kind: getattr(self, kind) for kind in LEFT_OVER}


def merge_rows(match: LoraMatch, layer: str, weight_OI: Float32, rows: tuple[int, int] | None = None) -> Float32:
    """A layer's weight, or some of its rows, with everything added that is matched to it.

    Each adapter adds strength · alpha / rank · B A in float32. 16-bit weights widen to float32 exactly, so what a
    quantizer makes of the result is rounded once, and not to 16 bits before.

    Args:
        match: The matched files, each with its strength.
        layer: The layer, as the checkpoint names it.
        weight_OI: float32 [stop - start, in], or [out, in] where `rows` is None; it stays as it is.
        rows: (start, stop) of the layer's rows that `weight_OI` holds.

    Returns:
        float32, of the same shape; `weight_OI` itself where nothing is matched.
    """
    if layer not in match.matched:
        return weight_OI
    merged_OI: Float32 = weight_OI.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # whoever rounds the weight says that it is not finite
        match.add_to(merged_OI, layer, rows[0] if rows else 0)
    return merged_OI


@dataclass
class Survival:
    """How much of a change of weights is left after they were rounded.

    Of the weights W, the merged ones W' = W + Δ, and what is stored instead of them, Q(W'), S = Q(W') - W is the change
    that is left:

        correlation   ⟨S, Δ⟩ / (‖S‖ ‖Δ‖)           1: S is Δ at some size, 0: Δ is gone; not centered
        decibels      10 log₁₀(‖Δ‖² / ‖S - Δ‖²)    0: the error is as large as the change itself

    ⟨S, Δ⟩ / ‖Δ‖² says nothing: it is 1 within 1 % in every format, since rounding to nearest is right on average. On
    normal weights and a LoRA of 1 % of their norm: FP8 per tensor 0.35 and -8.5 dB, INT8 per row 0.77 and
    1.7 dB; a LoRA of 10 %: 0.97 and 11.5 dB, 1.00 and 21.6 dB.

    Sums run over all values that were added, in float64, so it does not matter in which pieces these come, and those of
    several layers add up.

    Attributes:
        delta_energy: ‖Δ‖².
        left_energy: ‖S‖².
        product: ⟨S, Δ⟩.
        error_energy: ‖S - Δ‖².

    >>> survival = Survival()
    >>> w = np.float32([1, 1, 1, 1])
    >>> survival.add(w, w + np.float32([0.5, 0.5, 0.25, 0]), np.float32([1.5, 1.5, 1, 1]))
    >>> (round(survival.correlation, 4), round(survival.decibels, 2))
    (0.9428, 9.54)
    """

    delta_energy: float = 0.0
    left_energy: float = 0.0
    product: float = 0.0
    error_energy: float = 0.0

    def add(self, weight: Float32, merged: Float32, stored: Float32) -> None:
        """Count some values of W, W' = W + Δ and Q(W'), dequantized: float32, of one shape."""
        delta = np.subtract(merged, weight, dtype=np.float64).ravel()
        left = np.subtract(stored, weight, dtype=np.float64).ravel()
        self.delta_energy += float(delta @ delta)
        self.left_energy += float(left @ left)
        self.product += float(left @ delta)
        left -= delta
        self.error_energy += float(left @ left)

    def __add__(self, other: Survival) -> Survival:
        return Survival(*(one + another for one, another in zip(astuple(self), astuple(other), strict=True)))

    @property
    def correlation(self) -> float:
        """Of S and Δ, -1 to 1; NaN where either is zero everywhere."""
        norms = math.sqrt(self.left_energy * self.delta_energy)
        return self.product / norms if norms else math.nan

    @property
    def decibels(self) -> float:
        """Of Δ over the error; infinite where there is no error, NaN where there is no Δ."""
        if not self.delta_energy or not self.error_energy:
            return math.inf if self.delta_energy else math.nan
        return 10 * math.log10(self.delta_energy / self.error_energy)

    def as_json(self) -> dict[str, float | None]:
        """Both figures; None for one that is not finite."""
        figures = {"correlation": self.correlation, "db": self.decibels}
        return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


def calibration_rows(match: LoraMatch, layer: str) -> Float32:
    """The input directions that a layer's adapters read: the rows of all their down factors, or of their changes.

    Returns:
        float32 [n, in], as stored (neither scaled nor normalized); no rows where nothing is matched.
    """
    rows = [np.empty((0, match.shapes[layer][1]), np.float32)]
    for delta in match.matched.get(layer, ()):
        change, directions = delta.adapter.change, delta.adapter.directions
        some = np.unique(np.linspace(0, change.shape[0] - 1, SAMPLED_ROWS).astype(int))
        rows.append(change.rows(some) if directions is None else directions.rows(ALL))
    return np.concatenate(rows)


def split_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a file that exists under the whole text is that file, and a drive's letter is no file.

    >>> split_strength("a.safetensors:0.8"), split_strength("C:/a.safetensors")
    (('a.safetensors', 0.8), ('C:/a.safetensors', 1.0))
    """
    path, _, strength = text.rpartition(":")
    if len(path) > 1 and not Path(text).exists():
        try:
            return path, float(strength)
        except ValueError:
            return text, 1.0
    return text, 1.0


@contextmanager
def open_loras(texts: Iterable[str]) -> Iterator[list[Lora]]:
    """LoRA files by FILE or FILE:STRENGTH, open inside the `with` block.

    Raises:
        OptionError: A strength is not finite.
        CheckpointError: A file cannot be read.
        LoraError: One holds no adapters, or is damaged.
    """
    with ExitStack() as stack:
        loras = []
        for text in texts:
            loras.append(load_lora(*split_strength(text)))
            stack.enter_context(loras[-1].checkpoint)
        yield loras


def load_lora(path: StrPath, strength: float = 1.0) -> Lora:
    """Read a LoRA file, sort its tensors, and check every adapter of the diffusion model.

    Args:
        path: A `.safetensors` file.
        strength: The user's factor, finite; 1 applies the file as it was trained.

    Returns:
        The file's adapters, sound in themselves: all factors there, of ranks that agree, finite. Whether they fit a
        checkpoint is for `match_loras` to say.

    Raises:
        OptionError: `strength` is not finite.
        CheckpointError: The file cannot be read.
        LoraError: It holds no adapters, or one of them is damaged; names the tensor.
    """
    if not math.isfinite(strength):
        raise OptionError(f"a LoRA's strength should be a finite number, found {strength}", path=path)
    lora = Lora(open_checkpoint(path), strength)
    tensors: dict[str, dict[str, str]] = {}
    text_encoder: dict[str, None] = {}
    for key in lora.checkpoint.tensors:
        name, role = _split(key)
        if for_text_encoder(key):
            text_encoder[name] = None
        elif not role:
            lora.unknown.append(key)
        else:
            first = tensors.setdefault(name, {}).setdefault(role, key)
            if first != key and role not in UNSUPPORTED_ADAPTERS:
                raise LoraError(f"{first} holds the same part of the adapter", path=path, tensor=key)
    if not tensors and not text_encoder:
        problem = f"not a LoRA: none of its {len(lora.unknown)} tensors has a name that an adapter's would have"
        raise LoraError(problem, path=path, tensor=next(iter(lora.unknown), None))
    lora.text_encoder += text_encoder
    for name, roles in tensors.items():
        _read(lora, name, roles)
    return lora


def _read(lora: Lora, name: str, roles: Mapping[str, str]) -> None:
    """Add what the tensors of one name are to a file."""
    kinds = [role for role in roles if role in UNSUPPORTED_ADAPTERS]
    factors = frozenset(roles) - BESIDE
    is_vector = factors == {"diff"} and len(lora.checkpoint.tensors[roles["diff"]].shape) < 2
    if factors and not kinds and not is_vector:
        kind = kind_of(factors)
        if isinstance(kind, Kind):
            lora.adapters[name] = _adapter(lora.checkpoint, name, kind, roles)
        elif kind:
            there = next(role for role in roles if role in factors)
            problem = f"this {there} factor has no {kind} factor beside it"
            raise LoraError(problem, path=lora.path, tensor=roles[there], hint="the file is incomplete")
        else:
            kinds = [f"a mix of {' and '.join(sorted(factors))}"]
    apart = ("bias", "diff") if is_vector else ("bias",)
    beside = {(name, role): roles[role] for role in apart if role in roles}
    lora.beside |= beside
    lora.unsupported += [(name, kind) for kind in kinds]
    if not factors and not beside:
        lora.unknown += roles.values()


_ROLES = [
    (role, re.compile(rf"(.+?)(?:{pattern})"))
    for role, pattern in (*ADAPTER_ROLES.items(), *UNSUPPORTED_ADAPTERS.items())
]


def _split(key: str) -> tuple[str, str]:
    """A tensor's name as (adapter, role); the role is "" where no suffix is known."""
    found = next(((match[1], role) for role, pattern in _ROLES if (match := pattern.fullmatch(key))), None)
    return found or (key, "")


def _adapter(checkpoint: Checkpoint, name: str, kind: Kind, roles: Mapping[str, str]) -> Adapter:
    """One adapter of a kind, checked."""
    factors = frozenset(roles) - BESIDE
    parts = {role: stored(checkpoint, roles[role]) for role in sorted(factors)}
    change = kind.change(parts)
    rank = parts[kind.rank].shape[0] if kind.rank else None
    scale = _alpha(checkpoint, roles["alpha"]) / rank if rank and "alpha" in roles else 1.0
    kernel = any(math.prod(checkpoint.tensors[roles[role]].shape[2:]) > 1 for role in factors)
    adapter = Adapter(name, kind, change, scale, rank, parts.get("down"), kernel=kernel)
    if "magnitude" not in roles:
        return adapter
    magnitude = roles["magnitude"]
    info = checkpoint.tensors[magnitude]
    refusal = partial(LoraError, path=checkpoint.path, tensor=magnitude)
    if info.dtype not in FLOAT_DTYPES or not np.isfinite(checkpoint.float32(magnitude)).all():
        raise refusal("a magnitude should hold finite floats", hint="the file is damaged")
    # [out], [out, 1] and [out, 1, 1, 1] are per row; [1, in] per column.
    per_column = len(info.shape) > 1 and info.shape[0] == 1 != change.shape[0]
    if info.elements != change.shape[per_column]:
        expected = f"{change.shape[0]} values, one per row, or [1, {change.shape[1]}]"
        raise refusal(f"a magnitude should hold {expected}, found shape {list(info.shape)}")
    return replace(adapter, magnitude_tensor=magnitude, per_column=per_column)


def _alpha(checkpoint: Checkpoint, tensor: str) -> float:
    refusal = partial(LoraError, path=checkpoint.path, tensor=tensor)
    info = checkpoint.tensors[tensor]
    if info.elements != 1:
        raise refusal(f"alpha should be one number, found shape {list(info.shape)}")
    if info.dtype not in FLOAT_DTYPES | INTEGER_DTYPES:
        raise refusal(f"alpha should be a number, found {info.dtype}")
    read = checkpoint.float32 if info.dtype in FLOAT_DTYPES else checkpoint.bits
    alpha = float(read(tensor).reshape(-1)[0])
    if not math.isfinite(alpha):
        raise refusal(f"alpha is {alpha}", hint="the file is damaged")
    return alpha


def match_checkpoint(
    loras: Sequence[Lora], checkpoint: Checkpoint, table: LayerTable, *, beside: bool = False
) -> LoraMatch:
    """`match_loras` for a checkpoint that stays open, so that its weights are at hand.

    Differences of biases and norms are matched as well where `beside` says so, for whoever merges them.

    Raises:
        LoraError: A file is not folded as the checkpoint is, or see `match_loras`.
    """
    refuse_other_folding(loras, checkpoint)
    by_name = {layer.name: layer for layer in table.linear()}
    weights = {layer.weight.name for layer in by_name.values()}
    others = {
        name: info.shape
        for name, info in checkpoint.tensors.items()
        if beside and name not in weights and info.dtype in FLOAT_DTYPES
    }
    return match_loras(loras, table.shapes(), lambda layer, rows: dequantize(checkpoint, by_name[layer], rows), others)


Meant = list[tuple[Target, ...]]
"""All that a name may mean; each possibility as the parts that it means together."""


def match_loras(
    loras: Sequence[Lora],
    layers: Mapping[str, tuple[int, int]],
    weights: Weights | None = None,
    others: Mapping[str, tuple[int, ...]] | None = None,
) -> LoraMatch:
    """Find the layers that LoRA files mean.

    Args:
        loras: The files, as `load_lora` gives them.
        layers: All of a checkpoint's linear layers, quantized or not, as it names them -> (out, in).
        weights: Reads their weights, for magnitudes per column.
        others: Further tensors to which differences may be added, biases and norms -> their shapes.

    Returns:
        What is matched and what is left over; nothing is dropped silently.

    Raises:
        LoraError: A file matches nothing, or what its names mean has other shapes in all cases.
    """
    prefix, bare_names = strip_prefix(layers)
    full = {bare: layer for layer, bare in bare_names.items()}
    known = lora_names({bare: layers[layer] for bare, layer in full.items()})

    def meant(name: str) -> Meant:
        return [tuple(replace(part, layer=full[part.layer]) for part in parts) for parts in known.meant(name)]

    match, sizes = LoraMatch(dict(layers), weights), {name: math.prod(shape) for name, shape in (others or {}).items()}
    bare = {name: unwrap(name[len(prefix) :]) for name in sizes if name.startswith(prefix)}
    named = LoraNames({}, {squeezed(name): (Target(tensor),) for tensor, name in bare.items()})
    for lora in loras:
        _match_beside(lora, meant, named, sizes, match)
        _match_adapters(lora, meant, match)
        if lora not in match.loras:
            raise _matches_nothing(lora, match)
    return match


def _match_beside(
    lora: Lora, meant: Callable[[str], Meant], named: LoraNames, sizes: Mapping[str, int], match: LoraMatch
) -> None:
    """Match what a file adds to biases and norms: `named` by their names, of `sizes` values."""

    def size(target: Target) -> float:
        if target.layer not in sizes:
            return math.nan
        first, stop = target.rows or (0, sizes[target.layer])
        return stop - first

    for (name, role), tensor in lora.beside.items():
        adapter = lora.adapters.get(name)
        alone = adapter and all(_misfit(adapter, parts, match.shapes) for parts in meant(name))
        if role == "bias":
            possible: Meant = [(target,) for target in named.find(name + BIAS)]
            possible += [tuple(replace(part, layer=part.layer + BIAS) for part in parts) for parts in meant(name)]
        else:
            possible = [(target,) for target in (*named.find(name + WEIGHT), *named.find(name))]
        elements = lora.checkpoint.tensors[tensor].elements
        fits = next((parts for parts in possible if elements == sum(map(size, parts))), ())
        if alone or not fits:
            why = "fits no tensor of the checkpoint" if sizes else "is not supported"
            reason = f"{BESIDE_TITLES[role]} {'of a layer that is left out' if fits else why}"
            match.unsupported.append(Finding(str(lora.path), name, reason, _layers(possible)))
            continue
        for target in fits:
            match.beside.setdefault(target.layer, []).append(Addition(lora, tensor, target))


def _layers(possible: Meant) -> tuple[str, ...]:
    """The layers that a name may mean."""
    return tuple(dict.fromkeys(target.layer for parts in possible for target in parts))


def _match_adapters(lora: Lora, meant: Callable[[str], Meant], match: LoraMatch) -> None:
    """Match a file's adapters with the layers that their names mean."""
    finding = partial(Finding, str(lora.path))
    found: dict[str, list[Delta]] = {}
    misfits: list[Finding] = []
    for name, adapter in lora.adapters.items():
        candidates = meant(name)
        fitting = [parts for parts in candidates if not _misfit(adapter, parts, match.shapes)]
        if not candidates:
            what = "changes a convolution, and " if adapter.kernel else ""
            match.unmatched.append(finding(name, f"{what}no linear layer of the checkpoint has this name"))
        elif not fitting:
            misfits.append(finding(name, _misfit(adapter, candidates[0], match.shapes), _layers(candidates)))
        elif len(fitting) > 1:
            reason = f"the name may mean {len(fitting)} parts of the checkpoint"
            match.ambiguous.append(finding(name, reason, _layers(fitting)))
        elif adapter.per_column and (match.weights is None or len(fitting[0]) > 1):
            needed = "the checkpoint's weights" if match.weights is None else "a layer that is not split"
            reason = f"DoRA with a magnitude per column needs {needed}"
            match.unsupported.append(finding(name, reason, _layers(fitting)))
        else:
            for target in fitting[0]:
                found.setdefault(target.layer, []).append(Delta(lora, adapter, target))

    if misfits and not found and lora not in match.loras:
        raise LoraError(misfits[0].reason, path=lora.path, tensor=misfits[0].name,
                        hint="the LoRA was made for another model")  # fmt: skip
    match.unsupported += misfits
    for layer, deltas in found.items():
        for delta in deltas:
            rivals = [other.adapter.name for other in deltas if other is not delta and _overlap(other, delta)]
            if rivals:
                reason = f"{' and '.join(rivals)} in the same file means the same rows"
                match.ambiguous.append(finding(delta.adapter.name, reason, (layer,)))
            else:
                match.matched.setdefault(layer, []).append(delta)

    match.unmatched += [finding(key, "no known kind of adapter tensor") for key in lora.unknown]
    match.text_encoder += [finding(name, "belongs to a text encoder") for name in lora.text_encoder]
    match.unsupported += [
        finding(name, f"{kind} is not supported", _layers(meant(name))) for name, kind in lora.unsupported
    ]


def folding_of(checkpoint: Checkpoint) -> str | None:
    """What tells the folding of a checkpoint's channels from others (SHA-256); None where they are not folded."""
    text = checkpoint.metadata.get(names.FOLDING_KEY)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def refuse_other_folding(loras: Sequence[Lora], checkpoint: Checkpoint) -> None:
    """Refuse adapters that were made for other channels than a checkpoint has.

    Raises:
        LoraError: the checkpoint is folded and a file is not folded for it, or the other way round.
    """
    wanted = folding_of(checkpoint)
    for lora in loras:
        if lora.checkpoint.metadata.get(names.FOLDED_FOR_KEY) == wanted:
            continue
        problem = f"it is folded for another file than {checkpoint.path.name}, whose channels are as trained"
        hint = "give the LoRA as it was trained"
        if wanted:
            problem = f"it is not folded for {checkpoint.path.name}, whose channels are scaled"
            hint = "convert_to_quant lora fold makes it fit"
        raise LoraError(problem, path=lora.path, hint=hint)


def _overlap(one: Delta, other: Delta) -> bool:
    rows, others = one.target.rows, other.target.rows
    return rows is None or others is None or max(rows[0], others[0]) < min(rows[1], others[1])


def _misfit(adapter: Adapter, meant: Sequence[Target], shapes: Mapping[str, tuple[int, int]]) -> str:
    """How the shape of an adapter differs from that of what its name means; "" where it does not."""
    layers = [target.layer for target in meant]
    rows = [target.rows or (0, shapes[target.layer][0]) for target in meant]
    expected = (sum(stop - start for start, stop in rows), shapes[layers[0]][1])
    found = adapter.change.shape
    if found == expected:
        return ""
    part = " and ".join(layers) if meant[0].rows is None else f"the part of {layers[0]} that it means"
    if found[0] >= expected[0] and found[1] >= expected[1]:
        return f"its change is {list(found)} and would widen {part}, which is {list(expected)}"
    return f"its change is {list(found)}, but {part} is {list(expected)}"


def _matches_nothing(lora: Lora, match: LoraMatch) -> LoraError:
    """Why nothing of a file can be applied, with its first name and what the checkpoint has instead."""
    others = [name for name, _ in (*lora.unsupported, *lora.beside)]
    first = next(iter([*lora.adapters, *others, *lora.text_encoder, *lora.unknown]))
    kinds = Counter(kind for _, kind in lora.unsupported)
    kinds.update(BESIDE_TITLES[role] for _, role in lora.beside)
    counts = [
        (len(lora.adapters), "adapters match no layer of the checkpoint unambiguously"),
        *((count, f"{kind} adapters are not supported") for kind, count in kinds.items()),
        (len(lora.text_encoder), "adapters belong to a text encoder"),
        (len(lora.unknown), "tensors are of no known kind"),
    ]
    reasons = ", ".join(f"{count} {what}" for count, what in counts if count)
    example = f"; its layers have names like {next(iter(match.shapes))}" if match.shapes else ""
    problem = f"nothing in this LoRA can be applied: {reasons}{example}"
    return LoraError(problem, path=lora.path, tensor=first, hint="is it made for this model?")
