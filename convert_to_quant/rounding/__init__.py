"""Rounds weights by the second moments of a layer's inputs, to preserve the layer's outputs instead of its weights.

    error = tr((W - Ŵ) H (W - Ŵ)ᵀ),    H = Σ x xᵀ over inputs x of the layer

is the energy of the change of the layer's output when W is rounded to Ŵ. Rounding to nearest minimizes it only if H is
diagonal. Inputs are correlated, so later weights can compensate for the error of one weight.

Error feedback (GPTQ; Babai's nearest plane), over any format (`formats.record.Lattice`): each weight is rounded, and
the weights that are not yet rounded compensate for the change of the output. The scale of a group of weights is chosen
when the group is reached: all scales in reach are tried side by side, each with the feedback inside of the group, and
the one with the least error is used. Descent afterwards gains nothing on held-out prompts (docs/experiments.md).

Each row gets the better of the result and of rounding to nearest.
"""

from .kept import KeptMoments, kept_bytes, merge_moments
from .solver import DAMPING, error_of, round_weight

__all__ = ["DAMPING", "KeptMoments", "error_of", "kept_bytes", "merge_moments", "round_weight"]
