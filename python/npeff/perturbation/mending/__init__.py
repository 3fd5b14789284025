"""Mending a model through its components: answers that came by a wrong route change, all others stay.

A component that stands for a shortcut, a backdoor or a flawed heuristic says which weights carry it: its own direction
g_j. So the repair is sought there and nowhere else. With B the directions of the chosen components, each taken layer by
layer (:mod:`npeff.perturbation.mending.objective`), R the examples to repair and K the others,

``min_c  mean_{i∈R} −log p(y_i | x_i, θ + Bᵀc)  +  λ · mean_{i∈K} KL(p(·|x_i, θ) ‖ p(·|x_i, θ + Bᵀc))``

has only as many unknowns as there are components times layers. It is solved along a path of falling λ; of its points
the one is taken that repairs most on examples kept aside for the choice, while accuracy on the others, of the fit and
of the choice, falls by no more than a tolerance, one standard error of the fall included. Matena & Raffel (2023) mend
by a line search along ±g_j, one component, all layers together: with that single unknown the path is the line, and it
is walked without solving.
"""

from npeff.perturbation.mending.bench import Mending, mend

__all__ = ["Mending", "mend"]
