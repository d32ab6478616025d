"""Weights to codes so that layers' outputs stay, not the weights: rounding by the second moments of a layer's inputs.

    error = tr((W - Ŵ) H (W - Ŵ)ᵀ),    H = Σ x xᵀ over inputs x of the layer

is the energy of what rounding W to Ŵ does to the layer's output. Rounding each weight to nearest is the least of it
only where H is diagonal. Inputs are correlated, so the error of one weight can be made good by those after it.

Two steps, both over any format (`formats.record.Lattice`), in groups of weights that share a scale:

    error feedback   each weight is rounded, and what that did to the output is taken from the weights not yet rounded
                     (GPTQ; Babai's nearest plane). The scale of a group is set when the group is reached: all scales
                     in reach are tried side by side, each with the feedback inside of the group, and the least kept.
    descent          each group in turn is rounded anew, by the same procedure, for what all others have become, with
                     scales in reach; kept where the error falls. Row scales follow in closed form, and so on.

Each row ends with the less error of what was found and of rounding to nearest.
"""

from .solver import DAMPING, SWEEPS, error_of, round_weight

__all__ = ["DAMPING", "SWEEPS", "error_of", "round_weight"]
