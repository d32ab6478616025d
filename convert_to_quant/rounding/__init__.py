"""Weights to codes so that layers' outputs stay, not the weights: rounding by the second moments of a layer's inputs.

    error = tr((W - Ŵ) H (W - Ŵ)ᵀ),    H = Σ x xᵀ over inputs x of the layer

is the energy of what rounding W to Ŵ does to the layer's output. Rounding each weight to nearest is the least of it
only where H is diagonal. Inputs are correlated, so the error of one weight can be made good by those after it.

Error feedback (GPTQ; Babai's nearest plane), over any format (`formats.record.Lattice`): each weight is rounded, and
what that did to the output is taken from the weights not yet rounded. The scale of a group of weights is set when the
group is reached: all scales in reach are tried side by side, each with the feedback inside of the group, and the least
kept. Descent afterwards gains nothing on held-out prompts (docs/experiments.md).

Each row ends with the less error of what was found and of rounding to nearest.
"""

from .kept import KeptMoments, kept_bytes, merge_moments
from .solver import DAMPING, error_of, round_weight

__all__ = ["DAMPING", "KeptMoments", "error_of", "kept_bytes", "merge_moments", "round_weight"]
