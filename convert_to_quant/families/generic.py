"""A model that no family fits; never recognized: the caller falls back to it and says so.

Repeated blocks are quantized, except what sounds like an embedder, an embedding, a refiner or a modulation in them.
"""

from __future__ import annotations

from .base import MODULATION, REFINER, Family

FAMILY = Family(
    name="generic",
    title="unknown model",
    blocks=r"(?:.*\.)?[a-z_]*(?:block|blocks|layer|layers)\.\d+",
    keep={
        r".*refiner[a-z_]*": REFINER,
        r".*emb(?:ed|_)[a-z_]*": "embedder, by its name",
        r".*relative_attention_bias": "position embedding (T5): no matrix product reads it",
        r".*(?:modulation|adaln|adaLN)[A-Za-z_]*": MODULATION,
    },
)
