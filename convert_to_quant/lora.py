"""LoRA files and related adapters: which layers of a checkpoint they change, and by how much.

Calibrating or converting a checkpoint with adapters requires knowing exactly which layer each one changes: a change on
the wrong layer is worse than none. An adapter with the change ΔW of its kind (`adapters`) means

    W[rows] += strength · (alpha / rank) · ΔW          without alpha: alpha / rank = 1

where `rows` is the whole layer or, for a name like ``attn.to_k``, its slice of a fused layer. With a magnitude m
(DoRA), V = W + (alpha / rank) · ΔW and W += strength · (m · V / ‖V‖ - W). Adapters of one layer apply in the order of
the files.

Names. `families.lora_names` lists every name of each layer; the file's names are looked up without prefixes and
separators, but must match whole. If a name may mean several layers, the one whose shape fits is meant; if several fit,
or if two names of one file mean the same rows, they are reported as ambiguous and not applied. Everything in a file is
either applied or listed as unmatched, ambiguous, unsupported (other kinds, other shapes) or text encoder.

Merging. `merge_rows` adds adapters to a layer's rows before they are quantized. A quantizer's steps may exceed the
change: `Survival` measures how much of it remains.

Limits. numpy on the CPU, float32. Factors stay in the mapped file until used, so matching costs no memory. Calibration
uses changes of linear layers; merging also adds differences of biases and norms. Adapters of convolutions are reported.
rsLoRA's alpha / sqrt(r) does not show in a file and is read as alpha / r, as in ComfyUI.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

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
"""Roles of tensors that accompany a change."""

BESIDE_TITLES = {"bias": "bias difference", "diff": "difference of a norm"}
SAMPLED_ROWS = 64
"""Rows of a change that represent its input directions, if its kind has no factor that contains them."""
BAND_ROWS = 256
"""Rows of a weight read at a time to compute norms of its columns."""

LeftOver = Literal["unmatched", "ambiguous", "unsupported", "text_encoder"]
"""Why a part of a file is not applied."""


@dataclass(frozen=True)
class Finding:
    """A part of a LoRA file that is not applied.

    Attributes:
        kind: Which list of the report it is in.
        file: Path of the file.
        name: Name of an adapter, or of a tensor.
        reason: Why it is not applied.
        layers: The checkpoint's layers concerned, if known.
    """

    kind: LeftOver
    file: str
    name: str
    reason: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """One adapter of a file.

    Attributes:
        name: The tensors' common name, without suffix.
        kind: LoRA, LoHa, ...
        change: ΔW without `scale`, [out, in].
        scale: alpha / rank, or 1.
        rank: If its kind has one.
        directions: The factor whose rows are the input directions that it reads, if its kind has one.
        magnitude_tensor: DoRA's magnitude, one value per row, or per column if `per_column`.
        kernel: It belongs to a convolution with a kernel larger than 1.
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
    """A LoRA file, read and checked.

    Attributes:
        checkpoint: The open file.
        strength: The user's factor on all of it.
        adapters: By name.
        beside: (name, role "bias" or "diff") -> a tensor that is the difference of a bias or a norm.
        left: What cannot be applied to any checkpoint.
    """

    checkpoint: Checkpoint
    strength: float = 1.0
    adapters: dict[str, Adapter] = field(default_factory=dict)
    beside: dict[tuple[str, str], str] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path


