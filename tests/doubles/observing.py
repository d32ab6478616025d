"""Statistics of known inputs, recorded as every run records them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from convert_to_quant.recorder import Recording

OUT = 16
NORMAL = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
OUTLIER_TOKEN = np.concatenate([np.full((99, 32), 0.01, np.float32), np.full((1, 32), 400.0, np.float32)])


def observed(inputs, samples=1):
    """Statistics of layers by their inputs.

    Args:
        inputs: layer -> rows [rows, in], or noise level -> rows, or None where it never ran.
        samples: of the statistics.
    """
    by_level = {
        name: given if isinstance(given, Mapping) else {} if given is None else {1.0: given}
        for name, given in inputs.items()
    }
    width = next((np.shape(rows)[-1] for levels in by_level.values() for rows in levels.values()), 16)
    recording = Recording(dict.fromkeys(inputs, (OUT, width)), {name: [name] for name in inputs})
    for number, levels in enumerate(by_level.values()):
        for sigma, rows in levels.items():
            recording.at(sigma)
            recording.observe(number, torch.tensor(np.asarray(rows, np.float32)))
    return recording.statistics(samples=samples)
