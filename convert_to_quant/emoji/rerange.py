"""Function-preserving re-rangings of the emoji model: the same images from other activation ranges.

Small models have small activations; published models do not: Qwen-Image-Edit's layer inputs reach 38,656, while those
of other models' median layer reach 10. A small model can show the effect of FP8 on such ranges, since they can be
changed without changing the function.

Maths. If something before a layer W scales its input x per channel, x can be multiplied by factors a and W's columns
divided by them: W x = (W / a)(a x). Two places of a Flux block allow this exactly:

    after a modulated norm   x = (1 + scale) · norm + shift, and scale and shift are rows of the modulation's weight:
                             a x = (1 + (a · scale + a - 1)) · norm + a · shift
    after attention          the value rows of qkv times b; attention mixes tokens, not channels, so its output is
                             times b as well, and the next layer is divided by b. Both streams of a double block share
                             b, since attention mixes their tokens.

Limits. Exact in real numbers, and to about 1e-6 in float32; bfloat16 weights are rounded once more. Biases must stay
float32, and so must the output of a modulation: a shrunk norm has a scale near -1, and 1 + scale loses all 8 bits of
bfloat16. So "cold" runs in float32 only, with linear layers in any format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import names
from ..checkpoint import Entry, open_checkpoint, write_checkpoint
from ..formats.record import narrow_bfloat16

Float32 = NDArray[np.float32]
Factors = Callable[[np.random.Generator, int], NDArray[np.float64]]
"""(random generator, number of channels) -> one factor > 0 per channel."""


def constant(factor: float) -> Factors:
    """The same factor for every channel."""
    return lambda _rng, channels: np.full(channels, factor)


def spikes(count: int, factor: float) -> Factors:
    """A factor for a few channels, 1 for the others."""

    def draw(rng: np.random.Generator, channels: int) -> NDArray[np.float64]:
        factors = np.ones(channels)
        factors[rng.choice(channels, count, replace=False)] = factor
        return factors

    return draw


def log_normal(octaves: float) -> Factors:
    """Powers of two with a normal exponent of mean 0 and standard deviation `octaves`."""
    return lambda rng, channels: np.exp2(rng.normal(0, octaves, channels))


@dataclass(frozen=True)
class Reranging:
    """Factors by the layer inputs that they multiply.

    Attributes:
        summary: in a few words.
        attention: inputs of the qkv projections of double blocks, and of the fused layer of single blocks.
        mlp: inputs of the first MLP layers of double blocks.
        value: attention values, and so the inputs of the projections after attention, in all blocks.
    """

    summary: str
    attention: Factors
    mlp: Factors
    value: Factors


RERANGINGS: Mapping[str, Reranging] = {
    "plain": Reranging("as it was trained", constant(1), constant(1), constant(1)),
    "hot": Reranging("inputs 40 to 900 times larger", constant(200), constant(40), constant(900)),
    "spiky": Reranging("a few channels 300 to 1000 times larger", spikes(3, 300), spikes(2, 1000), spikes(2, 500)),
    "cold": Reranging("inputs 1000 times smaller", constant(1e-3), constant(1e-3), constant(1e-3)),
    "wild": Reranging("every channel its own range", log_normal(2.5), log_normal(2.5), log_normal(2.5)),
}
"""By name. "hot" has the ranges published for Qwen-Image-Edit-2511, layer kind by layer kind."""


def rerange(tensors: Mapping[str, Float32], reranging: Reranging) -> dict[str, Float32]:
    """Re-range a model with Flux.1's architecture, given all its tensors by name; returns new tensors."""
    result = {name: values.copy() for name, values in tensors.items()}
    rng = np.random.default_rng(0)
    hidden = result["img_in.weight"].shape[0]

    def draw(factors: Factors) -> Float32:
        return factors(rng, hidden).astype(np.float32)

    for block in _blocks(tensors, "double_blocks"):
        streams = [f"{block}.{stream}" for stream in ("img", "txt")]
        for stream in streams:
            _scale_modulated(result, f"{stream}_mod.lin", 0, f"{stream}_attn.qkv", draw(reranging.attention))
            _scale_modulated(result, f"{stream}_mod.lin", 3, f"{stream}_mlp.0", draw(reranging.mlp))
        factors = draw(reranging.value)
        for stream in streams:
            _scale_values(result, f"{stream}_attn.qkv", f"{stream}_attn.proj", factors)
    for block in _blocks(tensors, "single_blocks"):
        _scale_modulated(result, f"{block}.modulation.lin", 0, f"{block}.linear1", draw(reranging.attention))
        _scale_values(result, f"{block}.linear1", f"{block}.linear2", draw(reranging.value))
    return result


def _blocks(tensors: Mapping[str, Float32], kind: str) -> list[str]:
    count = len({name.split(".")[1] for name in tensors if name.startswith(f"{kind}.")})
    return [f"{kind}.{number}" for number in range(count)]


def _scale_modulated(tensors: dict[str, Float32], modulation: str, shift: int, reader: str, factors: Float32) -> None:
    """Multiply a modulated norm: chunk `shift` of the modulation's rows is the shift, the next one the scale."""
    size = len(factors)
    weight_OI, bias_O = tensors[modulation + names.WEIGHT], tensors[modulation + names.BIAS]
    shifts = slice(shift * size, (shift + 1) * size)
    scales = slice((shift + 1) * size, (shift + 2) * size)
    for rows in (shifts, scales):
        weight_OI[rows] *= factors[:, None]
        bias_O[rows] *= factors
    bias_O[scales] += factors - 1
    tensors[reader + names.WEIGHT] /= factors


def _scale_values(tensors: dict[str, Float32], qkv: str, reader: str, factors: Float32) -> None:
    """Multiply attention's values, the third chunk of the qkv rows, and divide the reader's first columns."""
    size = len(factors)
    rows = slice(2 * size, 3 * size)
    tensors[qkv + names.WEIGHT][rows] *= factors[:, None]
    tensors[qkv + names.BIAS][rows] *= factors
    tensors[reader + names.WEIGHT][:, :size] /= factors


def write_reranged(source: Path, output: Path, reranging: Reranging) -> None:
    """Re-range a file with Flux.1's architecture into one with bfloat16 weights and float32 biases.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the output cannot be written.
    """
    with open_checkpoint(source) as checkpoint:
        tensors = rerange({name: checkpoint.float32(name) for name in checkpoint.tensors}, reranging)
        entries = {
            name: Entry.of(values) if name.endswith(names.BIAS) else Entry.of(narrow_bfloat16(values), "BF16")
            for name, values in tensors.items()
        }
        write_checkpoint(output, entries, checkpoint.metadata)