@dataclass(frozen=True, eq=False)
class Delta:
    """The change that one adapter makes to one layer of a checkpoint, or to some rows of it."""

    lora: Lora
    adapter: Adapter
    target: Target

    @property
    def scale(self) -> float:
        """The factor on the change: strength · alpha / rank."""
        return self.lora.strength * self.adapter.scale

    def span(self, out_features: int) -> tuple[int, int]:
        """First row, and row after the last, in a layer of `out_features` rows."""
        return self.target.rows or (0, out_features)

    def apply(self, weight_OI: Float32, start: int, column_norms_I: Float32 | None = None) -> None:
        """Change rows in place, float32 [rows, in], of which `start` is the first, counted from the target's first row.

        Magnitudes per column need ‖V‖ of each column, float32 [in].
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
        """V = W + (alpha / rank) · ΔW of some rows; arguments as in `apply`."""
        change_OI = self.adapter.change.rows(self._rows(start, len(weight_OI)))
        decomposed: Float32 = weight_OI + np.float32(self.adapter.scale) * change_OI
        return decomposed

    def _rows(self, start: int, count: int) -> Rows:
        """The rows in the file for some of the target's rows."""
        start += self.target.first
        if not self.target.swap_halves:
            return slice(start, start + count)
        height = self.adapter.change.shape[0]
        swapped: Rows = (np.arange(start, start + count) + height // 2) % height
        return swapped


@dataclass(frozen=True)
class Addition:
    """Values of a file's tensor that are added to a bias or a norm of a checkpoint, or to some values of it."""

    lora: Lora
    tensor: str
    target: Target


Weights = Callable[[str, slice], Float32]
"""Reads rows of a layer's original weight, float32 [rows, in]."""


@dataclass
class LoraMatch:
    """The changes that LoRA files make to a checkpoint's layers, and what is not applied.

    Attributes:
        shapes: The checkpoint's layers -> (out, in).
        weights: Reads their weights, if available: DoRA's magnitudes per column need all rows.
        matched: Layer -> its changes, in the order of the files.
        beside: Other tensors of the checkpoint -> what is added to them; only for merging.
        left: What is not applied.
    """

    shapes: dict[str, tuple[int, int]]
    weights: Weights | None = None
    matched: dict[str, list[Delta]] = field(default_factory=dict)
    beside: dict[str, list[Addition]] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)
    _norms: dict[tuple[str, int], Float32] = field(default_factory=dict, repr=False)

    def add_to(self, weight_OI: Float32, layer: str, start: int = 0, count: int | None = None) -> None:
        """Add the first `count` changes of a layer, or all, to its rows from `start` on, float32 [rows, in]."""
        assert weight_OI.shape[1] == self.shapes[layer][1]
        for number, delta in enumerate(self.matched.get(layer, ())[:count]):
            first, last = delta.span(self.shapes[layer][0])
            low, high = max(start, first), min(start + len(weight_OI), last)
            if low < high:
                norms = self._column_norms(layer, number) if delta.adapter.per_column else None
                delta.apply(weight_OI[low - start : high - start], low - first, norms)

    def _column_norms(self, layer: str, number: int) -> Float32:
        """‖V‖ per column for a change of a layer, float32 [in]; reads all its rows, once."""
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
        """The files of which something is applied, in order."""
        found = [delta.lora for some in self.matched.values() for delta in some]
        found += [each.lora for some in self.beside.values() for each in some]
        return list(dict.fromkeys(found))

    def changed_tensor(self, checkpoint: Checkpoint, name: str) -> Float32:
        """A tensor of `beside` with its additions, float32."""
        values: Float32 = checkpoint.float32(name)
        for each in self.beside[name]:
            added = each.lora.checkpoint.float32(each.tensor).reshape(-1)
            if each.target.swap_halves:
                added = np.roll(added, len(added) // 2)
            part = values.reshape(-1)[slice(*(each.target.rows or (0, None)))]
            part += np.float32(each.lora.strength) * added[each.target.first : each.target.first + len(part)]
        return values

    def left_over(self) -> dict[str, list[Finding]]:
        """What is not applied, by kind."""
        return {kind: [finding for finding in self.left if finding.kind == kind] for kind in get_args(LeftOver)}

    def summary(self) -> str:
        """One line for the user, e.g. "304 adapters on 152 layers, 2 unmatched"."""
        adapters = sum(len(deltas) for deltas in self.matched.values())
        beside = f", {len(self.beside)} biases and norms" if self.beside else ""
        rest = "".join(f", {len(found)} {_title(kind)}" for kind, found in self.left_over().items() if found)
        return f"{plural(adapters, 'adapter')} on {plural(len(self.matched), 'layer')}{beside}{rest}"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values: names, files, kinds, ranks, scales and rows, no weights."""

        def told(delta: Delta) -> dict[str, Any]:
            adapter = delta.adapter
            kind = {"kind": adapter.kind.title, "rank": adapter.rank, "dora": adapter.magnitude_tensor is not None}
            place = {"scale": delta.scale, "rows": delta.target.rows}
            return {"file": str(delta.lora.path), "name": adapter.name, **kind, **place}

        def left(finding: Finding) -> dict[str, Any]:
            return {key: value for key, value in asdict(finding).items() if key != "kind"}

        return {
            "matched": {layer: [told(delta) for delta in deltas] for layer, deltas in self.matched.items()},
            "beside": {name: [str(each.lora.path) for each in some] for name, some in self.beside.items()},
            **{kind: [left(finding) for finding in found] for kind, found in self.left_over().items()},
        }

    def notes(self) -> list[str]:
        """Lines for the user: the summary, then what is not applied, by reason, with its count and first names."""
        lines = [f"LoRA: {self.summary()}"]
        for kind, found in self.left_over().items():
            for reason, count in Counter(finding.reason for finding in found).items():
                names = [finding.name for finding in found if finding.reason == reason][:3]
                more = f" and {count - 3} more" if count > 3 else ""
                lines.append(f"LoRA {kind.replace('_', ' ')}: {', '.join(names)}{more} ({reason})")
        return lines


def _title(kind: str) -> str:
    return "for text encoders" if kind == "text_encoder" else kind


def merge_rows(match: LoraMatch, layer: str, weight_OI: Float32, rows: tuple[int, int] | None = None) -> Float32:
    """`weight_OI`, the rows (start, stop) of a layer's weight, or all, with the layer's changes added.

    Returns:
        float32 of the same shape; `weight_OI` itself if nothing is matched.
    """
    if layer not in match.matched:
        return weight_OI
    merged_OI: Float32 = weight_OI.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # reported when the weight is rounded
        match.add_to(merged_OI, layer, rows[0] if rows else 0)
    return merged_OI


@dataclass
class Survival:
    """How much of a change of weights remains after rounding.

    For weights W, merged weights W' = W + Δ and their stored values Q(W'), S = Q(W') - W is the change that remains:

        correlation   ⟨S, Δ⟩ / (‖S‖ ‖Δ‖)           1: S is Δ at some size, 0: Δ is lost; not centered
        decibels      10 log₁₀(‖Δ‖² / ‖S - Δ‖²)    0: the error is as large as the change

    ⟨S, Δ⟩ / ‖Δ‖² is not used: rounding to nearest is right on average, so it is 1 within 1 % in every format. On normal
    weights and a LoRA of 1 % of their norm: FP8 per tensor 0.35 and -8.5 dB, INT8 per row 0.77 and 1.7 dB; a LoRA of
    10 %: 0.97 and 11.5 dB, 1.00 and 21.6 dB.

    The attributes are the float64 sums ‖Δ‖², ‖S‖², ⟨S, Δ⟩ and ‖S - Δ‖² over all values, which add up over pieces and
    layers.

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
        """Add values of W, W' and Q(W') (dequantized): float32, of one shape."""
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
        """Of S and Δ, -1 to 1; NaN if either is zero."""
        norms = math.sqrt(self.left_energy * self.delta_energy)
        return self.product / norms if norms else math.nan

    @property
    def decibels(self) -> float:
        """Of Δ over the error; infinite without error, NaN without Δ."""
        if not self.delta_energy or not self.error_energy:
            return math.inf if self.delta_energy else math.nan
        return 10 * math.log10(self.delta_energy / self.error_energy)

    def as_json(self) -> dict[str, float | None]:
        """Both numbers; None if not finite."""
        values = {"correlation": self.correlation, "db": self.decibels}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def calibration_rows(match: LoraMatch, layer: str) -> Float32:
    """The input directions that a layer's adapters read: rows of their down factors, or of their changes.

    Returns:
        float32 [n, in], as stored; no rows if nothing is matched.
    """
    rows = [np.empty((0, match.shapes[layer][1]), np.float32)]
    for delta in match.matched.get(layer, ()):
        change, directions = delta.adapter.change, delta.adapter.directions
        some = np.unique(np.linspace(0, change.shape[0] - 1, SAMPLED_ROWS).astype(int))
        rows.append(change.rows(some) if directions is None else directions.rows(ALL))
    return np.concatenate(rows)


def split_strength(text: str) -> tuple[str, float]:
    """Split FILE:STRENGTH; an existing file of the whole name comes first, and a drive letter is not a file.

    >>> split_strength("a.safetensors:0.8"), split_strength("C:/a.safetensors")
    (('a.safetensors', 0.8), ('C:/a.safetensors', 1.0))
    """
    path, _, strength = text.rpartition(":")
    if len(path) > 1 and not Path(text).exists():
        with suppress(ValueError):
            return path, float(strength)
    return text, 1.0


@contextmanager
def open_loras(texts: Iterable[str]) -> Iterator[list[Lora]]:
    """LoRA files by FILE or FILE:STRENGTH, open inside the `with` block; raises as `load_lora`."""
    with ExitStack() as stack:
        loras = []
        for text in texts:
            loras.append(load_lora(*split_strength(text)))
            stack.enter_context(loras[-1].checkpoint)
        yield loras


def load_lora(path: StrPath, strength: float = 1.0) -> Lora:
    """Read a LoRA file, and check that its adapters have all factors, matching ranks and finite values.

    Raises:
        OptionError: `strength` is not finite.
        CheckpointError: The file cannot be read.
        LoraError: It has no adapters, or one is damaged.
    """
    if not math.isfinite(strength):
        raise OptionError(f"a LoRA's strength should be a finite number, found {strength}", path=path)
    lora = Lora(open_checkpoint(path), strength)
    tensors: dict[str, dict[str, str]] = {}
    text_encoder: dict[str, None] = {}
    unknown: list[str] = []
    for key in lora.checkpoint.tensors:
        name, role = _split(key)
        if for_text_encoder(key):
            text_encoder[name] = None
        elif not role:
            unknown.append(key)
        else:
            first = tensors.setdefault(name, {}).setdefault(role, key)
            if first != key and role not in UNSUPPORTED_ADAPTERS:
                raise LoraError(f"{first} is the same part of the adapter", path=path, tensor=key)
    if not tensors and not text_encoder:
        problem = f"not a LoRA: none of its {len(unknown)} tensors has the name of an adapter's tensor"
        raise LoraError(problem, path=path, tensor=next(iter(unknown), None))
    for name, roles in tensors.items():
        unknown += _read(lora, name, roles)
    finding = partial(Finding, file=str(lora.path))
    lora.left += [finding("unmatched", name=key, reason="no known kind of adapter tensor") for key in unknown]
    lora.left += [finding("text_encoder", name=name, reason="belongs to a text encoder") for name in text_encoder]
    return lora


def _read(lora: Lora, name: str, roles: Mapping[str, str]) -> Iterable[str]:
    """Add the tensors of one name to a file; returns them if they make no adapter."""
    kinds = [role for role in roles if role in UNSUPPORTED_ADAPTERS]
    factors = frozenset(roles) - BESIDE
    is_vector = factors == {"diff"} and len(lora.checkpoint.tensors[roles["diff"]].shape) < 2
    if factors and not kinds and not is_vector:
        kind = kind_of(factors)
        if isinstance(kind, Kind):
            lora.adapters[name] = _adapter(lora.checkpoint, name, kind, roles)
        elif kind:
            present = next(role for role in roles if role in factors)
            problem = f"this {present} factor has no {kind} factor"
            raise LoraError(problem, path=lora.path, tensor=roles[present], hint="the file is incomplete")
        else:
            kinds = [f"a mix of {' and '.join(sorted(factors))}"]
    apart = ("bias", "diff") if is_vector else ("bias",)
    beside = {(name, role): roles[role] for role in apart if role in roles}
    lora.beside |= beside
    lora.left += [Finding("unsupported", str(lora.path), name, f"{kind} is not supported") for kind in kinds]
    return () if factors or beside else roles.values()


_ROLES = [
    (role, re.compile(rf"(.+?)(?:{pattern})"))
    for role, pattern in (*ADAPTER_ROLES.items(), *UNSUPPORTED_ADAPTERS.items())
]


def _split(key: str) -> tuple[str, str]:
    """A tensor's name as (adapter, role); the role is "" if the suffix is unknown."""
    return next(((match[1], role) for role, pattern in _ROLES if (match := pattern.fullmatch(key))), (key, ""))


def _adapter(checkpoint: Checkpoint, name: str, kind: Kind, roles: Mapping[str, str]) -> Adapter:
    """Check and build one adapter."""
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
        raise refusal("a magnitude should be finite floats", hint="the file is damaged")
    # [out], [out, 1] and [out, 1, 1, 1] are per row; [1, in] per column.
    per_column = len(info.shape) > 1 and info.shape[0] == 1 != change.shape[0]
    if info.elements != change.shape[per_column]:
        expected = f"{change.shape[0]} values, one per row, or [1, {change.shape[1]}]"
        raise refusal(f"a magnitude should have {expected}, found shape {list(info.shape)}")
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
    """`match_loras` with an open checkpoint; with `beside`, also differences of biases and norms.

    Raises:
        LoraError: A file is folded for another checkpoint, or see `match_loras`.
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
"""All that a name may mean; each possibility is the parts that it means together."""


def match_loras(
    loras: Sequence[Lora],
    layers: Mapping[str, tuple[int, int]],
    weights: Weights | None = None,
    others: Mapping[str, tuple[int, ...]] | None = None,
) -> LoraMatch:
    """Find the layers that LoRA files change, of all linear layers of a checkpoint -> (out, in).

    `weights` reads the layers, for magnitudes per column; `others` are biases and norms that may be changed.

    Raises:
        LoraError: Nothing in a file matches or fits.
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
        _match_adapters(lora, meant, match)
        _match_beside(lora, meant, named, sizes, match)
        if lora not in match.loras:
            own = [[each for each in found if each.file == str(lora.path)] for found in match.left_over().values()]
            own.sort(key=len, reverse=True)
            reasons = ", ".join(f"{len(found)} {_title(found[0].kind)} ({found[0].reason})" for found in own if found)
            example = f"; the checkpoint's layers have names like {next(iter(layers))}" if layers else ""
            problem = f"nothing in this LoRA can be applied: {reasons}{example}"
            raise LoraError(problem, path=lora.path, tensor=own[0][0].name, hint="was it made for this model?")
    return match


def _match_beside(
    lora: Lora, meant: Callable[[str], Meant], named: LoraNames, sizes: Mapping[str, int], match: LoraMatch
) -> None:
    """Match a file's differences of biases and norms: `named` by their names, with `sizes` values each."""

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
            match.left.append(Finding("unsupported", str(lora.path), name, reason, _layers(possible)))
            continue
        for target in fits:
            match.beside.setdefault(target.layer, []).append(Addition(lora, tensor, target))


def _layers(possible: Meant) -> tuple[str, ...]:
    """The layers that a name may mean."""
    return tuple(dict.fromkeys(target.layer for parts in possible for target in parts))


def _match_adapters(lora: Lora, meant: Callable[[str], Meant], match: LoraMatch) -> None:
    """Match a file's adapters with the layers that their names mean."""
    finding, found = partial(Finding, file=str(lora.path)), dict[str, list[Delta]]()
    for name, adapter in lora.adapters.items():
        possible = meant(name)
        fitting = [parts for parts in possible if not _misfit(adapter, parts, match.shapes)]
        refusal = _refusal(adapter, possible, fitting, match)
        if refusal is not None:
            kind, reason = refusal
            match.left.append(finding(kind, name=name, reason=reason, layers=_layers(fitting or possible)))
        for target in fitting[0] if refusal is None else ():
            found.setdefault(target.layer, []).append(Delta(lora, adapter, target))
    for layer, deltas in found.items():
        for delta in deltas:
            rivals = [other.adapter.name for other in deltas if other is not delta and _overlap(other, delta)]
            if rivals:
                reason = f"{' and '.join(rivals)} in the same file means the same rows"
                match.left.append(finding("ambiguous", name=delta.adapter.name, reason=reason, layers=(layer,)))
            else:
                match.matched.setdefault(layer, []).append(delta)
    for each in lora.left:
        match.left.append(replace(each, layers=_layers(meant(each.name)) if each.kind == "unsupported" else ()))


def _refusal(adapter: Adapter, possible: Meant, fitting: Meant, match: LoraMatch) -> tuple[LeftOver, str] | None:
    """Why an adapter is not applied, by all that its name may mean and the possibilities whose shapes fit."""
    if not possible:
        what = "changes a convolution, and " if adapter.kernel else ""
        return "unmatched", f"{what}no linear layer of the checkpoint has this name"
    if not fitting:
        return "unsupported", _misfit(adapter, possible[0], match.shapes)
    if len(fitting) > 1:
        return "ambiguous", f"the name may mean {len(fitting)} parts of the checkpoint"
    if adapter.per_column and (match.weights is None or len(fitting[0]) > 1):
        needed = "the checkpoint's weights" if match.weights is None else "a layer that is not split"
        return "unsupported", f"DoRA with a magnitude per column needs {needed}"
    return None


def folding_of(checkpoint: Checkpoint) -> str | None:
    """SHA-256 of a checkpoint's folding; None if it is not folded."""
    text = checkpoint.metadata.get(names.FOLDING_KEY)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def refuse_other_folding(loras: Sequence[Lora], checkpoint: Checkpoint) -> None:
    """Refuse adapters whose folding is not the checkpoint's.

    Raises:
        LoraError: the checkpoint is folded and a file is not folded for it, or the other way round.
    """
    wanted = folding_of(checkpoint)
    for lora in loras:
        if lora.checkpoint.metadata.get(names.FOLDED_FOR_KEY) == wanted:
            continue
        problem = f"it is folded for another file than {checkpoint.path.name}, whose channels are as trained"
        hint = "use the original LoRA"
        if wanted:
            problem = f"it is not folded for {checkpoint.path.name}, whose channels are scaled"
            hint = "adapt it with convert_to_quant lora fold"
        raise LoraError(problem, path=lora.path, hint=hint)


def _overlap(one: Delta, other: Delta) -> bool:
    rows, others = one.target.rows, other.target.rows
    return rows is None or others is None or max(rows[0], others[0]) < min(rows[1], others[1])


def _misfit(adapter: Adapter, meant: Sequence[Target], shapes: Mapping[str, tuple[int, int]]) -> str:
    """How an adapter's shape differs from that of its layer; "" if it fits."""
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
