"""What interrupted downloads and diverged training leave in a model: zero weights, norms that are not finite.

Weights are checked while they are quantized. Everything else is copied by the kernel unseen, so the norms and biases
of the diffusion model are checked beforehand.
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
    """Whether a tensor has bytes and all are 0; probes a few first, which mostly suffice."""
    nbytes = checkpoint.tensors[tensor].nbytes
    probes = np.linspace(0, max(nbytes - _PROBE_BYTES, 0), _PROBES, dtype=np.int64).tolist()
    spans = [(at, min(at + _PROBE_BYTES, nbytes)) for at in probes]
    spans += [(at, min(at + _STEP_BYTES, nbytes)) for at in range(0, nbytes, _STEP_BYTES)]
    return nbytes > 0 and not any(checkpoint.raw(tensor, *span).any() for span in spans)


def refuse_damaged(checkpoint: Checkpoint, table: LayerTable) -> list[str]:
    """Refuse a model without weights or with norms or biases that are not finite.

    Returns:
        A note about weights that are all zero, if only some are.

    Raises:
        TensorError: every weight is zero; a norm or bias has NaN or infinite values.
    """
    weights = {layer.weight.name for layer in table.linear() if table.owns(layer.name)}
    zero = [name for name in sorted(weights) if all_zero(checkpoint, name)]
    if zero and len(zero) == len(weights):
        raise TensorError("every weight is zero, as after an interrupted download", path=checkpoint.path, hint=AGAIN)
    for name in not_finite(checkpoint, table):
        problem, hint = "it has NaN or infinite values", "the file is damaged, or its training diverged"
        raise TensorError(problem, path=checkpoint.path_of(name), tensor=name, hint=hint)
    count = f"{len(zero)} of {plural(len(weights), 'weight')}"
    return [f"{count} are all zero (first: {zero[0]}), as after an interrupted download"] if zero else []


def not_finite(checkpoint: Checkpoint, table: LayerTable) -> Iterator[str]:
    """Norms and biases of the diffusion model with NaN or infinite values."""
    for name, info in checkpoint.tensors.items():
        learned = name.endswith((names.WEIGHT, names.BIAS, ".scale")) and table.owns(name)
        small = learned and len(info.shape) < 2 and info.dtype in FLOAT_DTYPES
        if small and not np.isfinite(checkpoint.float32(name)).all():
            yield name
