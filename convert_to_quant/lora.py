"""LoRA files: which layers of a checkpoint they change, and by how much.

Why it exists. A LoRA adds a low-rank change to a layer's weight, and with it the ranges of everything behind that layer
move. Whoever calibrates a checkpoint with its adapters has to know exactly what belongs to which layer: a change on the
wrong layer is worse than none.

The maths. An adapter holds A ("down", [r, in]) and B ("up", [out, r]) and perhaps alpha; it means

    W[rows] += strength · (alpha / r) · B A          alpha absent: alpha / r = 1

where `rows` is all of the layer or, for a name like ``attn.to_k``, the slice that it has in a fused layer. The up
factor of kohya's split_qkv is block-diagonal over 3r; the same product holds for it. r is always A's number of rows.

How names are matched. `families.lora_targets` builds every name that each layer may have, and the file's names are
looked up in it: exactly or not at all. A name that may mean two parts is reported as ambiguous, and so are two names of
one file that claim the same rows; neither is applied. Everything in a file ends up in one list of the report: matched,
unmatched, ambiguous, unsupported (LoHa, LoKr, DoRA, full differences, ...) or text encoder.

Merging. `merge_rows` adds adapters to a layer's rows before these are quantized. A quantizer's steps may be larger than
what an adapter adds: `Survival` measures how much of it is left.

Limits. numpy on the CPU, products in float32. Factors stay in the file and are widened when they are used, so a
match costs no memory. Factors of text encoders are never read. rsLoRA's alpha / sqrt(r) leaves no trace in a file's
tensors and is read as alpha / r, as ComfyUI does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint, open_checkpoint, to_float32
from .checkpoint.reader import FLOAT_DTYPES
from .errors import LoraError, OptionError, StrPath
from .families import Target, lora_targets
from .names import (
    BIAS_ONLY,
    LORA_ALPHAS,
    LORA_FACTORS,
    TEXT_ENCODER_PREFIXES,
    UNSUPPORTED_SUFFIXES,
    strip_prefix,
)
from .telling import plural

Float32 = NDArray[np.float32]

_INTEGER_DTYPES = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})

# Suffix -> what the tensor is: a role of the supported kind, or the name of an unsupported kind. Longest first.
_ROLES: dict[str, str] = {
    **{down: "down" for down, _ in LORA_FACTORS},
    **{up: "up" for _, up in LORA_FACTORS},
    **dict.fromkeys(LORA_ALPHAS, "alpha"),
    **UNSUPPORTED_SUFFIXES,
}
_ROLES = {suffix: _ROLES[suffix] for suffix in sorted(_ROLES, key=len, reverse=True)}

# What is not applied -> how a summary counts it.
_LEFT_OVER = {
    "unmatched": "unmatched",
    "ambiguous": "ambiguous",
    "unsupported": "unsupported",
    "text_encoder": "for text encoders",
}


@dataclass(frozen=True)
class Adapter:
    """One pair of factors in a LoRA file, as the file names it.

    Attributes:
        name: The tensors' common name, without their suffixes.
        down: Tensor name of A, [rank, in].
        up: Tensor name of B, [out, rank].
        rank: Rows of A.
        alpha: As stored; None where the file has none.
    """

    name: str
    down: str
    up: str
    rank: int
    alpha: float | None

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by before the user's strength: alpha / rank, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass
class Lora:
    """A LoRA file that was read and found sound.

    Attributes:
        checkpoint: The open file.
        strength: The user's factor on all of it.
        adapters: Pairs of factors by name.
        unsupported: Name -> kinds of its tensors that cannot be applied.
        text_encoder: Names of a text encoder's adapters.
        unknown: Tensors of no known kind.
    """

    checkpoint: Checkpoint
    strength: float = 1.0
    adapters: dict[str, Adapter] = field(default_factory=dict)
    unsupported: dict[str, tuple[str, ...]] = field(default_factory=dict)
    text_encoder: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path


@dataclass(frozen=True, eq=False)
class Delta:
    """What one adapter adds to one layer: W[rows] += scale · B A.

    Attributes:
        lora: The file.
        adapter: The pair of factors.
        rows: First row and row after the last of the layer's weight; None for all.
        swap_halves: B's halves stand in the file in the other order than in the layer. `B_OR` has them in the layer's.
    """

    lora: Lora
    adapter: Adapter
    rows: tuple[int, int] | None = None
    swap_halves: bool = False

    @property
    def name(self) -> str:
        """The adapter's name in its file."""
        return self.adapter.name

    @property
    def scale(self) -> float:
        """The factor on the product: strength · alpha / rank."""
        return self.lora.strength * self.adapter.scale

    @property
    def A_RI(self) -> Float32:  # noqa: N802 - shapes stand in names
        """The down factor, float32 [rank, in]."""
        return self._read(self.adapter.down)

    @property
    def B_OR(self) -> Float32:  # noqa: N802
        """The up factor, float32 [rows, rank], its rows in the layer's order."""
        up = self._read(self.adapter.up)
        return np.roll(up, len(up) // 2, axis=0) if self.swap_halves else up

    def up_rows(self, start: int, stop: int) -> Float32:
        """Some rows of `B_OR`, read without the others where they stand in the layer's order."""
        return self.B_OR[start:stop] if self.swap_halves else self._read(self.adapter.up, slice(start, stop))

    def _read(self, tensor: str, rows: slice = slice(None)) -> Float32:
        checkpoint = self.lora.checkpoint
        values = to_float32(checkpoint.bits(tensor, rows), checkpoint.tensors[tensor].dtype)
        return values.reshape(len(values), -1)


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


@dataclass
class LoraMatch:
    """What some LoRA files do to a checkpoint's layers, and what of them is left over.

    Attributes:
        shapes: The checkpoint's layers -> (out, in).
        matched: Layer -> what is added to it, in the order of the files.
        unmatched: Adapters whose names fit no layer, and tensors of no known kind.
        ambiguous: Adapters that may mean several parts, or that claim rows which another one of their file claims.
        unsupported: Adapters of kinds that cannot be applied, with their layers.
        text_encoder: Adapters of text encoders.
    """

    shapes: dict[str, tuple[int, int]]
    matched: dict[str, list[Delta]] = field(default_factory=dict)
    unmatched: list[Finding] = field(default_factory=list)
    ambiguous: list[Finding] = field(default_factory=list)
    unsupported: list[Finding] = field(default_factory=list)
    text_encoder: list[Finding] = field(default_factory=list)

    def add_to(self, weight_OI: Float32, layer: str, rows: tuple[int, int] | None = None) -> None:
        """Merge everything that is matched to a layer into its weight, in place.

        Args:
            weight_OI: float32 [stop - start, in], or [out, in] where `rows` is None.
            layer: The layer, as the checkpoint names it.
            rows: (start, stop) of the layer's rows that `weight_OI` holds.
        """
        start, stop = rows or (0, self.shapes[layer][0])
        assert weight_OI.shape == (stop - start, self.shapes[layer][1])
        for delta in self.matched.get(layer, ()):
            first, last = delta.rows or (0, self.shapes[layer][0])
            low, high = max(start, first), min(stop, last)
            if low < high:
                product = delta.up_rows(low - first, high - first) @ delta.A_RI
                product *= np.float32(delta.scale)
                weight_OI[low - start : high - start] += product

    def summary(self) -> str:
        """One line for the user, e.g. "304 adapters on 152 layers, 2 unmatched"."""
        adapters = sum(len(deltas) for deltas in self.matched.values())
        rest = "".join(f", {len(found)} {_LEFT_OVER[kind]}" for kind, found in self._left_over().items() if found)
        return f"{plural(adapters, 'adapter')} on {plural(len(self.matched), 'layer')}{rest}"

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values: names, files, ranks, scales and rows, no weights."""

        def told(delta: Delta) -> dict[str, Any]:
            file, rank = str(delta.lora.path), delta.adapter.rank
            return {"file": file, "name": delta.name, "rank": rank, "scale": delta.scale, "rows": delta.rows}

        return {
            "matched": {layer: [told(delta) for delta in deltas] for layer, deltas in self.matched.items()},
            **{kind: [asdict(finding) for finding in found] for kind, found in self._left_over().items()},
        }

    def _left_over(self) -> dict[str, list[Finding]]:
        return {kind: getattr(self, kind) for kind in _LEFT_OVER}


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
        match.add_to(merged_OI, layer, rows)
    return merged_OI


@dataclass
class Survival:
    """How much of a change of weights is left after they were rounded.

    Of the weights W, the merged ones W' = W + Δ, and what is stored instead of them, Q(W'), with B for what stood there
    without the change (Q(W), or W where the original is the yardstick), S = Q(W') - B is the change that is left:

        correlation   ⟨S, Δ⟩ / (‖S‖ ‖Δ‖)           1: S is Δ at some size, 0: Δ is gone; not centered
        decibels      10 log₁₀(‖Δ‖² / ‖S - Δ‖²)    0: the error is as large as the change itself

    ⟨S, Δ⟩ / ‖Δ‖² says nothing: it is 1 within 1 % in every format, since rounding to nearest is right on average. On
    normal weights and a LoRA of 1 % of their norm, against W: FP8 per tensor 0.35 and -8.5 dB, INT8 per row 0.77 and
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

    def add(self, weight: Float32, merged: Float32, stored: Float32, baseline: Float32 | None = None) -> None:
        """Count some values.

        Args:
            weight: W, float32 of any shape.
            merged: W' = W + Δ, of the same shape.
            stored: Q(W'), dequantized, of the same shape.
            baseline: B; W by default.
        """
        delta = np.subtract(merged, weight, dtype=np.float64).ravel()
        left = np.subtract(stored, weight if baseline is None else baseline, dtype=np.float64).ravel()
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
    """The input directions that a layer's adapters read: the rows of all their down factors.

    Args:
        match: The matched files.
        layer: The layer, as the checkpoint names it.

    Returns:
        float32 [sum of ranks, in], as stored (neither scaled nor normalized); no rows where nothing is matched.
    """
    rows = [delta.A_RI for delta in match.matched.get(layer, ())]
    return np.concatenate([np.empty((0, match.shapes[layer][1]), np.float32), *rows])


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
        The file's adapters, sound in themselves: both factors there, of one rank, finite. Whether they fit a checkpoint
        is for `match_loras` to say.

    Raises:
        OptionError: `strength` is not finite.
        CheckpointError: The file cannot be read.
        LoraError: It holds no adapters, or one of them is damaged; names the tensor.
    """
    if not math.isfinite(strength):
        raise OptionError(f"a LoRA's strength should be a finite number, found {strength}", path=path)
    checkpoint = open_checkpoint(path)
    tensors: dict[str, dict[str, list[str]]] = {}
    text_encoder: dict[str, None] = {}
    unknown: list[str] = []
    for key in checkpoint.tensors:
        name, role = _split(key)
        if key.startswith(TEXT_ENCODER_PREFIXES):
            text_encoder[name] = None
        elif not role:
            unknown.append(key)
        else:
            tensors.setdefault(name, {}).setdefault(role, []).append(key)
    if not tensors and not text_encoder:
        problem = f"not a LoRA: none of its {len(unknown)} tensors has a name that an adapter's would have"
        raise LoraError(problem, path=path, tensor=next(iter(unknown), None))

    adapters: dict[str, Adapter] = {}
    unsupported: dict[str, tuple[str, ...]] = {}
    for name, roles in tensors.items():
        kinds = tuple(role for role in roles if role in UNSUPPORTED_SUFFIXES.values())
        if kinds:
            unsupported[name] = kinds
        if set(kinds) <= {BIAS_ONLY} and {"down", "up"} & set(roles):
            adapters[name] = _adapter(checkpoint, name, roles)
        elif not kinds:
            unknown += roles["alpha"]
    return Lora(checkpoint, strength, adapters, unsupported, tuple(text_encoder), tuple(unknown))


def _split(key: str) -> tuple[str, str]:
    """A tensor's name as (adapter, role); the role is "" where no suffix is known."""
    for suffix, role in _ROLES.items():
        if key.endswith(suffix) and len(key) > len(suffix):
            return key[: -len(suffix)], role
    return key, ""


def _adapter(checkpoint: Checkpoint, name: str, roles: Mapping[str, list[str]]) -> Adapter:
    """One pair of factors, checked: both there, once, floats, finite, of one rank."""
    refusal = partial(LoraError, path=checkpoint.path)
    for role, keys in roles.items():
        if len(keys) > 1 and role in ("down", "up", "alpha"):
            problem = f"{keys[0]} holds the same part of the adapter"
            raise refusal(problem, tensor=keys[1])
    for role, partner in (("down", "up"), ("up", "down")):
        if partner not in roles:
            problem = f"this {role} factor has no {partner} factor beside it"
            raise refusal(problem, tensor=roles[role][0], hint="the file is incomplete")
    (down,), (up,) = roles["down"], roles["up"]
    for tensor in (down, up):
        info = checkpoint.tensors[tensor]
        if info.dtype not in FLOAT_DTYPES:
            raise refusal(f"a factor should hold floats, found {info.dtype}", tensor=tensor)
        if len(info.shape) < 2:
            raise refusal(f"a factor should have 2 dimensions, found shape {list(info.shape)}", tensor=tensor)
        finite = bool(np.isfinite(checkpoint.float32(tensor)).all())
        if not finite:
            raise refusal("holds NaN or infinite values", tensor=tensor, hint="the file is damaged")
    rank, up_rank = checkpoint.tensors[down].shape[0], checkpoint.tensors[up].shape[1]
    if rank != up_rank or rank == 0:
        problem = f"its rank is {up_rank}, but {down} has rank {rank}" if rank else f"the rank of {down} is 0"
        raise refusal(problem, tensor=up)
    return Adapter(name, down, up, rank, _alpha(checkpoint, roles["alpha"][0]) if "alpha" in roles else None)


def _alpha(checkpoint: Checkpoint, tensor: str) -> float:
    refusal = partial(LoraError, path=checkpoint.path, tensor=tensor)
    info = checkpoint.tensors[tensor]
    if info.elements != 1:
        raise refusal(f"alpha should be one number, found shape {list(info.shape)}")
    if info.dtype not in FLOAT_DTYPES | _INTEGER_DTYPES:
        raise refusal(f"alpha should be a number, found {info.dtype}")
    read = checkpoint.float32 if info.dtype in FLOAT_DTYPES else checkpoint.bits
    alpha = float(read(tensor).reshape(-1)[0])
    if not math.isfinite(alpha):
        raise refusal(f"alpha is {alpha}", hint="the file is damaged")
    return alpha


def match_loras(loras: Sequence[Lora], layers: Mapping[str, tuple[int, int]]) -> LoraMatch:
    """Find the layers that LoRA files mean.

    Args:
        loras: The files, as `load_lora` gives them.
        layers: All of a checkpoint's linear layers, quantized or not, as it names them -> (out, in).

    Returns:
        What is matched and what is left over; nothing is dropped silently.

    Raises:
        LoraError: An adapter does not fit the shape of the layer that its name means, or a file matches nothing.
    """
    prefix, bare = strip_prefix(layers)
    targets = lora_targets({bare_name: layers[layer] for layer, bare_name in bare.items()})
    match = LoraMatch(dict(layers))
    for lora in loras:
        _match_one(lora, targets, prefix, match)
    return match


def _match_one(lora: Lora, targets: Mapping[str, tuple[Target, ...]], prefix: str, match: LoraMatch) -> None:
    finding = partial(Finding, str(lora.path))

    def layers_of(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(prefix + target.layer for target in targets.get(name, ())))

    found: dict[str, list[Delta]] = {}
    for name, adapter in lora.adapters.items():
        candidates = targets.get(name, ())
        if not candidates:
            match.unmatched.append(finding(name, "no linear layer of the checkpoint has this name"))
        elif len(candidates) > 1:
            reason = f"the name may mean {len(candidates)} parts of the checkpoint"
            match.ambiguous.append(finding(name, reason, layers_of(name)))
        else:
            delta = Delta(lora, adapter, candidates[0].rows, candidates[0].swap_halves)
            layer = prefix + candidates[0].layer
            _check_shapes(delta, layer, match.shapes[layer])
            found.setdefault(layer, []).append(delta)

    matched = False
    for layer, deltas in found.items():
        for delta in deltas:
            rivals = [other.name for other in deltas if other is not delta and _overlap(other, delta)]
            if rivals:
                reason = f"{' and '.join(rivals)} in the same file means the same rows"
                match.ambiguous.append(finding(delta.name, reason, (layer,)))
            else:
                match.matched.setdefault(layer, []).append(delta)
                matched = True

    match.unmatched += [finding(key, "no known kind of adapter tensor") for key in lora.unknown]
    match.text_encoder += [finding(name, "belongs to a text encoder") for name in lora.text_encoder]
    match.unsupported += [
        finding(name, f"{kind} is not supported", layers_of(name))
        for name, kinds in lora.unsupported.items()
        for kind in kinds
    ]
    if not matched:
        raise _matches_nothing(lora, match)


def _overlap(one: Delta, other: Delta) -> bool:
    return one.rows is None or other.rows is None or max(one.rows[0], other.rows[0]) < min(one.rows[1], other.rows[1])


def _check_shapes(delta: Delta, layer: str, shape: tuple[int, int]) -> None:
    adapter, rows = delta.adapter, delta.rows
    out_features = shape[0] if rows is None else rows[1] - rows[0]
    part = f"{layer} is {list(shape)}" if rows is None else f"rows {rows[0]} to {rows[1]} of {layer} are meant"
    for tensor, expected in ((adapter.down, [adapter.rank, shape[1]]), (adapter.up, [out_features, adapter.rank])):
        found = list(delta.lora.checkpoint.tensors[tensor].shape)
        if found[:2] != expected or math.prod(found[2:]) != 1:
            problem = f"its shape should be {expected}, since {part}, but it is {found}"
            hint = "the LoRA was made for another model"
            raise LoraError(problem, path=delta.lora.path, tensor=tensor, hint=hint)


def _matches_nothing(lora: Lora, match: LoraMatch) -> LoraError:
    """Why nothing of a file can be applied, with its first name and what the checkpoint has instead."""
    first = next(iter([*lora.adapters, *lora.unsupported, *lora.text_encoder, *lora.unknown]))
    kinds = Counter(kind for kinds in lora.unsupported.values() for kind in kinds)
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
