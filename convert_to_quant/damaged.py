"""What torn downloads and diverged training leave in a model: weights that are all zero, norms that are not finite.

Weights that are quantized are looked through while they are. Everything else is copied, by the kernel, and nobody would
see what is wrong with it; so the norms and biases of the diffusion model are looked through before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import names
from .checkpoint import Checkpoint
from .checkpoint.header import AGAIN
from .checkpoint.reader import FLOAT_DTYPES
from .errors import TensorError
from .layers import LayerTable
from .telling import plural

_PROBES, _PROBE_BYTES, _STEP_BYTES = 3, 64, 1 << 24


def all_zero(checkpoint: Checkpoint, tensor: str) -> bool:
    """Whether all bytes of a tensor that has any are 0; mostly a few of them show that they are not."""
    nbytes = checkpoint.tensors[tensor].nbytes
    probes = np.linspace(0, max(nbytes - _PROBE_BYTES, 0), _PROBES, dtype=np.int64).tolist()
    spans = [(at, min(at + _PROBE_BYTES, nbytes)) for at in probes]
    spans += [(at, min(at + _STEP_BYTES, nbytes)) for at in range(0, nbytes, _STEP_BYTES)]
    return nbytes > 0 and not any(checkpoint.raw(tensor, *span).any() for span in spans)


def refuse_damaged(checkpoint: Checkpoint, table: LayerTable) -> list[str]:
    """Refuse a model that has lost its weights, or whose small tensors are not finite; what else users should know.

    Raises:
        TensorError: every weight is zero; a tensor that no format quantizes has NaN or infinite values.
    """
    weights = {layer.weight.name for layer in table.linear() if table.owns(layer.name)}
    zero = [name for name in sorted(weights) if all_zero(checkpoint, name)]
    if zero and len(zero) == len(weights):
        problem = "every weight is zero, as failed downloads leave them"
        raise TensorError(problem, path=checkpoint.path, hint=AGAIN)
    for name in not_finite(checkpoint, table):
        problem, hint = "it has NaN or infinite values", "the file is damaged, or its training diverged"
        raise TensorError(problem, path=checkpoint.path_of(name), tensor=name, hint=hint)
    if zero:
        return [
            f"{len(zero)} of {plural(len(weights), 'weight')} are all zero (first: {zero[0]}), "
            "as downloads that stopped leave them"
        ]
    return []


def not_finite(checkpoint: Checkpoint, table: LayerTable) -> Iterator[str]:
    """The norms and biases of the diffusion model that have NaN or infinite values."""
    for name, info in checkpoint.tensors.items():
        learned = name.endswith((names.WEIGHT, names.BIAS, ".scale")) and table.owns(name)
        small = learned and len(info.shape) < 2 and info.dtype in FLOAT_DTYPES
        if small and not np.isfinite(checkpoint.float32(name)).all():
            yield name
